"""Cells: plans for one model on one cluster, measured and predicted; how well the order of the plans was predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.published import PublishedRun
from meshwright.profiler.record import record

MIN_PLANS = 4  # a cell of fewer says little of an order
CLOSE = 1.05  # a pick that costs at most this much more than the best is as good as the best
FIRST = 3


@record
class Plan:
    """One plan of a cell; ``measured_s`` is the median of its repeats."""

    row_ids: tuple[str, ...]
    description: str
    measured_s: float
    predicted_s: float


@record
class Cell:
    """Plans from the predicted fastest to the slowest. Times over the best measured one; 1 is the best.

    ``regret`` is that of the plan predicted fastest, ``regret_of_three`` the best of the first three.
    """

    key: tuple[str, ...]
    plans: tuple[Plan, ...]
    regret: float
    regret_of_three: float
    spearman: float


@record
class CellScore:
    """Over the cells of a part; regrets are geometric means, ``close`` the share of picks within ``CLOSE``."""

    cells: int
    plans: int
    spearman: float  # median
    regret: float
    worst: float
    close: float
    regret_of_three: float


def score_cells(
    runs: Iterable[tuple[PublishedRun, float, float | None]],
) -> tuple[tuple[Cell, ...], CellScore | None]:
    """Cells of ``(run, measured seconds, predicted seconds)``, and their summary: ``None`` without any."""
    by_cell: dict[tuple[str, ...], dict[object, list[tuple[PublishedRun, float, float]]]] = {}
    for run, measured, predicted in runs:
        if predicted is not None:
            plan = (run.config, run.counts, run.plan)
            by_cell.setdefault(run.cell, {}).setdefault(plan, []).append((run, measured, predicted))
    cells = tuple(_cell(key, list(plans.values())) for key, plans in by_cell.items() if len(plans) >= MIN_PLANS)
    if not cells:
        return (), None
    regrets = np.array([cell.regret for cell in cells])
    return cells, CellScore(
        cells=len(cells),
        plans=sum(len(cell.plans) for cell in cells),
        spearman=float(np.median([cell.spearman for cell in cells])),
        regret=geometric_mean(regrets),
        worst=float(regrets.max()),
        close=float(np.mean(regrets <= CLOSE)),
        regret_of_three=geometric_mean(np.array([cell.regret_of_three for cell in cells])),
    )


def _cell(key: tuple[str, ...], repeats: Sequence[Sequence[tuple[PublishedRun, float, float]]]) -> Cell:
    plans = [
        Plan(
            row_ids=tuple(run.row_id for run, _, _ in runs),
            description=runs[0][0].config.describe(),
            measured_s=float(np.median([measured for _, measured, _ in runs])),
            predicted_s=runs[0][2],
        )
        for runs in repeats
    ]
    plans.sort(key=lambda plan: (plan.predicted_s, -plan.measured_s))
    measured = np.array([plan.measured_s for plan in plans])
    return Cell(
        key=key,
        plans=tuple(plans),
        regret=float(measured[0] / measured.min()),
        regret_of_three=float(measured[:FIRST].min() / measured.min()),
        spearman=rank_correlation([plan.predicted_s for plan in plans], measured),
    )


def rank_correlation(
    first: Sequence[float] | NDArray[np.float64], second: Sequence[float] | NDArray[np.float64]
) -> float:
    """Spearman's coefficient: Pearson's of the ranks, ties share the mean of theirs; 0 where a side has no order."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(((last - counts + 1 + last) / 2.0)[inverse])


def geometric_mean(values: NDArray[np.float64]) -> float:
    """Of positive numbers, at least one."""
    return float(np.exp(np.mean(np.log(values))))
