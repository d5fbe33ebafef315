"""The scorecard on the screen and as JSON: families and their parts, cells, and why rows were skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from meshwright.profiler.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.cost_models.scorecard import Part, Scorecard
    from meshwright.cost_models.scorecard_cells import Cell
    from meshwright.cost_models.scorecard_memory import Pick
    from meshwright.cost_models.scorecard_rows import ErrorScore, RowScore

ERROR_COLUMNS = ("rows", "predicted", "scored", "median", "mean", "bias")
CELL_COLUMNS = ("cells", "plans", "rank corr.", "regret", "worst", "within 5 %", "best of 3")
MEMORY_COLUMNS = ("peaks", "median", "mean", "bias", "ran, said not to fit", "failed, said so", "oom, said so")
PICK_COLUMNS = ("cells", "candidates", "picks", "of them failed", "share", "regret of the rest", "worst")
SHOWN_NOTES = 12


def show_scorecard(card: Scorecard, console: Console, *, per_cell: bool = False) -> None:
    """Print errors, cells, memory, picks, what was assumed and what was skipped; ``per_cell`` adds every cell."""
    _print_table(console, "Step time and utilisation", ERROR_COLUMNS, [_error_row(part) for part in card.parts])
    with_cells = [part for part in card.parts if part.cells is not None]
    if with_cells:
        console.print()
        _print_table(console, "Order of the plans in a cell", CELL_COLUMNS, [_cell_row(part) for part in with_cells])
    remembered = [row for part in card.parts if (row := _memory_row(part)) is not None]
    if remembered:
        console.print()
        _print_table(console, "Memory", MEMORY_COLUMNS, remembered)
    if card.picks:
        console.print()
        title = "First choice among the recommended, with the runs that failed as candidates"
        _print_table(console, title, PICK_COLUMNS, [_pick_row(part) for part, _ in card.picks])
    if per_cell:
        _show_cells(card, console)
        _show_picks(card, console)
    _show_reasons(card, console)


def scorecard_json(card: Scorecard) -> str:
    """Parts, picks, and every row in the order of the table: ``skipped_reason`` is null where it was predicted."""
    from dataclasses import asdict

    document = {
        "parts": [_part_json(part) for part in card.parts],
        "picks": [
            {"family": part.family, "part": part.name, **asdict(pick)} for part, picks in card.picks for pick in picks
        ],
        "skipped": [{"family": family, "reason": reason, "rows": rows} for family, reason, rows in card.skipped],
        "rows": [_row_json(row) for row in card.rows],
    }
    return json.dumps(document, indent=1, allow_nan=False)


def _row_json(row: RowScore) -> dict[str, Any]:
    return {
        "id": row.row_id,
        "family": row.family,
        "predicted_step_time_s": row.predicted_step_s,
        "predicted_peak_bytes": row.predicted_peak_bytes,
        "predicted_fragmentation_bytes": row.predicted_fragmentation_bytes,
        "fits": row.fits,
        "recommended": row.recommended,
        "skipped_reason": row.skipped_reason,
        "framework": row.framework,
        "status": row.status,
        "measured_step_time_s": row.measured_step_s,
        "measured_peak_bytes": row.measured_peak_bytes,
        "peak_kind": row.peak_kind,
        "error": row.error,
        "peak_error": row.peak_error,
        "notes": list(row.notes),
    }


def _part_json(part: Part) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(part)


def _percent(value: float, *, signed: bool = False) -> str:
    return f"{value * 100:{'+' if signed else ''}.1f} %"


def _errors(errors: ErrorScore | None) -> tuple[str, ...]:
    if errors is None:
        return ("0", "-", "-", "-")
    return str(errors.rows), _percent(errors.median), _percent(errors.mean), _percent(errors.bias, signed=True)


def _error_row(part: Part) -> tuple[str, ...]:
    return part.family, part.name, str(part.rows), str(part.predicted), *_errors(part.errors)


def _cell_row(part: Part) -> tuple[str, ...]:
    cells = part.cells
    assert cells is not None
    return (
        part.family,
        part.name,
        str(cells.cells),
        str(cells.plans),
        f"{cells.spearman:.2f}",
        f"{cells.regret:.3f}",
        f"{cells.worst:.2f}",
        f"{cells.close:.0%}",
        f"{cells.regret_of_three:.3f}",
    )


def _memory_row(part: Part) -> tuple[str, ...] | None:
    memory = part.memory
    if memory is None:
        return None
    counts = (
        (memory.succeeded_called_out, memory.succeeded),
        (memory.failed_called_out, memory.failed),
        (memory.oom_called_out, memory.oom),
    )
    said = [f"{called} of {rows}" if rows else "-" for called, rows in counts]
    return (part.family, part.name, *_errors(memory.peak), *said)


def _pick_row(part: Part) -> tuple[str, ...]:
    picks = part.picks
    assert picks is not None
    share = f"{picks.failed / picks.picks:.0%}" if picks.picks else "-"
    regrets = [
        "-" if value is None else f"{value:{form}}" for value, form in ((picks.regret, ".3f"), (picks.worst, ".2f"))
    ]
    counts = (picks.cells, picks.candidates, picks.picks, picks.failed)
    return (part.family, part.name, *map(str, counts), share, *regrets)


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
    table.add_column("family", no_wrap=True)
    table.add_column("part", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    previous = ""
    for family, *rest in rows:
        table.add_row(family if family != previous else "", *rest)
        previous = family
    console.print(table)


def _show_cells(card: Scorecard, console: Console) -> None:
    for part, cells in card.cells:
        for cell in sorted(cells, key=lambda cell: -cell.regret):
            console.print()
            _show_cell(part, cell, console)


def _show_cell(part: Part, cell: Cell, console: Console) -> None:
    from rich.table import Table

    said = " ".join(text for text in cell.key[1:] if text)
    console.print(f"[bold]{part.family}[/bold] ({part.name}): {said}", highlight=False)
    console.print(
        f"  {len(cell.plans)} plans, rank correlation {cell.spearman:.2f}, regret {cell.regret:.3f}, "
        f"best of the first three {cell.regret_of_three:.3f}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for column in ("plan", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    best = min(plan.measured_s for plan in cell.plans)
    for plan in cell.plans:
        error = _percent(plan.predicted_s / plan.measured_s - 1.0, signed=True)
        fastest = plan.measured_s == best
        row = (plan.description, format_seconds(plan.predicted_s), format_seconds(plan.measured_s), error)
        table.add_row(*row, style="green" if fastest else None)
    console.print(table)


def _show_picks(card: Scorecard, console: Console) -> None:
    for part, picks in card.picks:
        console.print()
        console.print(f"[bold]{part.family}[/bold] ({part.name}): first choices with failures", highlight=False)
        for pick in picks:
            console.print(f"  {_pick_line(pick)}", markup=False, highlight=False)


def _pick_line(pick: Pick) -> str:
    said = " ".join(text for text in pick.key[1:] if text)
    counts = f"{pick.candidates} candidates, {pick.failed} failed, {pick.recommended} recommended"
    if pick.description is None:
        return f"{said}: {counts}; no pick"
    outcome = "FAILED" if pick.regret is None else f"regret {pick.regret:.3f}"
    return f"{said}: {counts}; {pick.description} {outcome}"


def _show_reasons(card: Scorecard, console: Console) -> None:
    """What was assumed and what was skipped, most rows first."""
    from collections import Counter

    assumed = Counter((row.family, note) for row in card.rows for note in row.notes if row.skipped_reason is None)
    both = (("Assumed", [(family, note, count) for (family, note), count in assumed.most_common()]),
            ("Skipped", list(card.skipped)))  # fmt: skip
    for title, lines in both:
        if not lines:
            continue
        console.print()
        console.print(f"[bold]{title}[/bold]")
        for family, text, count in lines[:SHOWN_NOTES]:
            console.print(f"  {count:5d}  {family}: {text}", markup=False, highlight=False)
        left = lines[SHOWN_NOTES:]
        if left:
            rows = sum(count for *_, count in left)
            console.print(f"  {rows:5d}  for {len(left)} more reasons (all with --json)", highlight=False)
