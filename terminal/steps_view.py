"""Measured steps on the screen: what was predicted, what it took, what the slowest and the fastest rank did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshwright.profiler.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.profiler.steps import StepMeasurement

STEP = ("predicted", "measured", "error", "spread", "fastest rank", "loss")
PEAK = ("predicted", "measured", "error", "allocator's surplus")


def show_measurements(measurements: Sequence[StepMeasurement], console: Console) -> None:
    """Seconds, then bytes, one row a plan; ``error`` is predicted over measured, minus 1.

    Peaks are the fullest rank's; where its tensors were counted, a line a plan says what they are.
    """
    from rich.table import Table

    for title, columns, row in (("step", STEP, _step_row), ("peak of memory", PEAK, _peak_row)):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(title, style="bold")
        for column in columns:
            table.add_column(column, justify="right")
        for measurement in measurements:
            table.add_row(measurement.config, *row(measurement))
        console.print(table)
        console.print()
    for measurement in measurements:
        if kinds := _kinds(measurement):
            console.print(f"{measurement.config}: {kinds}", highlight=False)


def measurement_line(measurement: StepMeasurement) -> str:
    """One line: the plan, its step and its peak, and how far the predictions were off."""
    said = []
    for row, what in ((_step_row, "{} a step"), (_peak_row, "a peak of {}")):
        _, measured, error, *_ = row(measurement)
        if measured != "-":
            said.append(what.format(measured) + (f" (predicted {error})" if error != "-" else ""))
    return f"{measurement.config}: {', '.join(said)}"


def _step_row(measurement: StepMeasurement) -> tuple[str, ...]:
    predicted = measurement.predicted_step_s
    fastest = min(sum(rank.step_s) / len(rank.step_s) for rank in measurement.ranks)
    return (
        format_seconds(predicted) if predicted is not None else "-",
        format_seconds(measurement.step_s),
        f"{predicted / measurement.step_s - 1:+.1%}" if predicted is not None else "-",
        f"{measurement.step_s_spread:.1%}",
        format_seconds(fastest),
        f"{measurement.losses[0]:.3f} to {measurement.losses[-1]:.3f}",
    )


def _peak_row(measurement: StepMeasurement) -> tuple[str, ...]:
    predicted, peak, surplus = measurement.predicted_peak_bytes, measurement.peak_bytes, measurement.fragmentation
    return (
        format_bytes(predicted) if predicted is not None else "-",
        format_bytes(peak) if peak is not None else "-",
        f"{predicted / peak - 1:+.1%}" if predicted is not None and peak else "-",
        f"{surplus:+.1%}" if surplus is not None else "-",
    )


def _kinds(measurement: StepMeasurement) -> str:
    """What the fullest rank's tensors are, the largest kind first."""
    fullest = max(measurement.ranks, key=lambda rank: rank.peak_bytes or 0)
    kinds = sorted(fullest.kinds, key=lambda kind: -kind.num_bytes)
    return ", ".join(f"{kind.kind} {format_bytes(kind.num_bytes)}" for kind in kinds if kind.num_bytes)
