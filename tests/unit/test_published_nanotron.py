"""How runs of nanotron are read: which way they ran, and what their peaks count."""

from __future__ import annotations

import pytest

from meshwright.cost_models.published_hardware import target_of
from meshwright.cost_models.published_measured import PeakKind, measured_of
from meshwright.cost_models.published_model import model_of, workload_of
from meshwright.cost_models.published_rows import Row
from meshwright.cost_models.strategy import ParallelConfig

LLAMA = {
    "id": "b-1", "family": "b", "model": "nanotron-llama-1.34B", "arch_family": "llama", "layers": "16",
    "hidden": "2048", "heads": "32", "kv_heads": "32", "ffn": "8192", "vocab": "131072", "params_b": "1.34",
    "precision": "bf16", "framework": "nanotron", "seq_len": "4096", "gpu_type": "H100-80GB-SXM", "num_gpus": "64",
    "tp": "2", "pp": "1", "dp": "32", "global_batch": "256", "usable_for": "time;mem", "peak_mem_gb": "10",
}  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "target"),
    [
        ({}, "nanotron"),
        ({"tp": "32", "dp": "2"}, "nanotron"),
        ({"tp": "32", "pp": "2", "dp": "1"}, "nanotron-2024"),
        ({"tp": "16", "pp": "4", "dp": "1"}, "nanotron"),
        ({"num_gpus": "512", "dp": "256"}, "nanotron-2024"),
    ],
)
def test_which_way_it_ran(columns: dict[str, str], target: str) -> None:
    assert target_of(Row(LLAMA | columns, 2)) == target


@pytest.mark.parametrize(
    ("framework", "kind"), [("nanotron", PeakKind.RESERVED), ("Megatron-LM", PeakKind.UNSPECIFIED)]
)
def test_its_peaks_are_reserved(framework: str, kind: PeakKind) -> None:
    said = "unspecified (logs max_memory_allocated and max_memory_reserved, /1024^3)"
    row = Row(LLAMA | {"mem_kind": said, "framework": framework}, 2)
    model, _ = model_of(row)
    measured = measured_of(row, model, workload_of(row)[0], ParallelConfig(tp=2, dp=32), "h100-efa:8")
    assert (measured.peak_kind, measured.peak_bytes) == (kind, 10 * 2**30)
