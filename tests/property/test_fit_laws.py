"""Laws of the fit: a synthetic curve comes back, also with noise, and every fitted curve is monotone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.profiler.cluster import KernelSample, Provenance, Source
from meshwright.profiler.fit import fit_efficiency, predicted_seconds

SOURCE = Source(provenance=Provenance.MEASURED, reference="a test")
SIZES = (32, 128, 512, 2048)
GRID = [(m, n, k) for m in SIZES for n in SIZES for k in SIZES]

halves = st.floats(1.0, 500.0)


def synthetic(
    share: float, half: tuple[float, float, float], overhead: float, noise: float, seed: int
) -> list[KernelSample]:
    m, n, k = (np.array(column, dtype=np.float64) for column in zip(*GRID, strict=True))
    flops = 2 * m * n * k
    reached = share * m / (m + half[0]) * n / (n + half[1]) * k / (k + half[2])
    seconds = overhead + flops / (1e12 * reached)
    seconds *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(seconds)))
    return [
        KernelSample(
            op="matmul", dtype="bfloat16", m=a, n=b, k=c, flops=float(f), num_bytes=0.0, seconds=float(s), spread=0.0
        )
        for (a, b, c), f, s in zip(GRID, flops, seconds, strict=True)
    ]


@settings(max_examples=20, deadline=None)
@given(
    share=st.floats(0.2, 0.95),
    half=st.tuples(halves, halves, halves),
    overhead=st.floats(1e-7, 2e-5),
    noise=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 1000),
)
def test_a_synthetic_curve_comes_back(
    share: float, half: tuple[float, float, float], overhead: float, noise: float, seed: int
) -> None:
    samples = synthetic(share, half, overhead, noise, seed)
    curve = fit_efficiency(samples, peak_flops_per_s=1e12, memory_bytes_per_s=1e30, source=SOURCE)
    truth = synthetic(share, half, overhead, 0.0, seed)
    predicted = predicted_seconds(curve, truth, 1e30)
    error = np.abs(predicted / [sample.seconds for sample in truth] - 1)
    assert np.median(error) < (0.01 if noise == 0.0 else 0.05)
    assert curve.max_share <= 1.0


@settings(max_examples=20, deadline=None)
@given(
    seconds=st.lists(st.floats(1e-6, 1e-1), min_size=len(GRID), max_size=len(GRID)),
)
def test_any_fit_is_monotone(seconds: list[float]) -> None:
    """Even through noise alone: a larger matmul never takes less time, nor a smaller share."""
    samples = [
        KernelSample(
            op="matmul", dtype="bfloat16", m=m, n=n, k=k, flops=2.0 * m * n * k, num_bytes=0.0, seconds=s, spread=0.0
        )
        for (m, n, k), s in zip(GRID, seconds, strict=True)
    ]
    curve = fit_efficiency(samples, peak_flops_per_s=1e12, memory_bytes_per_s=1e30, source=SOURCE)
    assert 0 < curve.max_share <= 1
    assert min(curve.half_m, curve.half_n, curve.half_k, curve.overhead_s) >= 0
    times = predicted_seconds(curve, samples, 1e30).reshape([len(SIZES)] * 3)
    for axis in range(3):
        assert (np.diff(times, axis=axis) >= 0).all()
