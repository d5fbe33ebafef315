"""A calibration on the screen: how far predictions were off before and after, and what was changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from meshwright.profiler.units import format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.planner.calibrate import Calibration


def show_calibration(calibration: Calibration, console: Console) -> None:
    """One row a measured plan, one a constant, then what to mind; ``error`` is predicted over measured, minus 1."""
    from rich.table import Table

    plans = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    plans.add_column("plan", style="bold")
    for column in ("framework", "measured", "predicted before", "error", "after", "error"):
        plans.add_column(column, justify="left" if column == "framework" else "right")
    for plan in calibration.plans:
        errors = [seconds / plan.measured_s - 1 for seconds in (plan.before_s, plan.after_s)]
        plans.add_row(
            plan.config,
            plan.framework,
            format_seconds(plan.measured_s),
            format_seconds(plan.before_s),
            f"{errors[0]:+.1%}",
            format_seconds(plan.after_s),
            f"{errors[1]:+.1%}",
        )
    console.print(plans)
    before, after = (
        float(np.median([abs(getattr(plan, name) / plan.measured_s - 1) for plan in calibration.plans]))
        for name in ("before_s", "after_s")
    )
    console.print(f"\nmedian error {before:.1%} before, {after:.1%} after\n")
    constants = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("belongs to", "constant", "before", "after", "meaning"):
        constants.add_column(column, justify="right" if column in ("before", "after") else "left")
    for each in calibration.constants:
        constants.add_row(f"{each.owner} {each.of}", each.name, f"{each.before:.4g}", f"{each.after:.4g}", each.meaning)
    if calibration.constants:
        console.print(constants)
    else:
        console.print("the steps tell nothing of any constant: nothing was changed")
    for note in calibration.notes:
        console.print(f"\nnote: {note}", markup=False)
