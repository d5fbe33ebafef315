"""The cluster and the target of a published run, from its GPU, interconnect, node and framework columns.

One table of rules, tried in order: what the GPU column says, then what the interconnect column says. A cluster whose
network is not published gets that of the GPU's usual machine, and says so.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from meshwright import InputError
from meshwright.cost_models.published_recipes import expert_variant
from meshwright.cost_models.published_rows import Row, Skip
from meshwright.profiler.cluster import ClusterProfile, load_preset
from meshwright.profiler.cluster_presets import preset_names
from meshwright.profiler.record import record


@record
class Gpu:
    """How a GPU is written (regular expressions, no matter the case), and the presets of its machines.

    ``networks``: what the interconnect column says, and the preset that has it; the first that matches counts.
    ``usual`` is the preset where no network is published or none matches.
    """

    written: str
    usual: str
    networks: tuple[tuple[str, str], ...] = ()


_GBPS = r"\s?gb(?:it)?(?:/s|ps)"  # Gb/s, Gbps, Gbit/s

GPUS: tuple[Gpu, ...] = (
    Gpu(written=r"gb300", usual="gb300-nvl72"),
    Gpu(written=r"gb200", usual="gb200-nvl72"),
    Gpu(written=r"b300", usual="b300-sxm"),
    Gpu(written=r"b200", usual="b200-sxm"),
    Gpu(written=r"mi300", usual="mi300x"),
    Gpu(written=r"mi250", usual="mi250x"),
    Gpu(written=r"l40s", usual="l40s"),
    Gpu(written=r"rtx[ -]?4090", usual="rtx-4090"),
    Gpu(written=r"h200", usual="h200-sxm"),
    Gpu(written=r"h800", usual="h800-sxm"),
    Gpu(written=r"h100.*(hbm2e|9[456] ?gb)", usual="h100-96gb-500w"),
    Gpu(
        written=r"(?<!g)h100",
        usual="h100-sxm",
        networks=(
            (r"\befa", "h100-efa"),
            (r"tcpx|a3 ?mega", "h100-a3-mega"),
            (r"oversubscri|pods", "h100-roce-pods"),
            (rf"(?<!\d)800{_GBPS}(?! per gpu)|2 ?x ?400", "h100-800gbps"),
            (r"roce|rdma", "h100-roce"),
        ),
    ),
    Gpu(written=r"a800", usual="a800-sxm"),
    Gpu(
        written=r"a100.*40 ?gb",
        usual="a100-40gb-sxm",
        networks=(
            (rf"1600{_GBPS}|8 ?x ?200.*roce|roce.*8 ?x ?200", "a100-40gb-roce-1600"),
            (rf"4x hdr|4 ?x ?200|(?<!\d)800{_GBPS}", "a100-40gb-4x200"),
        ),
    ),
    Gpu(
        written=r"a100",
        usual="a100-sxm",
        networks=(
            (r"omni-?path|\bopa\b", "a100-opa"),
            (r"\befa", "a100-efa"),
            (rf"1600{_GBPS}|8 ?x ?200.*roce|roce.*8 ?x ?200", "a100-roce-1600"),
            (r"8 ?x ?200", "a100-sxm"),
            (rf"8 ?x ?100|roce.*(?<!\d)800{_GBPS}|(?<!\d)800{_GBPS}.*roce", "a100-roce"),
            (rf"4x hdr|4 ?x ?200|(?<!\d)800{_GBPS}", "a100-800gbps"),
            (rf"4 ?x ?100|(?<!\d)400{_GBPS}", "a100-400gbps"),
            (r"roce", "a100-roce"),  # a rate that is not published
        ),
    ),
    Gpu(written=r"v100.*(sxm3|dgx-?2)", usual="v100-sxm3"),
    Gpu(written=r"v100.*16 ?gb", usual="v100-16gb-sxm"),
    Gpu(written=r"v100", usual="v100-sxm"),
)


def cluster_of(row: Row) -> tuple[str, tuple[str, ...]]:
    """A name for ``cluster_named``, and what had to be assumed. Raises ``Skip`` for a GPU without a preset."""
    written, network = row.text("gpu_type").lower(), row.text("interconnect").lower()
    gpu = next((gpu for gpu in GPUS if re.search(gpu.written, written)), None)
    if gpu is None or gpu.usual not in _names():
        raise Skip(f"no preset for GPU {row.text('gpu_type')!r}")
    preset = next((name for said, name in gpu.networks if re.search(said, network) and name in _names()), gpu.usual)
    num_gpus = row.integer("num_gpus")
    size = _devices_per_node(preset)
    node = min(row.integer("gpus_per_node", size), size)
    notes = [] if num_gpus <= node or network or preset != gpu.usual else [f"network of {preset} assumed"]
    if num_gpus <= node:
        return f"{preset}:1", ()
    suffix = f"x{node}" if node != size else ""
    return f"{preset}:{-(-num_gpus // node)}{suffix}", tuple(notes)


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    return frozenset(preset_names())


@lru_cache(maxsize=64)
def _devices_per_node(preset: str) -> int:
    return load_preset(preset).devices_per_node


@lru_cache(maxsize=512)
def cluster_named(name: str) -> ClusterProfile:
    """``PRESET:NODES``, or ``PRESET:NODESxDEVICES`` for nodes with fewer devices than the preset's.

    Raises ``InputError`` as ``load_preset`` does.
    """
    source, _, devices = name.rpartition("x") if re.search(r":\d+x\d+$", name) else (name, "", "")
    profile = load_preset(source)
    if not devices:
        return profile
    whole, part = profile.devices_per_node, int(devices)
    if not 1 <= part <= whole:
        raise InputError(f"{name}: a node of {source} has {whole} devices")
    group = profile.node_groups[0]
    tiers = tuple(
        replace(tier, group_size=part * (tier.group_size // whole))
        if tier.group_size >= whole
        else replace(tier, group_size=min(tier.group_size, part))
        for tier in profile.tiers
    )
    kept = tuple(tier for index, tier in enumerate(tiers) if not index or tier.group_size > tiers[index - 1].group_size)
    return replace(
        profile,
        name=name,
        node_groups=(replace(group, devices_per_node=part),),
        tiers=kept,
    )


# what the framework column says (no matter the case), what the GPU is, and the target that runs it
TARGETS: tuple[tuple[str, str, str], ...] = (
    (r"maxtext|paxml|\bjax\b|\balpa\b|levanter", "", ""),
    (r"\bmeta internal|llama ?3.*4d", "", "llama3-4d"),
    (r"nanotron", "", "nanotron"),
    (r"deepspeed zero|zero-?[123]", "", "deepspeed"),
    (r"megatron[- +]*deepspeed|deepspeed[- +]*megatron|\bbloom|gpt-?neox", "", "megatron-deepspeed"),
    (r"llm[- ]?foundry|mosaicml|composer", "", "llm-foundry"),
    (r"torch ?titan|fms-fsdp|fsdp2", "", "torchtitan"),
    (r"internevo|internlm", "", "internevo"),
    (r"megatron[- ]?bridge", "", "megatron-bridge"),
    (r"\bnemo\b", "", "nemo"),
    (r"megatron[- ]?core|\bmcore\b", "", "megatron-bridge"),
    (r"megascale", "", "megascale"),
    (r"megatron[- ]?lm.*fork|fork.*megatron[- ]?lm", "", "megatron-lm"),
    (r"megatron", r"h[1278]00|b[23]00", "megatron-bridge"),  # what runs there is Megatron-Core
    (r"megatron", "", "megatron-lm"),
    (r"deepspeed", "", "deepspeed"),
)


def source_date(row: Row) -> tuple[int, int]:
    """Year and month of the source, by its arXiv number or the latest year in its name; of the future where unknown."""
    source = row.text("source")
    dates = [(2000 + int(year), int(month)) for year, month in re.findall(r"\b(\d\d)(\d\d)\.\d{5}\b", source)]
    dates = dates or [(int(year), 1) for year in re.findall(r"\b20\d\d\b", source)]
    return max(dates, default=(9999, 1))


def _before_flash(row: Row) -> bool:
    """Whether Megatron-LM ran without flash attention, where it is not said: by the date of the source.

    Since January 2023 there is a switch for it, off by default; since the end of that year Transformer Engine has it by
    default. Papers follow their runs by half a year: those before July 2024 (zero-bubble pipelines among them, whose
    peaks hold the scores, and MegaScale, which counts flash attention to its own gains) ran without.
    """
    if "flash" in row.text("attn_impl").lower():
        return False
    return source_date(row) < (2024, 7)


def _variant(row: Row, target: str) -> str:
    """The version or mode of a target that a row ran: before flash attention, on torch 1.13, not compiled.

    llm-foundry's tables of torch 1.13 call the precision bf16, later ones amp_bf16.
    """
    notes = row.text("notes").lower()
    if target == "megatron-lm" and _before_flash(row):
        return "megatron-lm-2021" if source_date(row) < (2022, 1) else "megatron-lm-2022"
    if target == "megatron-lm" and (vocab := re.search(r"vocab-?([12])\b", row.text("schedule").lower())):
        return f"megatron-lm-vocab-{vocab[1]}"
    if target == "megatron-lm" and "interlaced" in row.text("schedule").lower():
        return "megatron-lm-interlaced"
    if target == "deepspeed" and _before_flash(row):
        return "deepspeed-2021"
    if target == "llm-foundry" and re.search(r"precision label bf16\b", notes):
        return "llm-foundry-torch1"
    if target == "torchtitan" and row.text("tp") not in ("", "1") and re.search(r"\basync ?tp", notes):
        return "torchtitan-async-tp"
    if target == "nanotron" and (
        row.integer("num_gpus") >= 512 or (row.integer("tp", 1) >= 32 and row.integer("pp", 1) > 1)
    ):
        # all but a few of 207 pipelined runs on 64 nodes, half of the others there, and all 53 pipelines of tp 32 on
        # fewer: see target_megatron.NANOTRON_2024
        return "nanotron-2024"
    exposed = "nvfp4" in row.text("precision").lower() or re.search(
        r"tcpx|a3 ?mega", f"{row.text('gpu_type')} {row.text('interconnect')}".lower()
    )
    if target in ("megatron-bridge", "nemo") and row.text("tp") not in ("", "1") and exposed:
        return f"{target}-nccl"  # recipes without userbuffers: see target_megatron.MEGATRON_BRIDGE_NCCL
    if target == "nemo" and re.search(r"nemo ?24\.0[1-7]", f"{notes} {row.text('framework').lower()}"):
        return "nemo-2024"
    if target in ("megatron-bridge", "nemo") and row.number("experts") and expert_variant(row):
        return f"{target}-{expert_variant(row)}"
    if target == "megatron-bridge" and "bridge" in row.text("framework").lower() and row.number("zero_stage") == 3:
        return "megatron-bridge-offload"  # as its recipes with FSDP do
    compiled = re.search(r"compile(?!=n)", f"{notes} {row.text('framework')}".lower())
    if target == "torchtitan" and not compiled and "fp8" not in row.text("precision").lower():
        return "torchtitan-eager"  # float8 wants the compiler
    if target == "torchtitan" and re.search(
        r"_2024\d\d_|arxiv 24", f"{row.text('source_path')} {row.text('source')}".lower()
    ):
        return "torchtitan-2024"
    return target


def target_of(row: Row) -> str:
    """The name of the target. Raises ``Skip`` for a framework without one."""
    framework, gpu = row.text("framework").lower(), row.text("gpu_type").lower()
    framework = framework or "".join(re.findall(r"deepspeed", row.text("optimizer_sharding").lower())[:1])
    for said, on, target in TARGETS:
        if re.search(said, framework) and re.search(on, gpu):
            if not target:
                break
            return _variant(row, target)
    raise Skip(f"no target for framework {row.text('framework')!r}" if framework else "framework is not published")
