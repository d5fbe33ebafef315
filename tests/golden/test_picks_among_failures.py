"""Memory of nanotron's published runs: peaks, failures seen, and first choices with the runs that failed put back.

The rows stand in the measurements folder (``MESHWRIGHT_VALIDATION``, by default ``../shared/validation``). On the same
cells Calculon's first choice is a run that failed in 54 %, that of Megatron's rules in 38 %.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from meshwright.cost_models.scorecard import Part, validate

FOLDER = Path(os.environ.get("MESHWRIGHT_VALIDATION", Path(__file__).parents[2] / ".." / "shared" / "validation"))


@cache
def parts() -> dict[str, Part]:
    file = FOLDER / "dev.csv"
    if not file.exists():
        pytest.skip(f"no published measurements at {file}: set MESHWRIGHT_VALIDATION to their folder")
    return {part.name: part for part in validate(file, family="nanotron_ultrascale").parts}


def test_peaks_and_failures() -> None:
    memory = parts()["dense"].memory
    assert memory is not None and memory.peak is not None
    assert memory.peak.rows == memory.succeeded == 1070
    assert memory.peak.median <= 0.06
    assert memory.succeeded_called_out == 0
    assert memory.failed == 819
    assert memory.failed_called_out >= 0.78 * memory.failed  # peers see 71 % to 74 %
    assert memory.failed - memory.failed_recommended >= 0.85 * memory.failed


def test_first_choices_run_and_are_fast() -> None:
    picks = parts()["dense"].picks
    assert picks is not None and picks.regret is not None
    assert (picks.cells, picks.candidates, picks.picks) == (17, 1871, 17)
    assert picks.failed <= 0.15 * picks.picks
    assert picks.regret <= 1.20


def test_first_choices_of_todays_code() -> None:
    # 64 nodes were measured with code that holds every micro-batch up
    picks = parts()["without 64 nodes"].picks
    assert picks is not None and picks.regret is not None
    assert picks.cells == 13 and picks.failed <= 0.15 * picks.picks
    assert picks.regret <= 1.15
