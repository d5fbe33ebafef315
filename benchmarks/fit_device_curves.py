"""Fit the efficiency curves of the device presets to measured tables: ``python benchmarks/fit_device_curves.py``.

The tables are those of PyPI's ``aiconfigurator-core`` (Apache-2.0; NVIDIA's measurements of single operators inside
TensorRT-LLM, vLLM and SGLang): ``pip install 'meshwright[presets]'``, or name the unpacked package's folder. For each
device preset below the curves in bfloat16 (float16 runs at the same rates), float8 and float4 are fitted to shapes that
training uses and written into the preset, with their source; curves in other dtypes are left as they are. Printed are
the errors over all shapes of a table and over its large ones.

* **matmul**: in bfloat16 the median of the three frameworks at each shape, sizes from 128. They are timed back to back
  on warm operands; only ``x @ w.T`` is timed, so gradients are taken to be as fast. In narrower formats TensorRT-LLM's
  matmul with one scale a tensor; casting the activations, which its time holds, is taken off as traffic. The floor is
  that of the smallest matmul in bfloat16; what more the other tables start with (a cast, sorting tokens) is fitted
  beside the curve and left out of it.
* **attention_forward**: prefill over the whole prompt, causal, head size 64 and 128, from 512 tokens. The serving
  kernels also write keys and values to a cache: that traffic, at the memory rate, is taken off before fitting.
  SGLang's flash-attn 2 on A100, vLLM's on L40S; FlashAttention-3 of both on Hopper (``attention_forward_fa3``); the
  vendor's kernels on Blackwell.
* **grouped_matmul**: TensorRT-LLM's whole mixture-of-experts layer with all experts on one device, 128 or more tokens
  each, evenly spread; gate, up and down projection are taken as one matmul of three times the ffn size, tiles as a
  matmul's, and the traffic of sorting tokens, unsorting them and of the activation is taken off. Where the tables
  hold no such layer (A100), or one that switches between kernels too often for a curve (float4): 0.85 of a matmul's
  limit, assumed.

What no table holds is derived, and says so: backward of attention, and flash attention 2 on Hopper, from published
figures (``BACKWARD``, ``HOPPER_FA2``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.profiler.artifact import to_json
from meshwright.profiler.cluster import Device, Efficiency, KernelSample, Provenance, Source
from meshwright.profiler.cluster_presets import DEVICE_FOLDER
from meshwright.profiler.fit import fit_efficiency, predicted_seconds

Table = dict[str, NDArray[Any]]

MAX_SHAPES = 2500  # more do not move the curve
DTYPE_NAMES = {"bfloat16": "bfloat16", "float8": "fp8", "float4": "nvfp4"}
OPERAND_BYTES = {"bfloat16": 2.0, "float8": 1.0, "float4": 0.5}
RESULT_BYTES = 2.0


@dataclass(frozen=True, slots=True)
class Tables:
    """Which tables a device's curves come from: folders below ``systems/data``."""

    system: str
    gemm: tuple[str, ...]
    attention: tuple[str, ...]
    attention_op: str
    moe: str | None
    dtypes: tuple[str, ...]


NEWER = ("trtllm/1.3.0rc20", "sglang/0.5.14", "vllm/0.24.0")
AMPERE = Tables(
    "a100_sxm",
    gemm=("trtllm/1.0.0", "sglang/0.5.10", "vllm/0.14.0"),
    attention=("sglang/0.5.10",),
    attention_op="attention_forward",
    moe=None,
    dtypes=("bfloat16",),
)
ADA = Tables("l40s", NEWER, ("vllm/0.24.0",), "attention_forward", NEWER[0], ("bfloat16", "float8"))


def _hopper(system: str) -> Tables:
    return Tables(system, NEWER, NEWER[1:], "attention_forward_fa3", NEWER[0], ("bfloat16", "float8"))


def _blackwell(system: str) -> Tables:
    return Tables(system, NEWER, NEWER[1:], "attention_forward", NEWER[0], ("bfloat16", "float8", "float4"))


PRESETS = {
    "l40s": ADA,
    "a100-sxm": AMPERE,
    "h100-sxm": _hopper("h100_sxm"),
    "h200-sxm": _hopper("h200_sxm"),
    "b200-sxm": _blackwell("b200_sxm"),
    "b300-sxm": _blackwell("b300_sxm"),
    "gb200": _blackwell("gb200"),
    "gb300": _blackwell("gb300"),
}

# devices without tables of their own: those of another times a share
SLOWED = {
    "a100-40gb-sxm": ("a100-sxm", 1.0, "the same chip as A100 SXM 80 GB"),
    "h100-96gb-500w": (
        "h100-sxm",
        0.92,
        "limits times 0.92: between the peaks of H100 SXM (989 TFLOP/s, 700 W) and H100 NVL (835, 400 W), assumed",
    ),
}

# limit of backward over that of forward, and keys that its half size is larger by
BACKWARD_KEYS = 190.0
BACKWARD = {
    "a100": (0.863, "0.63 of peak backward, 0.73 forward on A100 (FlashAttention-2, arXiv 2307.08691, section 1)"),
    "l40s": (0.863, "as on A100, whose kernel it runs: 0.63 of peak backward, 0.73 forward (arXiv 2307.08691)"),
    "hopper": (0.844, "FlashAttention-3 on H100, causal, 8192 tokens: 630.0 TFLOP/s forward, 531.6 backward "
               "(github.com/Dao-AILab/flash-attention, pull request 1791)"),
    "blackwell": (0.852, "FlashAttention-4 on B200, causal, 8192 tokens: 1418.1 TFLOP/s forward, 1208.6 backward "
                  "(github.com/Dao-AILab/flash-attention, pull request 2280)"),
}  # fmt: skip
BACKWARD_SHAPE = (
    f"half size {BACKWARD_KEYS:.0f} keys above forward's: flash-attn 2 reaches 252, 308, 312 TFLOP/s forward and 190, "
    "264, 299 backward at 512, 2048, 8192 tokens (github.com/Dao-AILab/flash-attention, pull request 2688)"
)
HOPPER_FA2 = (284.1e12, 287.1e12)  # forward, backward: causal, head size 128, 8192 tokens, 32 heads times sequences
HOPPER_FA2_SOURCE = (
    "flash-attn 2 on H100, causal, head size 128, 8192 tokens: 284.1 TFLOP/s forward, 287.1 backward "
    "(github.com/Dao-AILab/flash-attention, pull request 1791); shape of the curve as fitted on A100"
)


def main() -> None:
    """Fit and write every preset, or those named."""
    parser = argparse.ArgumentParser(description="Fit the efficiency curves of the device presets to measured tables.")
    parser.add_argument("presets", nargs="*", default=[], help=f"of {', '.join((*PRESETS, *SLOWED))}; all by default")
    parser.add_argument("--package", type=Path, help="folder of an unpacked aiconfigurator_core")
    parser.add_argument("--dry-run", action="store_true", help="print errors, write nothing")
    arguments = parser.parse_args()
    folder, version = _package(arguments.package)
    print(f"aiconfigurator-core {version}; error: median, 90th percentile over all shapes | over large ones")
    for name in arguments.presets or [*PRESETS, *SLOWED]:
        device = _load(name)
        curves = _fit_device(name, device, PRESETS[name], folder, version) if name in PRESETS else _slowed(name)
        if not arguments.dry_run:
            _save(name, device, curves)


def _package(folder: Path | None) -> tuple[Path, str]:
    if folder is None:
        spec = importlib.util.find_spec("aiconfigurator_core")
        if spec is None or spec.origin is None:
            raise SystemExit("aiconfigurator-core is not installed: pip install 'meshwright[presets]'")
        folder = Path(spec.origin).parent
    info = next(folder.parent.glob("aiconfigurator_core-*.dist-info"))
    return folder / "systems" / "data", info.name.removeprefix("aiconfigurator_core-").removesuffix(".dist-info")


def _table(path: Path) -> Table:
    columns = import_module("pyarrow.parquet").read_table(path).to_pydict()
    return {name: np.array(values) for name, values in columns.items()}


def _slowed(name: str) -> tuple[Efficiency, ...]:
    """The curves of a device that another one's stand for, each limit times a share."""
    like, share, reference = SLOWED[name]
    curves = []
    for curve in _load(like).efficiencies:
        provenance = curve.source.provenance if share == 1.0 else Provenance.ASSUMED
        source = Source(provenance=provenance, reference=f"{reference}; {curve.source.reference}")
        curves.append(_rounded(replace(curve, max_share=curve.max_share * share, source=source)))
    return tuple(curves)


def _fit_device(name: str, device: Device, tables: Tables, folder: Path, version: str) -> tuple[Efficiency, ...]:
    """The fitted and the derived curves of one device."""
    base = folder / tables.system
    curves: list[Efficiency] = []
    floor: dict[str, float] = {}
    for dtype in tables.dtypes:
        runs = tables.gemm if dtype == "bfloat16" else tables.gemm[:1]
        paths = [base / "gemm" / run / "gemm_perf.parquet" for run in runs]
        samples, weights = matmul_samples(paths, dtype, device.memory_bytes_per_s)
        source = _source(version, tables.system, runs, "gemm_perf")
        if dtype == "bfloat16":
            curve, quickest = _fit(name, device, samples, weights, source), _quickest(paths)
            if curve.overhead_s < quickest:
                curve = _fit(name, device, samples, weights, source, {"overhead_s": quickest})
            floor = {"overhead_s": curve.overhead_s}
        else:
            curve = replace(_fit(name, device, samples, weights, source), overhead_s=floor["overhead_s"])
        curves.append(curve)
        if tables.moe is None or dtype == "float4":
            reference = f"0.85 of a matmul's limit, assumed, for uneven groups; {source.reference}"
            source = Source(provenance=Provenance.ASSUMED, reference=reference)
            half = _rounded(replace(curve, max_share=0.85 * curve.max_share, residual=0.0, source=source))
            curves.append(replace(half, op="grouped_matmul"))
            continue
        experts = moe_samples(base / "moe" / tables.moe / "moe_perf.parquet", dtype, device.memory_bytes_per_s)
        source = _source(version, tables.system, (tables.moe,), "moe_perf")
        fixed = {name: getattr(curve, name) for name in ("tile_exponent", "half_k")}
        curves.append(replace(_fit(name, device, experts, None, source, fixed), overhead_s=floor["overhead_s"]))
    paths = [base / "attention" / run / "context_attention_perf.parquet" for run in tables.attention]
    heads, weights = attention_samples(paths, tables.attention_op, device.memory_bytes_per_s)
    source = _source(version, tables.system, tables.attention, "context_attention_perf")
    fixed = dict(floor)
    if tables is AMPERE:  # its tables hold heads of 128 only; the same kernel on another device says the rest
        ada = next(curve for curve in _load("l40s").efficiencies if curve.op == "attention_forward")
        fixed["head_exponent"] = ada.head_exponent
        source = replace(source, reference=f"{source.reference}; head_exponent as fitted on L40S")
    forward = _fit(name, device, heads, weights, source, fixed)
    curves += [forward, _backward(forward, tables)]
    if tables.attention_op.endswith("_fa3"):
        curves += _hopper_fa2(device, _load("a100-sxm"), forward)
    return tuple(copy for curve in curves for copy in _both_halves(curve))


def matmul_samples(
    paths: list[Path], dtype: str, memory_bytes_per_s: float
) -> tuple[list[KernelSample], NDArray[np.float64]]:
    """Median seconds at the shapes that all tables hold, spread over the grid, and what each weighs in the fit."""
    cast_bytes = 0.0 if dtype == "bfloat16" else RESULT_BYTES + OPERAND_BYTES[dtype]  # read and written
    found: dict[tuple[int, int, int], list[float]] = {}
    for path in paths:
        table = _table(path)
        keep = (table["gemm_dtype"] == DTYPE_NAMES[dtype]) & (table["latency"] > 0)
        for size in "mnk":
            keep &= (table[size] >= 128) & (table[size] % 32 == 0)
        for m, n, k, latency in zip(*(table[name][keep].tolist() for name in ("m", "n", "k", "latency")), strict=True):
            found.setdefault((m, n, k), []).append(latency * 1e-3)
    shapes = sorted(shape for shape, times in found.items() if len(times) >= len(paths) and np.prod(shape) > 2.5e8)
    samples = [
        KernelSample(
            op="matmul",
            dtype=dtype,
            m=m,
            n=n,
            k=k,
            flops=2.0 * m * n * k,
            num_bytes=OPERAND_BYTES[dtype] * (m * k + n * k) + RESULT_BYTES * m * n,
            seconds=float(np.median(found[m, n, k])) - cast_bytes * m * k / memory_bytes_per_s,
            spread=0.0,
        )
        for m, n, k in _spread(shapes)
    ]
    samples = [sample for sample in samples if sample.seconds > 0]
    return samples, np.array([1.0 if _is_large(sample) else 0.3 for sample in samples])


def _quickest(paths: list[Path]) -> float:
    """Seconds of the smallest matmul: what a kernel costs at least on the device."""
    return float(np.median([_table(path)["latency"].min() * 1e-3 for path in paths]))


def attention_samples(
    paths: list[Path], op: str, memory_bytes_per_s: float
) -> tuple[list[KernelSample], NDArray[np.float64]]:
    """Causal prefill, the cache's traffic taken off. Sequences of one head with one head of keys weigh the same."""
    samples = []
    for path in paths:
        table = _table(path)
        keep = (table["kv_cache_dtype"] == "bfloat16") & (table["attn_dtype"] == "bfloat16") & (table["isl"] >= 512)
        keep &= np.isin(table["head_dim"], (64, 128)) & (table["latency"] > 0)
        if "window_size" in table:
            keep &= table["window_size"] == 0
        names = ("isl", "batch_size", "num_heads", "num_key_value_heads", "head_dim", "latency")
        for tokens, batch, heads, kv_heads, head_dim, latency in zip(
            *(table[name][keep].tolist() for name in names), strict=True
        ):
            flops = 4.0 * batch * heads * head_dim * tokens * (tokens + 1) / 2
            cached = (
                2.0 * RESULT_BYTES * 2.0 * tokens * batch * kv_heads * head_dim
            )  # keys and values, read and written
            seconds = latency * 1e-3 - cached / memory_bytes_per_s
            if flops < 2e9 or seconds < 0.3e-3 * latency:
                continue
            samples.append(
                KernelSample(
                    op=op,
                    dtype="bfloat16",
                    m=tokens,
                    n=batch * heads,
                    k=tokens,
                    flops=flops,
                    num_bytes=RESULT_BYTES * 2.0 * tokens * batch * (heads + kv_heads) * head_dim,
                    seconds=seconds,
                    spread=0.0,
                )
            )
    chosen = list(_spread(samples))
    return chosen, np.array([1.0 if sample.m >= 2048 else 0.3 for sample in chosen])


def moe_samples(path: Path, dtype: str, memory_bytes_per_s: float) -> list[KernelSample]:
    """Whole layers with all experts here, evenly loaded, as one grouped matmul of gate, up and down projection."""
    table = _table(path)
    keep = (table["moe_dtype"] == DTYPE_NAMES[dtype]) & (table["distribution"] == "balanced")
    keep &= (table["moe_ep_size"] == 1) & np.array(["nongated" not in name for name in table["kernel_source"]])
    samples = []
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "latency")
    for tokens, hidden, ffn, top_k, experts, tp, latency in zip(
        *(table[name][keep].tolist() for name in names), strict=True
    ):
        rows, width = tokens * top_k, ffn // tp
        around = RESULT_BYTES * rows * (4.0 * hidden + 3.0 * width)  # in and out of order, activation
        seconds = latency * 1e-3 - around / memory_bytes_per_s
        flops = 2.0 * rows * 3 * width * hidden
        if rows < 128 * experts or rows % experts or width < 256 or flops < 2e10 or seconds < 0.3e-3 * latency:
            continue
        samples.append(
            KernelSample(
                op="grouped_matmul",
                dtype=dtype,
                m=rows // experts,
                n=3 * width,
                k=hidden,
                batch=experts,
                flops=flops,
                num_bytes=OPERAND_BYTES[dtype] * (experts * 3 * width * hidden + rows * (2 * hidden + 3 * width)),
                seconds=seconds,
                spread=0.0,
            )
        )
    return list(_spread(samples))


def _spread(items: list[Any]) -> Iterator[Any]:
    """At most ``MAX_SHAPES``, evenly over the order of a fixed shuffle."""
    order = np.random.default_rng(0).permutation(len(items))[:MAX_SHAPES]
    return (items[place] for place in sorted(order.tolist()))


def _is_large(sample: KernelSample) -> bool:
    """What most of a training step is spent on."""
    return sample.flops >= 2e10 and (sample.op != "matmul" or min(sample.m, sample.n, sample.k) >= 512)


def _fit(
    name: str,
    device: Device,
    samples: list[KernelSample],
    weights: NDArray[np.float64] | None,
    source: Source,
    fixed: dict[str, float] | None = None,
) -> Efficiency:
    first = samples[0]
    peak = device.efficiency("matmul", first.dtype).peak_flops_per_s
    rates = {"memory_bytes_per_s": device.memory_bytes_per_s, "num_multiprocessors": device.num_multiprocessors}
    curve = fit_efficiency(samples, peak_flops_per_s=peak, source=source, weights=weights, fixed=fixed, **rates)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    predicted = predicted_seconds(curve, samples, device.memory_bytes_per_s, device.num_multiprocessors)
    error = np.abs(predicted / [sample.seconds for sample in samples] - 1)
    large = error[[_is_large(sample) for sample in samples]]
    curve = _rounded(replace(curve, residual=float(np.median(large))))
    shape = f"tile {curve.tile_exponent:.2f}" if curve.tile_exponent is not None else f"waves {curve.half_waves:.2f}"
    print(
        f"{name:14s} {first.op:22s} {first.dtype:9s} {len(samples):5d} shapes  {np.median(error):5.1%} "
        f"{np.quantile(error, 0.9):5.1%} | {np.median(large):5.1%} {np.quantile(large, 0.9):5.1%}   limit "
        f"{curve.max_share:.3f} half_k {curve.half_k:.0f} {shape} head {curve.head_exponent:.2f} "
        f"floor {curve.overhead_s * 1e6:.1f} us",
        flush=True,
    )
    return curve


def _backward(forward: Efficiency, tables: Tables) -> Efficiency:
    family = {"a100_sxm": "a100", "l40s": "l40s", "h100_sxm": "hopper", "h200_sxm": "hopper"}.get(tables.system)
    ratio, reference = BACKWARD[family or "blackwell"]
    source = Source(
        provenance=Provenance.ASSUMED, reference=f"{ratio} of forward's limit: {reference}; {BACKWARD_SHAPE}"
    )
    return _rounded(
        replace(
            forward,
            op=forward.op.replace("forward", "backward"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            max_share=forward.max_share * ratio,
            half_k=forward.half_k + BACKWARD_KEYS,
            residual=0.0,
            source=source,
        )
    )


def _hopper_fa2(device: Device, ampere: Device, newer: Efficiency) -> list[Efficiency]:
    """Flash attention 2 on Hopper: Ampere's curves with limits such that the published figures come out."""
    assert device.num_multiprocessors is not None
    tokens, waves = 8192.0, 32 * 8192.0 / 128 / device.num_multiprocessors
    curves = []
    for op, rate in zip(("attention_forward", "attention_backward"), HOPPER_FA2, strict=True):
        like = ampere.efficiency(op, "bfloat16")
        shape = tokens / (tokens + like.half_k) * waves / (waves + like.half_waves)
        limited = replace(
            like,
            peak_flops_per_s=newer.peak_flops_per_s,
            max_share=rate / newer.peak_flops_per_s / shape,
            overhead_s=newer.overhead_s,
            residual=0.0,
            source=Source(provenance=Provenance.ASSUMED, reference=HOPPER_FA2_SOURCE),
        )
        curves.append(_rounded(limited))
    return curves


def _both_halves(curve: Efficiency) -> tuple[Efficiency, ...]:
    return (curve, replace(curve, dtype="float16")) if curve.dtype == "bfloat16" else (curve,)


def _rounded(curve: Efficiency) -> Efficiency:
    """Four digits: more are noise."""
    names = ("max_share", "half_k", "tile_exponent", "half_waves", "head_exponent", "overhead_s", "residual")
    known = {name: getattr(curve, name) for name in names if getattr(curve, name) is not None}
    return replace(curve, **{name: float(f"{value:.4g}") for name, value in known.items()})  # type: ignore[arg-type]


def _source(version: str, system: str, runs: tuple[str, ...], table: str) -> Source:
    reference = (
        f"aiconfigurator-core {version}, {system}, {table} of {', '.join(runs)}: benchmarks/fit_device_curves.py"
    )
    return Source(provenance=Provenance.MEASURED, reference=reference)


def _load(name: str) -> Device:
    from pydantic import TypeAdapter

    device: Device = TypeAdapter(Device).validate_json((DEVICE_FOLDER / f"{name}.json").read_text())
    return device


def _save(name: str, device: Device, curves: tuple[Efficiency, ...]) -> None:
    """Replace the curves of the same operator and dtype; one curve a line, fields at their defaults left out."""
    mine = {(curve.op, curve.dtype) for curve in curves}
    kept = tuple(curve for curve in device.efficiencies if (curve.op, curve.dtype) not in mine)
    tree = json.loads(to_json(replace(device, efficiencies=())))
    lines = []
    for curve in (*curves, *kept):
        fields = json.loads(to_json(curve))
        fields = {key: value for key, value in fields.items() if value not in (0.0, None)}
        lines.append("  " + json.dumps(fields, ensure_ascii=False))
    tree["efficiencies"] = []
    for key in ("samples", "matmul_factor", "attention_factor", "memory_factor"):
        if tree.get(key) in ([], 1.0):
            tree.pop(key)
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    text = text.replace('"efficiencies": []', '"efficiencies": [\n' + ",\n".join(lines) + "\n ]")
    (DEVICE_FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
