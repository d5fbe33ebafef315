"""Measured steps on the screen: what was predicted, what it took, what the slowest and the fastest rank did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshwright.profiler.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.profiler.steps import StepMeasurement

COLUMNS = ("predicted", "measured", "error", "spread", "fastest rank", "peak predicted", "peak measured", "loss")


def show_measurements(measurements: Sequence[StepMeasurement], console: Console) -> None:
    """One row a plan; ``error`` is predicted over measured, minus 1."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("plan", style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for measurement in measurements:
        table.add_row(*_row(measurement))
    console.print(table)


def measurement_line(measurement: StepMeasurement) -> str:
    """One line: the plan, its step, and how far the prediction was off."""
    config, _, measured, error, *_ = _row(measurement)
    return f"{config}: {measured} a step" + (f", predicted {error}" if error != "-" else "")


def _row(measurement: StepMeasurement) -> tuple[str, ...]:
    predicted, peaks = measurement.predicted_step_s, [rank.peak_bytes for rank in measurement.ranks]
    known = [peak for peak in peaks if peak is not None]
    fastest = min(sum(rank.step_s) / len(rank.step_s) for rank in measurement.ranks)
    return (
        measurement.config,
        format_seconds(predicted) if predicted is not None else "-",
        format_seconds(measurement.step_s),
        f"{predicted / measurement.step_s - 1:+.1%}" if predicted is not None else "-",
        f"{measurement.step_s_spread:.1%}",
        format_seconds(fastest),
        format_bytes(measurement.predicted_peak_bytes) if measurement.predicted_peak_bytes is not None else "-",
        format_bytes(max(known)) if known else "-",
        f"{measurement.losses[0]:.3f} to {measurement.losses[-1]:.3f}",
    )
