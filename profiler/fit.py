"""Samples of kernels -> efficiency curves, by least squares on the logarithm of time, with the residual kept.

The curve is ``Efficiency``, its form that of ``profiler/efficiency.py``: hyperbolic in each size on a CPU; on a GPU,
which says how many multiprocessors it has, tiles and waves for matmuls, waves and head size for attention. The
logarithm of time is minimised with the method of Levenberg and Marquardt (Marquardt 1963, doi:10.1137/0111030) over
the logarithms of the unknowns, which keeps them positive; ``max_share`` is held at or below 1. The curve grows with
each size, so predictions are monotone by its form.

A sample that another process disturbed, or that ran into a cliff of the allocator, is off by far more than the others:
samples are weighted anew a few times by ``1 / (1 + (error / 0.2)^2)`` (Cauchy weights; Holland and Welsch 1977,
doi:10.1080/03610927708827533), so that they do not bend the curve. They still count in the residual.

Left out: switches of a library between kernels; they stand in the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.profiler.cluster import Efficiency, KernelSample, Source
from meshwright.profiler.efficiency import kernel_seconds

FloatArray = NDArray[np.float64]

MIN_SAMPLES = 4
ITERATIONS = 200
REWEIGHTINGS = 4
OUTLIER_ERROR = 0.2  # in log time: about 20 %
LIMITS = {
    "max_share": (1e-3, 1.0),
    "half_m": (1e-3, 1e4),  # half sizes above every sampled size are not told apart from a smaller share
    "half_n": (1e-3, 1e4),
    "half_k": (1e-3, 1e4),
    "tile_exponent": (1e-3, 1.0),  # from bound by FLOPs to bound by reading
    "half_waves": (1e-3, 8.0),
    "head_exponent": (1e-3, 1.0),
}
STARTS = ((4.0, 0.9), (64.0, 0.5), (400.0, 0.2))  # half sizes and tile exponents, on either side of where devices lie


def predicted_seconds(
    curve: Efficiency,
    samples: Sequence[KernelSample],
    memory_bytes_per_s: float,
    num_multiprocessors: int | None = None,
) -> FloatArray:
    """Seconds that a curve gives for each sample; shape ``[len(samples)]``."""
    return _seconds(curve, _columns(samples), memory_bytes_per_s, num_multiprocessors)


def fit_efficiency(
    samples: Sequence[KernelSample],
    *,
    peak_flops_per_s: float,
    memory_bytes_per_s: float,
    source: Source,
    num_multiprocessors: int | None = None,
    weights: Sequence[float] | FloatArray | None = None,
    fixed: dict[str, float] | None = None,
) -> Efficiency:
    """The curve through samples of one operator in one dtype.

    Without ``num_multiprocessors`` the unknowns are ``max_share``, the half sizes and ``overhead_s``; ``half_m`` and
    ``half_k`` are held equal where ``m == k`` in every sample (attention): they cannot be told apart. With it a matmul
    has ``max_share``, ``tile_exponent``, ``half_k``, ``overhead_s``, and attention ``max_share``, ``half_k``,
    ``half_waves``, ``head_exponent`` (where heads differ in size), ``overhead_s``. ``fixed`` fields are given instead
    of fitted; ``weights`` (of squared errors, 1 each by default) say which samples matter.
    ``residual`` is the median of ``|predicted / measured - 1|``. Raises ``InputError`` below four samples.
    """
    if len(samples) < MIN_SAMPLES:
        raise InputError(f"a curve needs at least {MIN_SAMPLES} samples, found {len(samples)}")
    columns, first = _columns(samples), samples[0]
    given = fixed or {}
    template = Efficiency(
        op=first.op,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        dtype=first.dtype,
        peak_flops_per_s=peak_flops_per_s,
        max_share=1.0,
        source=source,
        **given,
    )
    tied = num_multiprocessors is None and bool(np.all(columns["m"] == columns["k"]))
    names = [name for name in _unknowns(columns, first.op, tied, num_multiprocessors) if name not in given]
    target = np.log(columns["seconds"])
    quickest = float(columns["seconds"].min())
    limits = LIMITS | {"overhead_s": (1e-9, quickest)}
    lower, upper = (np.log([limits[name][side] for name in names]) for side in (0, 1))

    def curve_at(theta: FloatArray) -> Efficiency:
        values = dict(zip(names, (float(value) for value in np.exp(theta)), strict=True))
        if tied:
            values["half_k"] = values["half_m"]
        return replace(template, **values)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def model(theta: FloatArray) -> FloatArray:
        return np.log(_seconds(curve_at(theta), columns, memory_bytes_per_s, num_multiprocessors))

    importance = np.ones(len(samples)) if weights is None else np.asarray(weights, dtype=np.float64)
    best: tuple[float, FloatArray] | None = None
    for half, exponent in STARTS:
        start = np.log(_initial(names, half, exponent, quickest, template, columns))
        theta, error = _levenberg_marquardt(model, target, start, lower, upper, np.sqrt(importance))
        if best is None or error < best[0]:
            best = error, theta
    assert best is not None
    theta = best[1]
    for _ in range(REWEIGHTINGS):
        doubt = 1 / (1 + ((model(theta) - target) / OUTLIER_ERROR) ** 2)
        theta, _ = _levenberg_marquardt(model, target, theta, lower, upper, np.sqrt(importance * doubt))
    curve = curve_at(theta)
    relative = np.abs(np.exp(model(theta) - target) - 1)
    return replace(curve, max_share=min(curve.max_share, 1.0), residual=float(np.median(relative)))


def best_rate(samples: Sequence[KernelSample]) -> float:
    """The highest FLOP/s among samples."""
    return max(sample.flops / sample.seconds for sample in samples)


def _columns(samples: Sequence[KernelSample]) -> dict[str, FloatArray]:
    names = ("m", "n", "k", "flops", "num_bytes", "seconds")
    columns = {name: np.asarray([getattr(sample, name) for sample in samples], dtype=np.float64) for name in names}
    passes = np.array([2.5 if sample.op.startswith("attention_backward") else 1.0 for sample in samples])
    # causal attention is 4 head_dim FLOPs for each pair of query and key that the mask keeps
    pairs = columns["m"] * (columns["m"] + 1) / 2
    columns["head_dim"] = columns["flops"] / (passes * 4 * columns["n"] * pairs)
    return columns


def _seconds(
    curve: Efficiency, columns: dict[str, FloatArray], memory_bytes_per_s: float, num_multiprocessors: int | None
) -> FloatArray:
    return kernel_seconds(
        curve,
        num_multiprocessors=num_multiprocessors,
        memory_bytes_per_s=memory_bytes_per_s,
        flops=columns["flops"],
        num_bytes=columns["num_bytes"],
        m=columns["m"],
        n=columns["n"],
        k=columns["k"],
        head_dim=columns["head_dim"],
    )


def _unknowns(columns: dict[str, FloatArray], op: str, tied: bool, num_multiprocessors: int | None) -> list[str]:
    if num_multiprocessors is None:
        return ["max_share", "half_m", "half_n", "overhead_s", *([] if tied else ["half_k"])]
    if op.startswith("attention"):
        heads = columns["head_dim"]
        differ = heads.max() > 1.01 * heads.min()
        return ["max_share", "half_k", "half_waves", *(["head_exponent"] if differ else []), "overhead_s"]
    return ["max_share", "tile_exponent", "half_k", "overhead_s"]


def _initial(
    names: Sequence[str],
    half: float,
    exponent: float,
    quickest: float,
    template: Efficiency,
    columns: dict[str, FloatArray],
) -> list[float]:
    """A guess: half sizes as given, a quarter of the quickest sample as overhead, and the share that is then left."""
    overhead = template.overhead_s or quickest / 4
    work = columns["flops"] / template.peak_flops_per_s
    for size in ("m", "n", "k"):
        if f"half_{size}" in names:
            work = work * (columns[size] + half) / columns[size]
    share = float(np.clip(np.median(work / np.maximum(columns["seconds"] - overhead, quickest / 4)), 0.02, 1.0))
    known = {"max_share": share, "overhead_s": overhead, "tile_exponent": exponent}
    known |= {"half_waves": 0.5, "head_exponent": 0.3}
    return [known.get(name, half) for name in names]


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
