"""Predicted against measured step times as a picture: one panel a family, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright import InputError

if TYPE_CHECKING:
    from meshwright.cost_models.scorecard import Scorecard
    from meshwright.cost_models.scorecard_rows import RowScore

COLUMNS = 4
BAND = 1.10  # the shaded band: 10 % to either side


def save_accuracy_plot(card: Scorecard, path: Path) -> None:
    """Draw every row with a predicted and a measured step time to a ``.png`` or ``.svg`` file.

    Raises ``InputError`` for another ending, without matplotlib (saying how to install it), where no row has both
    times, or where the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"cannot draw {path.name}: expected a name that ends in .png or .svg")
    families: dict[str, list[RowScore]] = {}
    for row in card.rows:
        if row.predicted_step_s is not None and row.measured_step_s is not None:
            families.setdefault(row.family, []).append(row)
    if not families:
        raise InputError("nothing to draw: no row has a predicted and a measured step time")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib: install it with pip install matplotlib") from None
    columns = min(COLUMNS, len(families))
    lines = math.ceil(len(families) / columns)
    figure = Figure(figsize=(3.1 * columns, 3.1 * lines), layout="constrained")
    (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (family, rows) in zip(panels, families.items(), strict=False):
        _panel(axes, family, rows)
    for axes in panels[len(families) :]:
        axes.set_axis_off()
    figure.supxlabel("measured step (s)")
    figure.supylabel("predicted step (s)")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def _panel(axes: Any, family: str, rows: Sequence[RowScore]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    measured = [row.measured_step_s or 0.0 for row in rows]
    predicted = [row.predicted_step_s or 0.0 for row in rows]
    low, high = min(*measured, *predicted) / 1.3, max(*measured, *predicted) * 1.3
    ends = [low, high]
    axes.fill_between(ends, [end / BAND for end in ends], [end * BAND for end in ends], color="0.85", linewidth=0)
    axes.plot(ends, ends, color="0.4", linewidth=0.8)
    axes.scatter(measured, predicted, s=7, alpha=0.5, linewidths=0, color="tab:blue", rasterized=len(rows) > 500)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set_title(f"{family}, {len(rows)} rows", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7, which="both")
