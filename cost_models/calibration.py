"""Measured steps -> corrected constants: the fit behind ``meshwright calibrate`` and behind the presets.

The error of a run is ``log(predicted / measured)``, so that twice too slow weighs as much as twice too fast. The fit
minimises the sum of Cauchy's loss ``log(1 + (error / ROBUST)^2)``, under which runs that something else held up hardly
count, and of each constant's squared distance from its prior in units of its ``spread``, with scipy's ``least_squares``
(trust region, Branch, Coleman and Li 1999, doi:10.1137/S1064827595289108). Constants are fitted as logarithms; shares between 0 and 1
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.constants import Value

FloatArray = NDArray[np.float64]
ROBUST = 0.1


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted constants, and the error of every run (predicted / measured - 1) before and after."""

    values: tuple[Value, ...]
    before: FloatArray
    after: FloatArray


def fit(
    predict: Callable[[tuple[Value, ...]], FloatArray],
    measured_s: FloatArray,
    priors: Sequence[Value],
    weights: FloatArray | None = None,
    max_evaluations: int = 40,
) -> Fit:
    """Constants that bring ``predict(values)`` (seconds, shape of ``measured_s``) closest to what was measured.

    ``priors`` are the constants to fit with the values they have now. ``weights`` ``[num_runs]`` scale each run's error
    (1 where not given). With one run or a few, constants that it does not tell apart stay near their priors.
    """
    from scipy.optimize import least_squares  # half a second to import, and only fitting needs it

    measured = np.asarray(measured_s, dtype=np.float64)
    scale = np.ones_like(measured) if weights is None else np.asarray(weights, dtype=np.float64)
    constants = [value.constant for value in priors]
    linear = np.array([constant.lower == 0.0 for constant in constants])
    start = np.array([value.value for value in priors])
    lower, upper = (np.array([getattr(constant, end) for constant in constants]) for end in ("lower", "upper"))
    spread = np.log([constant.spread for constant in constants])

    def to_log(values: FloatArray) -> FloatArray:
        return np.where(linear, values, np.log(np.maximum(values, 1e-12)))

    def values_at(point: FloatArray) -> tuple[Value, ...]:
        numbers = np.where(linear, point, np.exp(np.where(linear, 0.0, point)))
        return tuple(
            Value(owner=prior.owner, of=prior.of, name=prior.name, value=float(number))
            for prior, number in zip(priors, numbers, strict=True)
        )

    origin = to_log(np.clip(start, lower, upper))

    def residuals(point: FloatArray) -> FloatArray:
        error = np.log(predict(values_at(point)) / measured) / ROBUST
        runs = np.sign(error) * np.sqrt(scale * np.log1p(error**2))  # whose square is the loss
        return np.concatenate([runs, (point - origin) / spread])

    bounds = (to_log(lower) - 1e-9, to_log(upper) + 1e-9)
    found = least_squares(
        residuals, origin, bounds=bounds, x_scale=spread, diff_step=1e-3, max_nfev=max_evaluations, method="trf"
    )
    values = values_at(found.x)
    before, after = predict(tuple(priors)), predict(values)
    return Fit(values, before / measured - 1.0, after / measured - 1.0)
