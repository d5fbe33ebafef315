"""The fit: constants found again from runs made with them, priors that hold what runs do not tell, runs held up."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from meshwright.cost_models.calibration import ROBUST, fit
from meshwright.cost_models.constants import Value

FLOPS, CALLS = np.array([1.0, 2.0, 4.0, 8.0, 3.0]), np.array([5.0, 1.0, 2.0, 9.0, 0.0])
PRIORS = (
    Value(owner="device", of="gpu", name="matmul_factor", value=1.0),
    Value(owner="target", of="meshwright", name="host.hop_s", value=1e-2),
    Value(owner="target", of="meshwright", name="overlap_tp", value=0.5),
)


def predict(values: tuple[Value, ...]) -> NDArray[np.float64]:
    """Seconds of five runs: FLOPs at a factor and calls; the share that overlaps changes none of them."""
    factor, call, _ = (each.value for each in values)
    return factor * FLOPS + call * CALLS


def true(factor: float, call: float) -> NDArray[np.float64]:
    return factor * FLOPS + call * CALLS


def test_constants_are_found_again_and_what_is_not_told_stays() -> None:
    found = fit(predict, true(1.2, 0.03), PRIORS, weights=np.full(5, 100.0))
    factor, call, overlap = (each.value for each in found.values)
    assert factor == pytest.approx(1.2, rel=0.01)
    assert call == pytest.approx(0.03, rel=0.05)
    assert overlap == 0.5
    assert found.told[0] > 100 and found.told[2] == 0.0
    assert np.abs(found.after).max() < 0.005 < np.abs(found.before).max()


def test_errors_are_of_the_priors_and_of_the_fit() -> None:
    measured = true(1.2, 0.03)
    found = fit(predict, measured, PRIORS)
    np.testing.assert_allclose(found.before, predict(PRIORS) / measured - 1)
    np.testing.assert_allclose(found.after, predict(found.values) / measured - 1)


def test_one_run_moves_each_constant_by_what_its_spread_allows() -> None:
    found = fit(lambda values: values[0].value * values[1].value * np.ones(1), np.array([1.3e-2]), PRIORS[:2])
    moved = [np.log(after.value / before.value) for before, after in zip(PRIORS, found.values, strict=False)]
    spreads = [np.log(prior.constant.spread) for prior in PRIORS[:2]]
    # least squares of a sum: each gives way by its spread squared
    assert moved[1] / moved[0] == pytest.approx((spreads[1] / spreads[0]) ** 2, rel=0.08)


def test_a_run_that_was_held_up_hardly_counts() -> None:
    held_up = true(1.1, 0.02)
    held_up[2] *= 5.0
    found = fit(predict, held_up, PRIORS, weights=np.full(5, 10.0))
    assert found.values[0].value == pytest.approx(1.1, rel=0.02)
    assert found.after[2] == pytest.approx(-0.8, abs=0.02)


def test_bounds_spreads_and_starts_of_ones_own() -> None:
    narrow = fit(predict, true(1.2, 0.03), PRIORS, spreads=(1.0001, 3.0, 1.5))
    assert narrow.values[0].value == pytest.approx(1.0, rel=1e-3)
    capped = fit(predict, true(1.2, 0.03), PRIORS, weights=np.full(5, 100.0), uppers=(1.1, 1.0, 1.0))
    assert capped.values[0].value == pytest.approx(1.1, rel=1e-4)
    elsewhere = fit(predict, true(1.2, 0.03), PRIORS, weights=np.full(5, 100.0), start=(0.8, 0.5, 0.5))
    assert elsewhere.values[1].value == pytest.approx(0.03, rel=0.05)


def test_the_loss_is_cauchys_and_the_priors() -> None:
    fixed = fit(predict, true(1.0, 1e-2) * np.e**0.2, PRIORS, spreads=(1 + 1e-9,) * 3)
    assert fixed.loss == pytest.approx(5 * np.log1p((0.2 / ROBUST) ** 2), rel=1e-3)


def test_all_constants_may_be_moved_in_one_call() -> None:
    calls = 0

    def each(values: tuple[Value, ...], moved: tuple[Value, ...]) -> NDArray[np.float64]:
        nonlocal calls
        calls += 1
        return np.array([predict((*values[:i], value, *values[i + 1 :])) for i, value in enumerate(moved)])

    alone = fit(predict, true(1.2, 0.03), PRIORS)
    together = fit(predict, true(1.2, 0.03), PRIORS, predict_each=each)
    assert together.values == alone.values
    assert calls > 0
