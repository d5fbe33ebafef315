"""Samples of kernels -> efficiency curves, by least squares on the logarithm of time, with the residual kept.

The curve is ``Efficiency``: ``t = overhead + max(FLOPs / (peak * share(m, n, k)), bytes / memory rate)``,
``share = max_share * m/(m+half_m) * n/(n+half_n) * k/(k+half_k)``. Its logarithm is minimised with the method of
Levenberg and Marquardt (Marquardt 1963, doi:10.1137/0111030) over the logarithms of the unknowns, which keeps them
positive; ``max_share`` is held at or below 1. The curve grows with each size, so predictions are monotone by its form.

A sample that another process disturbed, or that ran into a cliff of the allocator, is off by far more than the others:
samples are weighted anew a few times by ``1 / (1 + (error / 0.2)^2)`` (Cauchy weights; Holland and Welsch 1977,
doi:10.1080/03610927708827533), so that they do not bend the curve. They still count in the residual.

Left out: steps of the tile size and switches of a library between kernels; they stand in the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.profiler.cluster import Efficiency, KernelSample, Source

FloatArray = NDArray[np.float64]

MIN_SAMPLES = 4
LARGEST_HALF = 1e4  # half sizes above every sampled size are not told apart from a smaller share
SMALLEST_HALF = 1e-3
ITERATIONS = 200
REWEIGHTINGS = 4
OUTLIER_ERROR = 0.2  # in log time: about 20 %


def efficiency_share(
    m: FloatArray, n: FloatArray, k: FloatArray, max_share: float, half_m: float, half_n: float, half_k: float
) -> FloatArray:
    """Share of peak at each shape; arrays broadcast."""
    return np.asarray(max_share * m / (m + half_m) * n / (n + half_n) * k / (k + half_k))


def predicted_seconds(curve: Efficiency, samples: Sequence[KernelSample], memory_bytes_per_s: float) -> FloatArray:
    """Seconds that a curve gives for each sample; shape ``[len(samples)]``."""
    m, n, k, flops, num_bytes, _ = _columns(samples)
    share = efficiency_share(m, n, k, curve.max_share, curve.half_m, curve.half_n, curve.half_k)
    busy = np.maximum(flops / (share * curve.peak_flops_per_s), num_bytes / memory_bytes_per_s)
    return np.asarray(curve.overhead_s + busy)


def fit_efficiency(
    samples: Sequence[KernelSample],
    *,
    peak_flops_per_s: float,
    memory_bytes_per_s: float,
    source: Source,
) -> Efficiency:
    """The curve through samples of one operator in one dtype.

    ``half_m`` and ``half_k`` are held equal where ``m == k`` in every sample (attention): they cannot be told apart.
    ``residual`` is the median of ``|predicted / measured - 1|``. Raises ``InputError`` below four samples.
    """
    if len(samples) < MIN_SAMPLES:
        raise InputError(f"a curve needs at least {MIN_SAMPLES} samples, found {len(samples)}")
    m, n, k, flops, num_bytes, seconds = _columns(samples)
    tied = bool(np.all(m == k))
    floor = num_bytes / memory_bytes_per_s
    ideal = flops / peak_flops_per_s
    quickest = float(seconds.min())

    def model(theta: FloatArray) -> FloatArray:
        share, half_m, half_n, half_k, overhead = _unknowns(theta, tied)
        work = ideal / efficiency_share(m, n, k, share, half_m, half_n, half_k)
        return np.log(overhead + np.maximum(work, floor))

    lower, upper = _limits(tied, quickest)
    best: tuple[float, FloatArray] | None = None
    for half in (4.0, 64.0, 400.0):  # starts on either side of where devices lie
        start = _initial(half, tied, quickest, m, n, k, ideal, seconds)
        theta, error = _levenberg_marquardt(model, np.log(seconds), start, lower, upper)
        if best is None or error < best[0]:
            best = error, theta
    assert best is not None
    theta, target = best[1], np.log(seconds)
    for _ in range(REWEIGHTINGS):
        weights = 1 / (1 + ((model(theta) - target) / OUTLIER_ERROR) ** 2)
        theta, _ = _levenberg_marquardt(model, target, theta, lower, upper, np.sqrt(weights))
    share, half_m, half_n, half_k, overhead = _unknowns(theta, tied)
    relative = np.abs(np.exp(model(theta) - target) - 1)
    first = samples[0]
    return Efficiency(
        op=first.op,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        dtype=first.dtype,
        peak_flops_per_s=peak_flops_per_s,
        max_share=min(share, 1.0),
        half_m=half_m,
        half_n=half_n,
        half_k=half_k,
        overhead_s=overhead,
        residual=float(np.median(relative)),
        source=source,
    )


def best_rate(samples: Sequence[KernelSample]) -> float:
    """The highest FLOP/s among samples."""
    return max(sample.flops / sample.seconds for sample in samples)


def _columns(samples: Sequence[KernelSample]) -> tuple[FloatArray, ...]:
    names = ("m", "n", "k", "flops", "num_bytes", "seconds")
    return tuple(np.asarray([getattr(sample, name) for sample in samples], dtype=np.float64) for name in names)


def _unknowns(theta: FloatArray, tied: bool) -> tuple[float, float, float, float, float]:
    values = np.exp(theta)
    share, half_m, half_n, overhead = (float(value) for value in values[:4])
    return share, half_m, half_n, half_m if tied else float(values[4]), overhead


def _limits(tied: bool, quickest: float) -> tuple[FloatArray, FloatArray]:
    halves = 2 if tied else 3
    lower = [1e-3, SMALLEST_HALF, SMALLEST_HALF, 1e-9, *([SMALLEST_HALF] * (halves - 2))]
    upper = [1.0, LARGEST_HALF, LARGEST_HALF, quickest, *([LARGEST_HALF] * (halves - 2))]
    return np.log(lower), np.log(upper)


def _initial(
    half: float,
    tied: bool,
    quickest: float,
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
    ideal: FloatArray,
    seconds: FloatArray,
) -> FloatArray:
    overhead = quickest / 4
    work = ideal / efficiency_share(m, n, k, 1.0, half, half, half)
    share = float(np.clip(np.median(work / np.maximum(seconds - overhead, quickest / 4)), 0.02, 1.0))
    return np.log([share, half, half, overhead, *([] if tied else [half])])


def _levenberg_marquardt(
    model: Callable[[FloatArray], FloatArray],
    target: FloatArray,
    start: FloatArray,
    lower: FloatArray,
    upper: FloatArray,
    weights: FloatArray | float = 1.0,
) -> tuple[FloatArray, float]:
    """The unknowns that minimise the sum of squares of ``weights * (model - target)`` within limits, and that sum."""

    def errors(at: FloatArray) -> FloatArray:
        return np.asarray(weights * (model(at) - target))

    theta = np.clip(start, lower, upper)
    residual = errors(theta)
    error, damping = float(residual @ residual), 1e-2
    step_size = 1e-5
    for _ in range(ITERATIONS):
        columns = []
        for index in range(len(theta)):
            moved = theta.copy()
            moved[index] += step_size if theta[index] + step_size <= upper[index] else -step_size
            columns.append((errors(moved) - residual) / (moved[index] - theta[index]))
        jacobian = np.stack(columns, axis=1)
        normal = jacobian.T @ jacobian
        scale = np.diag(np.maximum(np.diag(normal), 1e-9))
        moved = np.clip(theta - np.linalg.solve(normal + damping * scale, jacobian.T @ residual), lower, upper)
        trial = errors(moved)
        trial_error = float(trial @ trial)
        if trial_error < error:
            gain = error - trial_error
            theta, residual, error = moved, trial, trial_error
            damping = max(damping / 3, 1e-9)
            if gain < 1e-10 * (error + 1e-12):
                break
        else:
            damping *= 4
            if damping > 1e8:
                break
    return theta, error
