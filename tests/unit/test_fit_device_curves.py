"""The script that fits presets to measured tables: what it takes from a table, and what it derives, by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from meshwright import load_cluster
from meshwright.profiler.artifact import to_json
from meshwright.profiler.cluster import Provenance
from meshwright.profiler.efficiency import kernel_seconds

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fit_device_curves.py"
RATE = 1e12  # bytes a second


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_device_curves", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_device_curves"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()


def table(**columns: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array(values) for name, values in columns.items()}


def test_matmuls_are_medians_over_frameworks_of_shapes_that_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"m": [1024, 1024, 64, 1000], "n": [1024] * 4, "k": [1024] * 4, "gemm_dtype": ["bfloat16"] * 4}
    tables = {
        "a": table(**rows, latency=[1.0, 2.0, 9.0, 9.0]),  # the same shape twice
        "b": table(**rows, latency=[3.0, 7.0, 9.0, 9.0]),
    }
    monkeypatch.setattr(script, "_table", lambda path: tables[path.name])
    samples, weights = script.matmul_samples([Path("a"), Path("b")], "bfloat16", RATE)
    (sample,) = samples  # 64 is too small, 1000 no multiple of 32
    assert (sample.m, sample.n, sample.k) == (1024, 1024, 1024)
    assert sample.seconds == pytest.approx(2.5e-3)  # milliseconds in the table
    assert sample.flops == 2 * 1024**3 and sample.num_bytes == 3 * 2 * 1024**2
    assert weights.tolist() == [0.3]  # 2 GFLOP: not what a step is spent on


def test_narrow_matmuls_lose_the_cast_of_their_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    one = table(m=[4096], n=[8192], k=[1024], gemm_dtype=["fp8"], latency=[1.0])
    monkeypatch.setattr(script, "_table", lambda path: one)
    (sample,), _ = script.matmul_samples([Path("a")], "float8", RATE)
    assert sample.seconds == pytest.approx(1e-3 - 3 * 4096 * 1024 / RATE)
    assert sample.num_bytes == 4096 * 1024 + 8192 * 1024 + 2 * 4096 * 8192


def test_attention_loses_the_traffic_of_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"attn_dtype": ["bfloat16"] * 2, "kv_cache_dtype": ["bfloat16", "fp8"], "window_size": [0, 0]}
    sizes = {"isl": [2048] * 2, "batch_size": [2] * 2, "num_heads": [32] * 2, "num_key_value_heads": [8] * 2}
    both = table(**same, **sizes, head_dim=[128] * 2, latency=[1.0] * 2)
    monkeypatch.setattr(script, "_table", lambda path: both)
    (sample,), _ = script.attention_samples([Path("a")], "attention_forward", RATE)
    cache = 2 * 2 * (2 * 2048 * 8 * 128) * 2  # keys and values, 2 bytes each, written and read
    assert sample.seconds == pytest.approx(1e-3 - cache / RATE)
    assert (sample.m, sample.n, sample.k) == (2048, 64, 2048)
    assert sample.flops == 4 * 64 * 128 * 2048 * 2049 / 2


def test_experts_are_one_grouped_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "num_tokens": [4096] * 3,
        "hidden_size": [4096] * 3,
        "inter_size": [14336] * 3,
        "topk": [2] * 3,
        "num_experts": [8] * 3,
        "moe_tp_size": [2] * 3,
        "moe_ep_size": [1, 2, 1],
        "moe_dtype": ["bfloat16"] * 3,
        "distribution": ["balanced", "balanced", "power_law_1.2"],
        "kernel_source": ["moe_torch_flow"] * 3,
        "latency": [10.0] * 3,
    }
    monkeypatch.setattr(script, "_table", lambda path: table(**columns))
    (sample,) = script.moe_samples(Path("a"), "bfloat16", RATE)
    assert (sample.m, sample.n, sample.k, sample.batch) == (1024, 3 * 7168, 4096, 8)
    assert sample.flops == 8 * 2 * 1024 * 3 * 7168 * 4096
    assert sample.seconds == pytest.approx(10e-3 - 2 * 8192 * (4 * 4096 + 3 * 7168) / RATE)


def test_a_table_made_from_a_curve_gives_the_curve_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = load_cluster("a100-sxm").device
    truth = device.efficiency("matmul", "bfloat16")
    sizes = np.array([128, 256, 512, 1024, 2048, 4096, 8192])
    m, n, k = (axis.ravel() for axis in np.meshgrid(sizes, sizes, sizes))
    seconds = kernel_seconds(
        truth,
        num_multiprocessors=device.num_multiprocessors,
        memory_bytes_per_s=device.memory_bytes_per_s,
        flops=2.0 * m * n * k,
        num_bytes=2.0 * (m * k + n * k + m * n),
        m=m,
        n=n,
        k=k,
    )
    whole = table(m=m, n=n, k=k, gemm_dtype=["bfloat16"] * len(m), latency=seconds * 1e3)
    monkeypatch.setattr(script, "_table", lambda path: whole)
    samples, weights = script.matmul_samples([Path("a")], "bfloat16", device.memory_bytes_per_s)
    curve = script._fit("a100-sxm", device, samples, weights, truth.source)
    for name in ("max_share", "tile_exponent", "half_k", "overhead_s"):
        assert getattr(curve, name) == pytest.approx(getattr(truth, name), rel=0.05), name
    assert curve.residual < 0.01


def test_backward_is_derived_and_says_so() -> None:
    forward = load_cluster("b200-sxm").device.efficiency("attention_forward", "bfloat16")
    backward = script._backward(forward, script.PRESETS["b200-sxm"])
    assert backward.op == "attention_backward"
    assert backward.max_share == pytest.approx(forward.max_share * 1208.6 / 1418.1, rel=1e-3)
    assert backward.half_k == pytest.approx(forward.half_k + 190, rel=1e-3)
    assert backward.source.provenance is Provenance.ASSUMED and "pull request 2280" in backward.source.reference


def test_a_written_preset_reads_back_and_keeps_what_is_not_fitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = script._load("h100-sxm")
    monkeypatch.setattr(script, "DEVICE_FOLDER", tmp_path)
    script._save("h100-sxm", device, device.efficiencies[:2])
    again = script._load("h100-sxm")
    assert to_json(again) == to_json(device)
    lines = (tmp_path / "h100-sxm.json").read_text().splitlines()
    assert sum('"op"' in line for line in lines) == len(device.efficiencies)  # one a line


def test_the_power_capped_h100_is_a_share_of_h100() -> None:
    capped = {(curve.op, curve.dtype): curve for curve in script._slowed("h100-96gb-500w")}
    full = load_cluster("h100-sxm").device.efficiency("matmul", "bfloat16")
    assert capped["matmul", "bfloat16"].max_share == pytest.approx(0.92 * full.max_share, rel=1e-3)
    assert capped["matmul", "bfloat16"].source.provenance is Provenance.ASSUMED
