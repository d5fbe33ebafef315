"""Predicted against published: the scorecard, per family and never pooled.

A family is scored in parts. Rows of dense models with cp = 1 are one part, rows with experts and rows with cp > 1 one
each, rows that publish only a utilisation another. Some families have extra parts that overlap those (``EXTRA``).

* **error** of a row is predicted over measured step, minus 1; of a utilisation row predicted over measured utilisation,
  minus 1. Every row counts, repeats too.
* **cells** compare plans: runs that agree in the columns of ``published.CELL``. A plan's measured time is the median of
  its repeats (the same configuration, measured again). Cells of ``MIN_PLANS`` plans or more count. Plans that are
  predicted equal rank with the slowest measured first, so that the order of the table never helps.
* **memory** and **picks** among failures: see ``scorecard_memory``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from meshwright.cost_models.published import (
    Group,
    Predictions,
    Published,
    PublishedRun,
    grouped,
    predict,
    read_published,
)
from meshwright.cost_models.scorecard_cells import Cell, CellScore, score_cells
from meshwright.cost_models.scorecard_memory import (
    MemoryScore,
    Pick,
    PickScore,
    compared_peak,
    score_memory,
    score_picks,
)
from meshwright.cost_models.scorecard_rows import ErrorScore, RowScore, error_score
from meshwright.profiler.record import record

# parts beside those of scope, by family: a name and which runs
EXTRA: dict[str, tuple[tuple[str, Callable[[PublishedRun], bool]], ...]] = {
    "nanotron_ultrascale": (
        ("MFU >= 10 %", lambda run: (run.measured.mfu or 0.0) >= 0.10),
        # every run on 64 nodes takes half a second and more for each micro-batch, whatever the model: another version
        # of the pipeline code, which smaller clusters show in one run of seven, without a column that says so
        ("without 64 nodes", lambda run: run.num_nodes < 64),
        ("64 nodes", lambda run: run.num_nodes >= 64),
    ),
    "vtrain_groundtruth": (
        ("single node", lambda run: run.num_nodes == 1),
        ("several nodes", lambda run: run.num_nodes > 1),
    ),
}
SCOPES = {"dense": "dense", "cp": "cp > 1", "moe": "MoE"}


@record
class Part:
    """One line of the scorecard. ``predicted`` of ``rows`` have a prediction; ``errors`` needs a measurement too."""

    family: str
    name: str
    rows: int
    predicted: int
    errors: ErrorScore | None
    cells: CellScore | None
    memory: MemoryScore | None
    picks: PickScore | None


@record
class Scorecard:
    """All parts, every row in the order of the table, and why rows were skipped: ``(family, reason, rows)``."""

    parts: tuple[Part, ...]
    rows: tuple[RowScore, ...]
    cells: tuple[tuple[Part, tuple[Cell, ...]], ...]
    picks: tuple[tuple[Part, tuple[Pick, ...]], ...]
    skipped: tuple[tuple[str, str, int], ...]


def validate(
    path: str | Path,
    *,
    family: str | None = None,
    on_progress: Callable[[float, str], None] = lambda share, text: None,
) -> Scorecard:
    """Read a table of published runs, predict every one, and score them; ``on_progress`` gets the share done.

    Raises ``InputError`` for a file that is not such a table (see ``published_rows.read_rows``) or a family it lacks.
    """
    on_progress(0.0, "reading")
    published = read_published(path)
    if family is not None:
        published = published.only(family)
    groups, done = grouped(published.runs), 0

    def count(group: Group) -> None:
        nonlocal done
        done += len(group.positions)
        on_progress(done / len(published.runs), f"{group.model.name} on {group.cluster}")

    return score(published, predict(groups, on_group=count))


def score(published: Published, predictions: Predictions) -> Scorecard:
    """Compare ``predictions`` (one entry for each of ``published.runs``) with what was measured."""
    runs = published.runs
    by_id = {run.row_id: _row(run, predictions, index) for index, run in enumerate(runs)}
    for row_id, family, reason in published.skipped:
        by_id[row_id] = RowScore(row_id=row_id, family=family, skipped_reason=reason)
    rows = tuple(by_id[row_id] for row_id in published.row_ids)
    families = list(dict.fromkeys(row.family for row in rows))
    scored = [
        each for family in families for each in _family(family, [run for run in runs if run.family == family], by_id)
    ]
    counted = Counter((row.family, row.skipped_reason) for row in rows if row.skipped_reason is not None)
    skipped = tuple((family, str(reason), count) for (family, reason), count in counted.most_common())
    return Scorecard(
        parts=tuple(part for part, _, _ in scored),
        rows=rows,
        cells=tuple((part, cells) for part, cells, _ in scored if cells),
        picks=tuple((part, picks) for part, _, picks in scored if picks),
        skipped=skipped,
    )


def _row(run: PublishedRun, predictions: Predictions, index: int) -> RowScore:
    row = RowScore(
        row_id=run.row_id,
        family=run.family,
        framework=run.framework,
        status=run.status,
        skipped_reason=predictions.reasons[index],
        measured_step_s=run.measured.step_s,
        measured_peak_bytes=run.measured.peak_bytes,
        peak_kind=run.measured.peak_kind.value,
        notes=run.notes,
    )
    step_s = float(predictions.step_s[index])
    if not np.isfinite(step_s):
        return row
    tensors, on_top = int(predictions.peak_bytes[index]), int(predictions.fragmentation_bytes[index])
    peak = run.measured.peak_bytes
    return replace(
        row,
        predicted_step_s=step_s,
        predicted_peak_bytes=tensors,
        predicted_fragmentation_bytes=on_top,
        fits=bool(predictions.fits[index]),
        recommended=bool(predictions.recommended[index]),
        error=_error(run, step_s),
        peak_error=compared_peak(run, tensors, on_top) / peak - 1.0 if peak else None,
    )


def _error(run: PublishedRun, predicted_s: float) -> float | None:
    if run.measured.step_s is not None:
        return predicted_s / run.measured.step_s - 1.0
    if run.measured.utilisation_step_s is not None:
        return run.measured.utilisation_step_s / predicted_s - 1.0
    return None


def _family(
    family: str, runs: Sequence[PublishedRun], rows: dict[str, RowScore]
) -> Iterable[tuple[Part, tuple[Cell, ...], tuple[Pick, ...]]]:
    timed = [run for run in runs if run.measured.utilisation_step_s is None]
    utilised = [run for run in runs if run.measured.utilisation_step_s is not None]
    for scope, name in SCOPES.items():
        for label, chosen in ((name, timed), (f"{name}, utilisation", utilised)):
            members = [run for run in chosen if run.scope == scope]
            if members:
                yield _part(family, label, members, rows)
    for name, holds in EXTRA.get(family, ()):
        members = [run for run in timed if run.scope == "dense" and holds(run)]
        if members:
            yield _part(family, name, members, rows)


def _part(
    family: str, name: str, runs: Sequence[PublishedRun], rows: dict[str, RowScore]
) -> tuple[Part, tuple[Cell, ...], tuple[Pick, ...]]:
    predicted = [run for run in runs if rows[run.row_id].predicted_step_s is not None]
    errors = [rows[run.row_id].error for run in predicted]
    plans = [
        (run, run.measured.step_s, rows[run.row_id].predicted_step_s)
        for run in predicted
        if run.measured.step_s is not None
    ]
    cells, cell_score = score_cells(plans)
    picks, pick_score = score_picks(predicted, rows)
    part = Part(
        family=family,
        name=name,
        rows=len(runs),
        predicted=len(predicted),
        errors=error_score([error for error in errors if error is not None]),
        cells=cell_score,
        memory=score_memory(predicted, rows),
        picks=pick_score,
    )
    return part, cells, picks
