"""Memory in the scorecard: errors of peaks, who is called out of memory, and whether picks among failures ran.

A peak is compared with what its source counts: *allocated* with the predicted tensors, *reserved* with those and the
allocator's fragmentation, *device* with the context besides, and one that does not say with the tensors.

**Picks among failures.** A cell's candidates are its runs that ran and its runs that failed. The pick is the one
predicted fastest of those recommended; of equal predictions one that failed, so that no order helps. Repeats of a
configuration are one candidate, which failed if none of them ran: what ran once can be trained, and sources that do not
tell a crash from memory run out of have crashes that are no plan's fault. Cells of ``MIN_PLANS`` candidates or more
count, also those where nothing ran; where nothing is recommended there is no pick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost_models.published import PublishedRun
from meshwright.cost_models.published_hardware import cluster_named
from meshwright.cost_models.published_measured import PeakKind
from meshwright.cost_models.scorecard_cells import MIN_PLANS, geometric_mean
from meshwright.cost_models.scorecard_rows import ErrorScore, RowScore, error_score
from meshwright.profiler.record import record

RAN = ("ok", "memory_only")
OOM = "oom"
FAILED = "failed_unspecified"  # a crash or memory run out, which the source does not tell apart


@record
class Pick:
    """The first choice in a cell; ``None`` for everything after ``recommended`` where nothing is recommended.

    ``regret`` is the pick's measured seconds over those of the best candidate, ``None`` when the pick failed.
    """

    key: tuple[str, ...]
    candidates: int
    failed: int
    recommended: int
    row_ids: tuple[str, ...] | None = None
    description: str | None = None
    pick_failed: bool | None = None
    regret: float | None = None


@record
class PickScore:
    """Over cells with failures put back: ``picks`` of them have a pick, of which ``failed`` failed.

    ``regret`` is the geometric mean over the cells whose pick ran, ``worst`` the largest of them.
    """

    cells: int
    candidates: int
    picks: int
    failed: int
    regret: float | None
    worst: float | None


@record
class MemoryScore:
    """``peak``: over runs that ran, with a measured peak. Counts are rows; ``called_out`` are predicted not to fit."""

    peak: ErrorScore | None
    succeeded: int
    succeeded_called_out: int
    succeeded_recommended: int
    failed: int  # crashed or ran out of memory: the source does not say
    failed_called_out: int
    failed_recommended: int
    oom: int  # ran out of memory
    oom_called_out: int
    oom_recommended: int


def compared_peak(run: PublishedRun, tensors: int, fragmentation: int) -> int:
    """The predicted bytes that a run's measured peak is compared with."""
    if run.measured.peak_kind is PeakKind.DEVICE:
        return tensors + fragmentation + cluster_named(run.cluster).device.reserved_bytes
    return tensors + fragmentation if run.measured.peak_kind is PeakKind.RESERVED else tensors


def _worked_out(run: PublishedRun) -> bool:
    """Whether the peak is more than the device has: a paper's sum of what would be needed, which nobody ran."""
    return (run.measured.peak_bytes or 0.0) > cluster_named(run.cluster).device.memory_bytes


def score_memory(runs: Sequence[PublishedRun], rows: Mapping[str, RowScore]) -> MemoryScore | None:
    """Of runs that are predicted, with their rows by id; ``None`` where none says whether it ran."""
    said = [run for run in runs if run.status in RAN and run.has_measurement]
    ran, held = [rows[run.row_id] for run in said], [rows[run.row_id] for run in said if not _worked_out(run)]
    failed = [rows[run.row_id] for run in runs if run.status == FAILED]
    oom = [rows[run.row_id] for run in runs if run.status == OOM]
    if not ran and not failed and not oom:
        return None
    return MemoryScore(
        peak=error_score([row.peak_error for row in ran if row.peak_error is not None]),
        succeeded=len(held),
        succeeded_called_out=sum(not row.fits for row in held),
        succeeded_recommended=sum(bool(row.recommended) for row in held),
        failed=len(failed),
        failed_called_out=sum(not row.fits for row in failed),
        failed_recommended=sum(bool(row.recommended) for row in failed),
        oom=len(oom),
        oom_called_out=sum(not row.fits for row in oom),
        oom_recommended=sum(bool(row.recommended) for row in oom),
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    row_ids: tuple[str, ...]
    description: str
    predicted_s: float
    measured_s: float | None  # None: it failed
    recommended: bool


def score_picks(
    runs: Iterable[PublishedRun], rows: Mapping[str, RowScore]
) -> tuple[tuple[Pick, ...], PickScore | None]:
    """The pick of every cell that has failures or runs enough, and their summary; none where nothing failed."""
    cells: dict[tuple[str, ...], dict[object, list[PublishedRun]]] = {}
    for run in runs:
        if run.measured.step_s is not None or run.status in (OOM, FAILED):
            cells.setdefault(run.cell, {}).setdefault((run.config, run.counts, run.plan), []).append(run)
    candidates = {
        key: [_candidate(repeats, rows) for repeats in plans.values()]
        for key, plans in cells.items()
        if len(plans) >= MIN_PLANS
    }
    if not any(each.measured_s is None for plans in candidates.values() for each in plans):
        return (), None
    picks = tuple(_pick(key, plans) for key, plans in candidates.items())
    regrets = np.array([pick.regret for pick in picks if pick.regret is not None])
    return picks, PickScore(
        cells=len(picks),
        candidates=sum(pick.candidates for pick in picks),
        picks=sum(pick.pick_failed is not None for pick in picks),
        failed=sum(bool(pick.pick_failed) for pick in picks),
        regret=geometric_mean(regrets) if len(regrets) else None,
        worst=float(regrets.max()) if len(regrets) else None,
    )


def _candidate(repeats: Sequence[PublishedRun], rows: Mapping[str, RowScore]) -> _Candidate:
    first = rows[repeats[0].row_id]
    measured = [run.measured.step_s for run in repeats if run.measured.step_s is not None]
    assert first.predicted_step_s is not None
    return _Candidate(
        row_ids=tuple(run.row_id for run in repeats),
        description=repeats[0].config.describe(),
        predicted_s=first.predicted_step_s,
        measured_s=float(np.median(measured)) if measured else None,
        recommended=bool(first.recommended),
    )


def _pick(key: tuple[str, ...], candidates: Sequence[_Candidate]) -> Pick:
    recommended = [each for each in candidates if each.recommended]
    measured = [each.measured_s for each in candidates if each.measured_s is not None]
    found = Pick(
        key=key,
        candidates=len(candidates),
        failed=len(candidates) - len(measured),
        recommended=len(recommended),
    )
    if not recommended:
        return found
    first = min(recommended, key=_order)
    return Pick(
        key=key,
        candidates=found.candidates,
        failed=found.failed,
        recommended=found.recommended,
        row_ids=first.row_ids,
        description=first.description,
        pick_failed=first.measured_s is None,
        regret=None if first.measured_s is None else first.measured_s / min(measured),
    )


def _order(candidate: _Candidate) -> tuple[float, float]:
    """Predicted fastest first; of equals the slowest measured, and failures before all."""
    return candidate.predicted_s, -np.inf if candidate.measured_s is None else -candidate.measured_s
