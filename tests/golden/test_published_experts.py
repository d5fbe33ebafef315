"""Predictions against published steps of models with experts: Megatron-Bridge, NeMo's benchmarks, parallel folding.

Rows stand in the measurements folder, as for ``test_published_steps``. How each recipe runs experts is
``cost_models/published_recipes.py``; no constant is fitted to a model.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshwright.cost_models.scorecard import Part, validate

FOLDER = Path(os.environ.get("MESHWRIGHT_VALIDATION", Path(__file__).parents[2] / ".." / "shared" / "validation"))
BOUNDS = {  # median and mean error of the step, or of the utilisation
    ("megatron_bridge", "MoE"): (0.12, 0.15),
    ("dgxc_benchmarking", "MoE"): (0.12, 0.15),
    ("moe_parallel_folding", "MoE, utilisation"): (0.08, 0.09),
}


@pytest.mark.parametrize(("family", "name"), BOUNDS)
def test_errors_of_experts(family: str, name: str) -> None:
    file = FOLDER / "dev.csv"
    if not file.exists():
        pytest.skip(f"no published measurements at {file}: set MESHWRIGHT_VALIDATION to their folder")
    part: Part = next(part for part in validate(file, family=family).parts if part.name == name)
    assert part.errors is not None and part.errors.rows >= 18
    print(f"{family}: {part.errors.rows} rows, median {part.errors.median:.1%}, mean {part.errors.mean:.1%}")
    median, mean = BOUNDS[family, name]
    assert part.errors.median <= median and part.errors.mean <= mean
