"""Predictions against published step times of PyTorch FSDP: llm-foundry's MPT benchmarks and torchtitan's.

The rows stand in the measurements folder (``MESHWRIGHT_VALIDATION``, by default ``../shared/validation``). Bounds are
those that the accuracy page promises; before devices are calibrated on any measured step (no ``calibrated.json`` among
the presets) they are what curves and datasheets reach alone.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from meshwright.cost_models.scorecard import Scorecard, validate
from meshwright.profiler.cluster_presets import CALIBRATED

FOLDER = Path(os.environ.get("MESHWRIGHT_VALIDATION", Path(__file__).parents[2] / ".." / "shared" / "validation"))

# tables of torchtitan's benchmarks in which one thing differs, the faster run first: interleaved before 1F1B (llama3.1
# 405B on 512 GPUs), asynchronous tp before plain, one scale a tensor before one a row (llama3 70B and 8B, tp 8)
FASTER = (
    ("torchtitan-0014", "torchtitan-0013"),
    ("torchtitan-0012", "torchtitan-0011"),
    ("torchtitan-0022", "torchtitan-0021"),
    ("torchtitan-0024", "torchtitan-0023"),
    ("torchtitan-0028", "torchtitan-0027"),
    ("torchtitan-0021", "torchtitan-0023"),
    ("torchtitan-0027", "torchtitan-0029"),
    ("torchtitan-0040", "torchtitan-0041"),
)


@cache
def scorecard(family: str) -> Scorecard:
    file = FOLDER / "dev.csv"
    if not file.exists():
        pytest.skip(f"no published measurements at {file}: set MESHWRIGHT_VALIDATION to their folder")
    return validate(file, family=family)


@pytest.mark.parametrize(
    ("family", "rows", "calibrated", "plain"), [("mosaicml_llmfoundry", 130, 0.07, 0.15), ("torchtitan", 25, 0.1, 0.25)]
)
def test_median_error(family: str, rows: int, calibrated: float, plain: float) -> None:
    part = scorecard(family).parts[0]
    assert part.errors is not None
    print(f"{family}: {part.errors.rows} rows, median {part.errors.median:.1%}, mean {part.errors.mean:.1%}")
    assert part.errors.rows >= rows
    assert part.errors.median <= (calibrated if CALIBRATED.exists() else plain)


def test_no_run_of_llm_foundry_is_called_out_of_memory() -> None:
    memory = scorecard("mosaicml_llmfoundry").parts[0].memory
    assert memory is not None
    assert (memory.succeeded, memory.succeeded_called_out) == (130, 0)


@pytest.mark.parametrize(("faster", "slower"), FASTER)
def test_order_of_torchtitans_choices(faster: str, slower: str) -> None:
    predicted = {row.row_id: row.predicted_step_s for row in scorecard("torchtitan").rows}
    first, second = predicted[faster], predicted[slower]
    assert first is not None and second is not None
    assert first < second
