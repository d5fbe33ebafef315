"""Curves through samples: hand-computed shares, exact recovery, outliers, and what cannot be told apart."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright import InputError
from meshwright.profiler.cluster import Efficiency, KernelSample, Provenance, Source
from meshwright.profiler.fit import best_rate, fit_efficiency, predicted_seconds

SOURCE = Source(provenance=Provenance.MEASURED, reference="a test")
NO_FLOOR = 1e30  # bytes a second


def sample(m: int, n: int, k: int, seconds: float, op: str = "matmul", num_bytes: float = 0.0) -> KernelSample:
    return KernelSample(
        op=op, dtype="float32", m=m, n=n, k=k, flops=2.0 * m * n * k, num_bytes=num_bytes, seconds=seconds, spread=0.0
    )


def true_seconds(m: float, n: float, k: float) -> float:
    """Peak 1e12, limit 0.8, half sizes 32, 64 and 16, 5 us of overhead."""
    return 5e-6 + 2 * m * n * k / (1e12 * 0.8 * m / (m + 32) * n / (n + 64) * k / (k + 16))


SIZES = (16, 64, 256, 1024, 4096)
GRID = [(m, n, k) for m in SIZES for n in SIZES for k in SIZES]


def test_a_known_curve_is_recovered() -> None:
    curve = fit_efficiency(
        [sample(*size, true_seconds(*size)) for size in GRID],
        peak_flops_per_s=1e12,
        memory_bytes_per_s=NO_FLOOR,
        source=SOURCE,
    )
    assert curve.max_share == pytest.approx(0.8, rel=1e-3)
    assert (curve.half_m, curve.half_n, curve.half_k) == pytest.approx((32, 64, 16), rel=1e-2)
    assert curve.overhead_s == pytest.approx(5e-6, rel=1e-2)
    assert curve.residual < 1e-3


def test_the_memory_floor_is_not_taken_for_inefficiency() -> None:
    """Every third sample is bound by bytes; the curve of the rest is found all the same."""
    rate = 1e10
    samples = []
    for place, size in enumerate(GRID):
        num_bytes = 3.0 * rate * true_seconds(*size) if place % 3 == 0 else 0.0
        seconds = max(true_seconds(*size), 5e-6 + num_bytes / rate)
        samples.append(sample(*size, seconds, num_bytes=num_bytes))
    curve = fit_efficiency(samples, peak_flops_per_s=1e12, memory_bytes_per_s=rate, source=SOURCE)
    assert curve.max_share == pytest.approx(0.8, rel=1e-2)
    assert np.allclose(predicted_seconds(curve, samples, rate), [s.seconds for s in samples], rtol=2e-2)


def test_a_few_disturbed_samples_do_not_bend_the_curve() -> None:
    samples = [
        sample(*size, true_seconds(*size) * (8.0 if place % 12 == 0 else 1.0)) for place, size in enumerate(GRID)
    ]
    curve = fit_efficiency(samples, peak_flops_per_s=1e12, memory_bytes_per_s=NO_FLOOR, source=SOURCE)
    assert curve.max_share == pytest.approx(0.8, rel=2e-2)
    undisturbed = predicted_seconds(curve, [sample(256, 1024, 256, 0.0)], NO_FLOOR)
    assert undisturbed == pytest.approx([true_seconds(256, 1024, 256)], rel=2e-2)


def test_a_device_that_beats_its_peak_keeps_a_share_of_one() -> None:
    curve = fit_efficiency(
        [sample(m, m, m, 2.0 * m**3 / 2e12) for m in SIZES],
        peak_flops_per_s=1e12,
        memory_bytes_per_s=NO_FLOOR,
        source=SOURCE,
    )
    assert curve.max_share == 1.0
    assert curve.residual == pytest.approx(1.0, rel=0.1)  # predicted twice the time: said, not hidden


def test_attention_has_one_half_size_for_queries_and_keys() -> None:
    samples = [
        sample(s, heads, s, true_seconds(s, heads, s), op="attention_forward") for s in SIZES for heads in (2, 8, 32)
    ]
    curve = fit_efficiency(samples, peak_flops_per_s=1e12, memory_bytes_per_s=NO_FLOOR, source=SOURCE)
    assert curve.half_m == curve.half_k
    assert curve.op == "attention_forward"
    assert curve.residual < 0.05


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InputError, match="at least 4 samples, found 3"):
        fit_efficiency([sample(8, 8, 8, 1e-6)] * 3, peak_flops_per_s=1e12, memory_bytes_per_s=NO_FLOOR, source=SOURCE)


def test_best_rate_by_hand() -> None:
    assert best_rate([sample(10, 10, 10, 1.0), sample(10, 10, 10, 0.5)]) == 4000.0


def test_predicted_seconds_by_hand() -> None:
    curve = Efficiency(
        op="matmul",
        dtype="float32",
        peak_flops_per_s=1e9,
        max_share=0.5,
        half_m=10,
        overhead_s=1e-3,
        source=SOURCE,
    )
    # share = 0.5 * 10/20 = 0.25, so 2e6 FLOPs take 8 ms; then bytes at 1e6/s take 20 ms
    by_flops, by_bytes = sample(10, 100, 1000, 0.0), sample(10, 100, 1000, 0.0, num_bytes=2e4)
    assert predicted_seconds(curve, [by_flops, by_bytes], 1e6) == pytest.approx([9e-3, 21e-3])
