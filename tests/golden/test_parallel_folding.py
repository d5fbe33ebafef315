"""Mappings of experts that MoE Parallel Folding timed, in their order (Liu et al. 2025, arXiv 2504.14960, tables 3, 5).

Published is model FLOPs utilisation on H100 as Megatron-Core counts it: half of causal attention, bf16 peak. Micro
batches, recompute and chunks of pipelines are not published: 1, none, and for Mixtral a layer a chunk as in NVIDIA's
recipe (NVIDIA/NeMo, nemo/collections/llm/recipes/mixtral_8x22b.py). Tokens beyond an expert's even share are dropped
there, which is even routing here.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from meshwright.cost_models.published import PublishedRun, grouped, predict, run_of
from meshwright.cost_models.published_rows import Row

MIXTRAL = {
    "model": "Mixtral-8x22B", "layers": "56", "hidden": "6144", "heads": "48", "kv_heads": "8", "vocab": "32000",
    "experts": "8", "topk": "2", "moe_ffn": "16384",
}  # fmt: skip
FINE = MIXTRAL | {"model": "Mixtral-8x22B-G8T8", "experts": "64", "topk": "8", "moe_ffn": "2048"}
QWEN = {
    "model": "Qwen2-57B-A14B", "layers": "28", "hidden": "3584", "heads": "28", "kv_heads": "4", "vocab": "151936",
    "experts": "64", "topk": "8", "moe_ffn": "2560",
}  # fmt: skip

# what the paper calls the mapping: architecture, devices, degrees, utilisation in percent; 256 sequences of 4,096
# tokens. Without folding experts are cut by tp too (etp = tp).
TABLE_3: dict[str, tuple[tuple[str, dict[str, str], int, str, float], ...]] = {
    "Mixtral-8x22B": (
        ("FSDP + EP", MIXTRAL, 128, "tp2 dp64 ep8 etp2 zero3", 23.4),
        ("TP + EP + DP", MIXTRAL, 128, "tp4 dp32 ep8 etp4 zero1", 36.6),
        ("MCore", MIXTRAL, 128, "tp2 pp8 dp8 ep4 etp2 zero1", 46.3),
        ("MCore with folding", MIXTRAL, 128, "tp2 pp8 dp8 ep8 etp1 zero1", 49.3),
    ),
    "Qwen2-57B-A14B": (
        ("FSDP", QWEN, 64, "tp2 dp32 ep1 etp2 zero3", 9.9),
        ("TP + EP + DP", QWEN, 64, "tp4 dp16 ep4 etp4 zero1", 23.1),
        ("FSDP + EP", QWEN, 64, "tp1 dp64 ep8 etp1 zero3", 25.4),
        ("MCore", QWEN, 64, "tp2 pp4 dp8 ep4 etp2 zero1", 35.3),
        ("MCore with folding", QWEN, 64, "tp2 pp4 dp8 ep4 etp1 zero1", 39.0),
    ),
    "Mixtral-8x22B-G8T8": (
        ("TP + EP + DP", FINE, 128, "tp8 dp16 ep8 etp8 zero1", 8.7),
        ("MCore", FINE, 128, "tp2 pp8 dp8 ep8 etp2 zero1", 17.1),
        ("MCore with folding", FINE, 128, "tp4 pp8 dp4 ep8 etp1 zero1", 28.8),
    ),
}
# Mixtral-8x22B over longer sequences: tokens, sequences, devices, degrees, utilisation; the last two are folded
TABLE_5: tuple[tuple[int, int, int, str, float], ...] = (
    (16384, 1024, 128, "tp2 cp4 pp8 dp2 ep4 etp2 zero1", 45.3),
    (32768, 512, 256, "tp2 cp8 pp8 dp2 ep4 etp2 zero1", 43.2),
    (65536, 256, 512, "tp2 cp16 pp8 dp2 ep4 etp2 zero1", 42.6),
    (131072, 128, 1024, "tp4 cp16 pp8 dp2 ep8 etp4 zero1", 38.2),
    (32768, 512, 256, "tp2 cp8 pp8 dp2 ep8 etp1 zero1", 45.1),
    (65536, 256, 512, "tp4 cp8 pp8 dp2 ep8 etp1 zero1", 44.5),
)


def run(architecture: dict[str, str], devices: int, degrees: str, mfu: float, tokens: int, batch: int) -> PublishedRun:
    split = {word.rstrip("0123456789"): word.lstrip("abcdefghijklmnopqrstuvwxyz") for word in degrees.split()}
    columns = {name: split.get(name, "1") for name in ("tp", "pp", "dp", "cp", "ep", "etp")}
    columns |= architecture | {
        "id": degrees, "family": "moe_parallel_folding", "source": "MoE Parallel Folding (arXiv 2504.14960)",
        "gpu_type": "H100-80GB-SXM", "gpus_per_node": "8", "num_gpus": str(devices), "framework": "Megatron-Core",
        "interconnect": "NVLink4 450GB/s uni; IB 400Gb/s per GPU (Eos)", "arch_family": "moe", "precision": "bf16",
        "seq_len": str(tokens), "global_batch": str(batch), "zero_stage": split["zero"], "sp": "True",
        "mfu_pct": str(mfu), "usable_for": "util", "notes": "token-drop training, capacity factor 1",
    }  # fmt: skip
    return run_of(Row(columns, 2))


@cache
def utilisations(name: str) -> list[tuple[str, float, float]]:
    """``(mapping, published, ours)`` of table 3, in percent."""
    runs = [run(each, devices, degrees, mfu, 4096, 256) for _, each, devices, degrees, mfu in TABLE_3[name]]
    return with_ours(runs, [words for words, *_ in TABLE_3[name]])


def with_ours(runs: list[PublishedRun], words: list[str]) -> list[tuple[str, float, float]]:
    found = []
    for each, step, said in zip(runs, predict(grouped(runs)).step_s, words, strict=True):
        assert each.measured.mfu is not None and each.measured.utilisation_step_s is not None
        published = 100 * each.measured.mfu
        found.append((said, published, published * each.measured.utilisation_step_s / float(step)))
    for said, published, ours in found:
        print(f"{said}: {published:.1f} % published, {ours:.1f} % ours")
    return found


@pytest.mark.parametrize("name", TABLE_3)
def test_mappings_come_out_in_the_published_order(name: str) -> None:
    found = utilisations(name)
    ours = [utilisation for _, _, utilisation in found]
    assert ours == sorted(ours)
    assert max(abs(mine / published - 1) for _, published, mine in found) <= 0.13


@pytest.mark.parametrize(("name", "published"), [("Mixtral-8x22B", 49.3 / 46.3), ("Qwen2-57B-A14B", 39.0 / 35.3),
                                                 ("Mixtral-8x22B-G8T8", 28.8 / 17.1)])  # fmt: skip
def test_what_folding_gains(name: str, published: float) -> None:
    """Experts whole, over ranks that attention cuts by tp, against experts cut by tp as well."""
    (_, _, before), (_, _, folded) = utilisations(name)[-2:]
    print(f"folding {name}: {published:.2f} published, {folded / before:.2f} ours")
    assert folded / before == pytest.approx(published, rel=0.06)


def test_longer_sequences() -> None:
    runs = [run(MIXTRAL, devices, degrees, mfu, tokens, batch) for tokens, batch, devices, degrees, mfu in TABLE_5]
    found = with_ours(runs, [f"{tokens} tokens, {degrees}" for tokens, _, _, degrees, _ in TABLE_5])
    errors = [abs(ours / published - 1) for _, published, ours in found]
    assert np.median(errors) <= 0.06 and max(errors) <= 0.10
    assert found[4][2] > found[1][2] and found[5][2] > found[2][2]  # folded, at the same length
