"""Bandwidth between each two ranks, as coloured blocks at a terminal and as a PNG or SVG file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright import InputError
from meshwright.profiler.units import format_bytes_per_s

if TYPE_CHECKING:
    from rich.text import Text

    from meshwright.profiler.cluster import ClusterProfile

Matrix = tuple[tuple[float, ...], ...]

MAX_CELLS = 48  # rows and columns that fit a terminal; larger clusters are shown node by node
SHADES = " ░▒▓█"
# slow to fast, from matplotlib's viridis
COLOURS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")


def bandwidth_matrix(profile: ClusterProfile) -> Matrix:
    """Bytes a second from each rank to each other one, measured, or for a preset that of the tier they share."""
    if profile.link_matrix is not None:
        return profile.link_matrix.bytes_per_s
    nodes = [
        node
        for node, size in enumerate(
            group.devices_per_node for group in profile.node_groups for _ in range(group.num_nodes)
        )
        for _ in range(size)
    ]
    inside, outside = profile.tiers[0].bytes_per_s if profile.tiers else 0.0, 0.0
    if profile.tiers:
        outside = profile.tiers[-1].bytes_per_s
    return tuple(
        tuple(0.0 if a == b else inside if nodes[a] == nodes[b] else outside for b in range(len(nodes)))
        for a in range(len(nodes))
    )


def by_node(matrix: Matrix, sizes: list[int]) -> Matrix:
    """Node by node: the mean over the pairs of ranks of two nodes (inside one: without the diagonal)."""
    edges = [sum(sizes[:node]) for node in range(len(sizes) + 1)]

    def mean(a: int, b: int) -> float:
        rates = [matrix[i][j] for i in range(edges[a], edges[a + 1]) for j in range(edges[b], edges[b + 1]) if i != j]
        return sum(rates) / len(rates) if rates else 0.0

    return tuple(tuple(mean(a, b) for b in range(len(sizes))) for a in range(len(sizes)))


def heatmap_lines(matrix: Matrix, *, colours: bool) -> list[Text]:
    """One line a rank, two characters a cell, and a line that says what slow and fast are; empty without pairs.

    The scale is logarithmic. Without colours, four shades from light (slow) to full (fast).
    """
    from rich.text import Text

    rates = [rate for row in matrix for rate in row if rate > 0]
    if not rates:
        return []
    low, high = min(rates), max(rates)
    width = len(str(len(matrix) - 1))
    lines = []
    for index, row in enumerate(matrix):
        line = Text(f"  {index:>{width}} ")
        for rate in row:
            line.append(*_cell(rate, low, high, colours))
        lines.append(line)
    legend = Text("  " + " " * width + " ")
    legend.append(*_cell(low, low, high, colours))
    legend.append(f" {format_bytes_per_s(low)}   ")
    legend.append(*_cell(high, low, high, colours))
    legend.append(f" {format_bytes_per_s(high)}   (row sends to column)")
    return [*lines, legend]


def save_heatmap(profile: ClusterProfile, path: Path) -> None:
    """Draw the matrix to a ``.png`` or ``.svg`` file.

    Raises ``InputError`` for another ending, without matplotlib (saying how to install it), for a single device, or
    where the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"cannot draw {path.name}: expected a name that ends in .png or .svg")
    if profile.num_devices < 2:
        raise InputError(f"{profile.name} has a single device: there are no pairs to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib: install it with pip install matplotlib") from None
    matrix = bandwidth_matrix(profile)
    shown = [[rate / 1e9 if rate > 0 else math.nan for rate in row] for row in matrix]
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    axes = figure.add_subplot()
    rates = [rate for row in shown for rate in row if not math.isnan(rate)]
    low, high = min(rates), max(rates)
    image = axes.imshow(shown, cmap="viridis", norm=LogNorm(low, high) if high > low else None)
    figure.colorbar(image, label="GB/s, one pair alone")
    axes.set(title=f"{profile.name}: bandwidth between ranks", xlabel="to rank", ylabel="from rank")
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def _cell(rate: float, low: float, high: float, colours: bool) -> tuple[str, str]:
    if rate <= 0:
        return "· ", "dim" if colours else ""
    place = math.log(rate / low) / math.log(high / low) if high > low else 1.0
    if colours:
        return "  ", f"on {COLOURS[min(int(place * len(COLOURS)), len(COLOURS) - 1)]}"
    return SHADES[1 + min(int(place * (len(SHADES) - 1)), len(SHADES) - 2)] * 2, ""
