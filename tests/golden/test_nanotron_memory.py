"""nanotron's published peaks part by part, and the steps of its runs whose ranks meet before each collective.

The rows stand in the measurements folder (``MESHWRIGHT_VALIDATION``, by default ``../shared/validation``). Bounds of
the whole family and of first choices: ``test_picks_among_failures.py``.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from meshwright.cost_models.published import Predictions, PublishedRun, grouped, predict, read_published

FOLDER = Path(os.environ.get("MESHWRIGHT_VALIDATION", Path(__file__).parents[2] / ".." / "shared" / "validation"))


@cache
def predicted() -> tuple[tuple[PublishedRun, ...], Predictions]:
    file = FOLDER / "dev.csv"
    if not file.exists():
        pytest.skip(f"no published measurements at {file}: set MESHWRIGHT_VALIDATION to their folder")
    runs = read_published(file).only("nanotron_ultrascale").runs
    return runs, predict(grouped(runs))


def median_peak_error(rows: list[bool]) -> float:
    runs, found = predicted()
    reserved = (found.peak_bytes + found.fragmentation_bytes).astype(np.float64)
    measured = np.array([run.measured.peak_bytes or np.nan for run in runs])
    chosen = np.array(rows) & np.isfinite(measured)
    assert chosen.sum() >= 50
    return float(np.median(np.abs(reserved[chosen] / measured[chosen] - 1.0)))


@pytest.mark.parametrize("pp", [1, 2, 4, 8, 16])
def test_peaks_by_pipeline(pp: int) -> None:
    assert median_peak_error([run.config.pp == pp for run in predicted()[0]]) <= 0.08


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16, 32])
def test_peaks_by_tensor_parallelism(tp: int) -> None:
    assert median_peak_error([run.config.tp == tp for run in predicted()[0]]) <= 0.08


@pytest.mark.parametrize("size", ["1.34B", "3.57B", "8.86B", "80B"])
def test_peaks_by_model(size: str) -> None:
    assert median_peak_error([run.model.name.endswith(f"-{size}") for run in predicted()[0]]) <= 0.07


@pytest.mark.parametrize("target", ["nanotron", "nanotron-2024"])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_peaks_by_target_and_sharding(target: str, zero_stage: int) -> None:
    runs = predicted()[0]
    rows = [run.framework == target and run.config.zero_stage == zero_stage for run in runs]
    assert median_peak_error(rows) <= 0.07


def test_no_more_tensors_than_an_allocator_reserved() -> None:
    # what a peak counts is of the first stage, which is not always the fullest
    runs, found = predicted()
    measured = np.array([run.measured.peak_bytes or np.nan for run in runs])
    over = found.peak_bytes / measured > 1.03
    assert over.sum() <= 0.02 * np.isfinite(measured).sum()


def test_steps_of_ranks_that_meet() -> None:
    runs, found = predicted()
    measured = np.array([run.measured.step_s or np.nan for run in runs])
    errors = np.abs(found.step_s / measured - 1.0)
    timed = np.isfinite(measured) & np.array([run.framework == "nanotron-2024" for run in runs])
    pipelined = timed & np.array([run.config.pp > 1 for run in runs])
    assert timed.sum() == 334 and pipelined.sum() == 260
    assert float(np.median(errors[timed])) <= 0.05
    assert float(np.median(errors[pipelined])) <= 0.03
