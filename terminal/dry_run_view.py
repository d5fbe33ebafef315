"""A dry run on the screen: bytes by kind beside the prediction, where the peak is, what is largest there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from meshwright.cost_models.estimate import KINDS
from meshwright.profiler.units import format_bytes
from meshwright.terminal.memory_view import KIND_WORDS
from meshwright.terminal.tables import bar, plain_table

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.executors.dry_run import DryRun
    from meshwright.planner.plan import Plan

NUM_LARGEST = 6
CURVE_WIDTH = 72
ELSEWHERE = {"optimizer": "optimizer's step", "clip": "clipping of gradients", "step": "rest of the step"}
LEVELS = "▁▂▃▄▅▆▇█"


def show_dry_run(plan: Plan, runs: Sequence[DryRun], console: Console) -> None:
    """Print the stages, if there are several, then the one that binds in full."""
    world = plan.config.world_size
    console.print(f"{plan.model.name}, {plan.config.describe()}, {world} ranks", markup=False, highlight=False)
    fullest = max(runs, key=lambda run: run.peak_bytes)
    if len(runs) > 1:
        _stages(runs, fullest, console)
    _kinds(fullest, console)
    _moment(fullest, console)


def dry_run_line(plan: Plan, runs: Sequence[DryRun]) -> str:
    """One line: the fullest rank's peak, and whether it fits."""
    run = max(runs, key=lambda run: run.peak_bytes)
    fits = {True: "fits", False: "DOES NOT FIT", None: "device unknown"}[run.fits]
    return f"{plan.config.describe()}: rank {run.rank} needs {format_bytes(run.peak_bytes)}, {fits}"


def dry_run_shortage(plan: Plan, runs: Sequence[DryRun]) -> str | None:
    """One sentence where a rank does not fit, None where all do."""
    run = max(runs, key=lambda run: run.peak_bytes)
    if run.headroom_bytes is None or run.headroom_bytes >= 0:
        return None
    usable = run.peak_bytes + run.headroom_bytes
    return (
        f"{plan.config.describe()} does not fit: rank {run.rank} (stage {_listed(run.stages)}) needs "
        f"{format_bytes(run.peak_bytes)} of {format_bytes(usable)}, {format_bytes(-run.headroom_bytes)} too much"
    )


def _stages(runs: Sequence[DryRun], fullest: DryRun, console: Console) -> None:
    columns = [("stage", ""), (">rank", ""), (">peak", "bold")]
    table = plain_table(
        "Stages", *columns, *((f">{KIND_WORDS[kind]}", "") for kind in KINDS), ("peak in", ""), ("", "")
    )
    for run in runs:
        kinds = (format_bytes(getattr(run, f"{kind}_bytes")) for kind in KINDS)
        mark = "binds" if run is fullest else ""
        peak = format_bytes(run.peak_bytes)
        table.add_row(_listed(run.stages), str(run.rank), peak, *kinds, _where(run), mark)
    console.print(table)


def _kinds(run: DryRun, console: Console) -> None:
    predicted = run.predicted if run.predicted and run.predicted.stage == run.pp_rank else None
    title = f"Memory of rank {run.rank} (stage {_listed(run.stages)}) at its peak"
    columns = [("", ""), (">dry run", ""), *([(">predicted", ""), (">", "")] if predicted else []), ("", "magenta")]
    table = plain_table(title, *columns)
    capacity = run.capacity_bytes or run.peak_bytes
    rows = [(KIND_WORDS[kind], getattr(run, f"{kind}_bytes"), f"{kind}_bytes") for kind in KINDS]
    for words, num_bytes, name in (*rows, ("all tensors", run.peak_bytes, "peak_bytes")):
        beside: list[str] = []
        if predicted:
            expected = int(getattr(predicted, name))
            error = f"{expected / num_bytes - 1:+.1%}" if num_bytes else ""
            beside = [format_bytes(expected), error]
            if not num_bytes and not expected:
                continue
        table.add_row(words, format_bytes(num_bytes), *beside, bar(num_bytes / capacity))
    if run.capacity_bytes is not None and run.reserved_bytes is not None:
        blank = ["", ""] if predicted else []
        left = capacity - run.reserved_bytes - run.peak_bytes
        table.add_row("context, communicators, others", format_bytes(run.reserved_bytes), *blank, "")
        table.add_row("free" if left >= 0 else "too much", format_bytes(abs(left)), *blank, "")
    console.print(table)
    if run.predicted and not predicted:
        stage = run.predicted.stage
        console.print(f"  the plan predicts stage {stage} to bind: give --all-stages", markup=False, highlight=False)


def _moment(run: DryRun, console: Console) -> None:
    console.print(f"\n  peak in the {_where(run)}, by {run.operator}", markup=False, highlight=False)
    console.print(f"  step {run.step + 1}  {_curve(run)}", markup=False, highlight=False)
    if run.microbatches_run < run.num_microbatches:
        few, all_of_them = run.microbatches_run, run.num_microbatches
        console.print(f"  {few} of {all_of_them} micro-batches run: more hold no more", markup=False, highlight=False)
    table = plain_table("Largest tensors then", (">", ""), ("", ""), ("", ""), ("", ""))
    for tensor in run.largest[:NUM_LARGEST]:
        before = tensor.phase == "before"
        born = f"{tensor.phase} of {tensor.module}" if tensor.module and not before else tensor.module or tensor.phase
        shape = f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
        table.add_row(format_bytes(tensor.num_bytes), KIND_WORDS[tensor.kind], shape, born)
    console.print(table)


def _curve(run: DryRun) -> str:
    """Bytes alive over the step, from the left, as high as the peak."""
    totals = [sum(point.num_bytes) for point in run.timeline]
    if not totals:
        return ""
    places = [int(place * len(totals) / CURVE_WIDTH) for place in range(CURVE_WIDTH)]
    edges = [*places, len(totals)]
    columns = [max(totals[first : max(last, first + 1)]) for first, last in pairwise(edges)]
    return "".join(LEVELS[min(int(total / max(run.peak_bytes, 1) * len(LEVELS)), len(LEVELS) - 1)] for total in columns)


def _where(run: DryRun) -> str:
    if run.phase in ELSEWHERE:
        return ELSEWHERE[run.phase]
    return f"{run.phase} of {run.module or 'the loss'}"


def _listed(stages: Sequence[int]) -> str:
    return ", ".join(map(str, stages))
