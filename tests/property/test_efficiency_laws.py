"""Laws of an operator's seconds: never less for more work, more bytes or slower memory, never above the peak."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost_models.roofline import operator_seconds
from meshwright.profiler.cluster import Device, load_cluster
from meshwright.profiler.cluster_presets import preset_names

DEVICES = {name: load_cluster(name).device for name in preset_names()}
sizes = st.integers(1, 1 << 15)


def matmul_s(device: Device, dtype: str, m: Any, n: Any, k: Any) -> float:
    num_bytes = 2.0 * (m * k + k * n + m * n)
    return float(operator_seconds(device, "matmul", dtype, 2.0 * m * n * k, num_bytes, m, n, k))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DEVICES)), sizes, sizes, sizes, st.integers(0, 2), st.integers(1, 4096))
def test_a_larger_matmul_never_takes_less(name: str, m: int, n: int, k: int, axis: int, more: int) -> None:
    device = DEVICES[name]
    shape = np.array([m, n, k], dtype=np.float64)
    before = matmul_s(device, "float16", *shape)
    shape[axis] += more
    assert matmul_s(device, "float16", *shape) >= before * (1 - 1e-12)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DEVICES)), sizes, sizes, sizes)
def test_no_matmul_beats_its_limit_or_its_bytes(name: str, m: int, n: int, k: int) -> None:
    device = DEVICES[name]
    curve = device.efficiency("matmul", "float16")
    seconds = matmul_s(device, "float16", m, n, k) - curve.overhead_s
    assert seconds >= 2.0 * m * n * k / (curve.max_share * curve.peak_flops_per_s) * (1 - 1e-9)
    assert seconds >= 2.0 * (m * k + k * n + m * n) / device.memory_bytes_per_s * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(DEVICES)), st.integers(64, 1 << 14), st.integers(1, 512), st.integers(1, 4096))
def test_longer_sequences_and_more_heads_never_take_less(name: str, tokens: int, heads: int, more: int) -> None:
    """From 64 tokens: below, the diagonal's half pair makes a token cheaper than the idle multiprocessors it fills."""
    device = DEVICES[name]
    longer = np.array([tokens, tokens + more, tokens], dtype=np.float64)
    count = np.array([heads, heads, heads + more], dtype=np.float64)
    for op in ("attention_forward", "attention_backward"):
        flops = 4.0 * count * 128 * longer * (longer + 1) / 2
        first, *larger = operator_seconds(device, op, "float16", flops, 0.0, longer, count, longer)
        assert min(larger) >= first * (1 - 1e-12)
