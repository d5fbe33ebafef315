"""Measured steps -> corrected constants: the fit behind ``meshwright calibrate`` and behind the presets.

The error of a run is ``log(predicted / measured)``, so that twice too slow weighs as much as twice too fast. The fit
minimises the sum of Cauchy's loss ``log(1 + (error / robust)^2)``, under which runs that something else held up hardly
count, and of each constant's squared distance from its prior in units of its ``spread``, with scipy's ``least_squares``
(trust region, Branch, Coleman and Li 1999, doi:10.1137/S1064827595289108). Constants are fitted as logarithms; shares
between 0 and 1 as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.constants import Value

FloatArray = NDArray[np.float64]
ROBUST = 0.1
STEP = 0.02  # of a finite difference, in spreads

Predict = Callable[[tuple[Value, ...]], FloatArray]  # -> seconds [num_runs]
# values, each of them moved a little -> seconds with that one alone moved [num_values, num_runs]
PredictEach = Callable[[tuple[Value, ...], tuple[Value, ...]], FloatArray]


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted constants, and the error of every run (predicted / measured - 1) before and after.

    ``told`` is what the runs say of each constant beside what its prior says: the sum over runs of the squared change
    of its residual for one ``spread``. Below 1 the prior says more. ``loss`` is what was minimised, priors included.
    """

    values: tuple[Value, ...]
    before: FloatArray
    after: FloatArray
    told: FloatArray
    loss: float


def fit(
    predict: Predict,
    measured_s: FloatArray,
    priors: Sequence[Value],
    weights: FloatArray | None = None,
    max_evaluations: int = 40,
    *,
    spreads: Sequence[float] | None = None,
    uppers: Sequence[float] | None = None,
    start: Sequence[float] | None = None,
    robust: float = ROBUST,
    predict_each: PredictEach | None = None,
) -> Fit:
    """Constants that bring ``predict(values)`` (seconds, shape of ``measured_s``) closest to what was measured.

    ``priors`` are the constants to fit with the values they have now; ``spreads`` and ``uppers`` stand in for those of
    their kinds. ``weights`` ``[num_runs]`` scale each run's loss (1 where not given). ``start`` is where to search
    from, in place of the priors; ``robust`` the error from which on a run counts less. ``predict_each`` may do better
    than one call of ``predict`` for each constant. With one run or a few, constants that it does not tell apart stay
    near their priors.
    """
    # half a second to import, and only fitting needs it
    from scipy.optimize import least_squares  # type: ignore[import-untyped]

    measured = np.asarray(measured_s, dtype=np.float64)
    scale = np.ones_like(measured) if weights is None else np.asarray(weights, dtype=np.float64)
    space = _Space(tuple(priors), spreads, uppers)
    each = predict_each or _one_by_one(predict)

    def runs(seconds: FloatArray) -> FloatArray:
        error = np.log(seconds / measured) / robust
        return np.sign(error) * np.sqrt(scale * np.log1p(error**2))  # whose square is the loss

    def residuals(point: FloatArray) -> FloatArray:
        return np.concatenate([runs(predict(space.values(point))), (point - space.origin) / space.spread])

    def slopes(point: FloatArray) -> FloatArray:
        """Of the runs' residuals: ``[num_runs, num_values]``."""
        values = space.values(point)
        step = np.where(point + STEP * space.spread <= space.upper, STEP, -STEP) * space.spread
        moved = each(values, space.values(point + step))
        return np.asarray((runs(moved) - runs(predict(values))).T / step)

    def jacobian(point: FloatArray) -> FloatArray:
        return np.concatenate([slopes(point), np.diag(1.0 / space.spread)])

    found = least_squares(
        residuals,
        np.clip(space.origin if start is None else space.point(start), space.lower + 1e-9, space.upper - 1e-9),
        jac=jacobian,  # pyright: ignore[reportArgumentType]  (stubs know its names alone)
        bounds=(space.lower, space.upper),
        x_scale=space.spread,
        ftol=1e-4,
        xtol=1e-4,
        max_nfev=max_evaluations,
    )
    values = space.values(found.x)
    told = ((found.jac[: len(measured)] * space.spread) ** 2).sum(axis=0)
    before, after = predict(tuple(priors)), predict(values)
    return Fit(values, before / measured - 1.0, after / measured - 1.0, told, 2.0 * float(found.cost))


class _Space:
    """Where constants are searched: logarithms, but for shares that may be 0."""

    def __init__(
        self, priors: tuple[Value, ...], spreads: Sequence[float] | None, uppers: Sequence[float] | None
    ) -> None:
        self.priors = priors
        constants = [prior.constant for prior in priors]
        self.linear = np.array([constant.lower == 0.0 for constant in constants])
        self.spread = np.log(np.array(spreads if spreads is not None else [each.spread for each in constants]))
        upper = np.array(uppers if uppers is not None else [each.upper for each in constants], dtype=np.float64)
        lower = np.array([constant.lower for constant in constants])
        self.lower, self.upper = self.point(lower) - 1e-6, self.point(upper) + 1e-6
        self.origin = self.point(np.clip([prior.value for prior in priors], lower, upper))

    def point(self, numbers: Sequence[float] | FloatArray) -> FloatArray:
        """Where a constant of each value is."""
        return np.where(self.linear, numbers, np.log(np.maximum(numbers, 1e-12)))

    def values(self, point: FloatArray) -> tuple[Value, ...]:
        """The constants at a point."""
        numbers = np.where(self.linear, np.maximum(point, 0.0), np.exp(np.where(self.linear, 0.0, point)))
        return tuple(replace(prior, value=float(value)) for prior, value in zip(self.priors, numbers, strict=True))


def _one_by_one(predict: Predict) -> PredictEach:
    def each(values: tuple[Value, ...], moved: tuple[Value, ...]) -> FloatArray:
        return np.array([predict((*values[:i], value, *values[i + 1 :])) for i, value in enumerate(moved)])

    return each
