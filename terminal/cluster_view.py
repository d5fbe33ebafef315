"""A cluster on the screen: its devices, links, operators and collectives, with where each figure comes from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from meshwright.profiler.cluster_diff import reference_rate
from meshwright.profiler.units import format_bytes, format_bytes_per_s, format_flops_per_s, format_seconds
from meshwright.terminal.heatmap import MAX_CELLS, bandwidth_matrix, by_node, heatmap_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from meshwright.profiler.cluster import ClusterProfile, CollectiveCurve, Device, Efficiency
    from meshwright.profiler.cluster_diff import ClusterDiff

WORTH_SAYING_PERCENT = 2.0  # smaller changes are noise of any measurement


def show_cluster(profile: ClusterProfile, console: Console) -> None:
    """Print everything about a cluster, the most asked-for first."""
    nodes = ", ".join(
        f"{group.num_nodes} node{'s' if group.num_nodes > 1 else ''} with {group.devices_per_node} x {group.device}"
        for group in profile.node_groups
    )
    console.print(f"[bold]{profile.name}[/bold]: {profile.num_devices} devices ({nodes})")
    when = f"measured {profile.measured_at}" if profile.measured_at else "not measured: datasheets and assumptions"
    console.print(f"  {when}; digest {profile.digest}", markup=False)
    for device in profile.devices:
        _device(device, console)
    _links(profile, console)
    if profile.collectives:
        console.print(_collectives(profile.collectives))
    _heatmap(profile, console)
    for constant in profile.calibrated:
        what = f"{constant.name} of {constant.owner} {constant.of}: {constant.value:.4g}, {constant.source.reference}"
        console.print(f"  calibrated: {what}", markup=False)
    _environment(profile, console)
    for note in profile.notes:
        console.print(f"  note: {note}", markup=False)


def show_diff(diff: ClusterDiff, console: Console) -> None:
    """Print what changed by 2 % or more, green for better and red for worse, then what only one side has."""
    table = _table("", "before", "after", "change")
    same = 0
    for change in sorted(diff.changes, key=lambda change: -abs(change.percent)):
        if abs(change.percent) < WORTH_SAYING_PERCENT:
            same += 1
            continue
        better = (change.percent > 0) is change.higher_is_better
        table.add_row(
            change.what,
            _figure(change.before, change.unit),
            _figure(change.after, change.unit),
            f"{change.percent:+.1f} %",
            style="green" if better else "red",
        )
    if table.row_count:
        console.print(table)
    console.print(f"  {same} of {len(diff.changes)} figures differ by less than {WORTH_SAYING_PERCENT:.0f} %")
    for label, names in (("only before", diff.only_before), ("only after", diff.only_after)):
        for name in names:
            console.print(f"  {label}: {name}", markup=False)
    for sentence in diff.environment:
        console.print(f"  environment: {sentence}", markup=False)


def show_presets(profiles: list[ClusterProfile], console: Console) -> None:
    """Print one line for each preset."""
    table = _table("preset", "devices a node", "memory", "matmul peak", "inside a node", "between nodes, a device")
    for profile in profiles:
        device = profile.device
        fastest = max(
            (curve for curve in device.efficiencies if curve.op == "matmul" and curve.dtype in ("bfloat16", "float16")),
            key=lambda curve: curve.peak_flops_per_s,
        )
        table.add_row(
            profile.name.partition(":")[0],
            f"{profile.devices_per_node} x {device.kind}",
            format_bytes(device.memory_bytes),
            f"{format_flops_per_s(fastest.peak_flops_per_s)} {fastest.dtype}",
            format_bytes_per_s(profile.tiers[0].bytes_per_s),
            format_bytes_per_s(profile.tiers[-1].contended_bytes_per_s),
        )
    console.print(table)
    console.print("  NAME:16 is 16 nodes. Write one to a file, to correct it: meshwright cluster preset NAME -o FILE")


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on standard error, only at a terminal; the function it gives takes the share done and what is going on."""
    if not sys.stderr.isatty():
        yield lambda share, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[doing]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=1.0, doing="starting ranks")
        yield lambda share, text: progress.update(task, completed=share, doing=text)


def _device(device: Device, console: Console) -> None:
    console.print()
    peak = device.peak_memory_bytes_per_s
    share = f" ({device.memory_bytes_per_s / peak:.0%} of {format_bytes_per_s(peak)})" if peak else ""
    console.print(f"[bold]{device.kind}[/bold]", highlight=False)
    for line in (
        f"memory {format_bytes(device.memory_bytes)}, of which {format_bytes(device.reserved_bytes)} reserved; "
        f"{format_bytes_per_s(device.memory_bytes_per_s)}{share}",
        f"launch of an operator {format_seconds(device.launch_s)}; compute is slowed by "
        f"{device.communication_slowdown:.0%} while communicating",
    ):
        console.print(f"  {line}", markup=False)
    table = _table("operator", "dtype", "peak", "limit", "at 1024^3", "half sizes m, n, k", "fit error", "known from")
    for curve in device.efficiencies:
        count = sum(sample.op == curve.op and sample.dtype == curve.dtype for sample in device.samples)
        table.add_row(
            curve.op.replace("_", " "),
            curve.dtype,
            format_flops_per_s(curve.peak_flops_per_s),
            f"{curve.max_share:.0%}",
            format_flops_per_s(reference_rate(curve)),
            _half_sizes(curve),
            f"{curve.residual:.1%}" if curve.residual else "",
            f"{count} samples" if count else curve.source.provenance.value,
        )
    console.print(table)


def _half_sizes(curve: Efficiency) -> str:
    """Of a matmul in tiles only k has one; tiles and waves say the rest."""
    if curve.tile_exponent is not None:
        return f"tiles, {curve.half_k:.3g}"
    if curve.half_waves:
        return f"waves, {curve.half_k:.3g}"
    return f"{curve.half_m:.3g}, {curve.half_n:.3g}, {curve.half_k:.3g}"


def _links(profile: ClusterProfile, console: Console) -> None:
    if not profile.tiers:
        return
    table = _table("links", "devices", "latency", "one pair alone", "all at once, a device", "known from")
    for tier in profile.tiers:
        table.add_row(
            tier.name,
            str(tier.group_size),
            format_seconds(tier.latency_s),
            format_bytes_per_s(tier.bytes_per_s),
            format_bytes_per_s(tier.contended_bytes_per_s),
            tier.source.provenance.value,
        )
    console.print(table)


def _collectives(curves: tuple[CollectiveCurve, ...]) -> Table:
    table = _table("collective", "ranks", "a node", "smallest", "largest", "rate of the largest", "spread")
    for curve in curves:
        table.add_row(
            curve.op.replace("_", " "),
            str(curve.num_ranks),
            str(curve.ranks_per_node),
            f"{format_bytes(curve.message_bytes[0])} {format_seconds(curve.seconds[0])}",
            f"{format_bytes(curve.message_bytes[-1])} {format_seconds(curve.seconds[-1])}",
            format_bytes_per_s(curve.message_bytes[-1] / curve.seconds[-1]),
            f"{curve.spread[-1]:.0%}",
        )
    return table


def _heatmap(profile: ClusterProfile, console: Console) -> None:
    if profile.num_devices < 2 or (profile.link_matrix is None and profile.num_devices > MAX_CELLS):
        return
    matrix, unit = bandwidth_matrix(profile), "rank"
    if len(matrix) > MAX_CELLS:
        sizes = [group.devices_per_node for group in profile.node_groups for _ in range(group.num_nodes)]
        if len(sizes) > MAX_CELLS:
            return
        matrix, unit = by_node(matrix, sizes), "node"
    console.print(f"bandwidth by {unit}")
    for line in heatmap_lines(matrix, colours=console.is_terminal and not console.no_color):
        console.print(line)


def _environment(profile: ClusterProfile, console: Console) -> None:
    environment = profile.environment
    if environment is None:
        return
    parts = [
        f"{name} {value}"
        for name in ("meshwright", "python", "torch", "backend", "driver")
        if (value := getattr(environment, name))
    ]
    parts += [f"{setting.name}={setting.value}" for setting in environment.settings]
    console.print(f"  environment: {', '.join(parts)}", markup=False)


def _figure(value: float, unit: str) -> str:
    formats = {"s": format_seconds, "bytes": format_bytes, "bytes/s": format_bytes_per_s, "FLOP/s": format_flops_per_s}
    return formats[unit](value) if unit in formats else f"{value:.3g}"


def _table(*headers: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, header in enumerate(headers):
        table.add_column(header, justify="left" if place == 0 else "right", no_wrap=place == 0)
    return table
