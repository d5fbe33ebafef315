"""Time collectives over sizes and over the shapes of group that a plan uses, all groups of a shape at the same time.

A shape is (ranks, ranks on each node). On a cluster of ``M`` nodes with ``G`` devices: groups inside a node of 2, 4 ...
``G``; groups over 2, 4 ... ``M`` nodes with 1, 2, 4 ... ``G`` ranks on each. A step runs all groups of an axis at once,
so that they share NICs here as they do there. Seconds are those of the slowest rank of all groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist

from meshwright.profiler.clock import DeviceClock
from meshwright.profiler.cluster import CollectiveCurve, CollectiveOp, Source
from meshwright.profiler.record import record

OPS: tuple[CollectiveOp, ...] = get_args(CollectiveOp)
SMALLEST_BYTES = 2**10
FACTOR = 4  # from one size to the next, after the first step of FACTOR**2
GROWN = 3.0  # a curve must end where bytes, not latency, take the time: this many times its first point
MIN_SIZES = 3
RARE = 95  # percentile above which a sample counts as a disturbance that a step does not see
Call = Callable[[], object]

# the names before torch 2.13 are deprecated there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@record
class GroupShape:
    """``num_ranks`` ranks, ``ranks_per_node`` of them on each node, and the groups of that shape that run at once."""

    num_ranks: int
    ranks_per_node: int
    groups: tuple[tuple[int, ...], ...]


def group_shapes(nodes: Sequence[Sequence[int]]) -> tuple[GroupShape, ...]:
    """The shapes worth measuring on these nodes (lists of ranks), from the smallest; only full, equal groups.

    Inside a node: neighbouring ranks. Across: the same places on neighbouring nodes. With unequal nodes the smallest
    says how many places there are.
    """
    places, shapes = min(len(node) for node in nodes), []
    for size in _sizes(places)[1:]:
        inside = [tuple(node[at : at + size]) for node in nodes for at in range(0, places - size + 1, size)]
        shapes.append(GroupShape(num_ranks=size, ranks_per_node=size, groups=tuple(inside)))
    for count in _sizes(len(nodes))[1:]:
        for size in _sizes(places):
            across = [
                tuple(rank for node in nodes[first : first + count] for rank in node[at : at + size])
                for first in range(0, len(nodes) - count + 1, count)
                for at in range(0, places - size + 1, size)
            ]
            shapes.append(GroupShape(num_ranks=count * size, ranks_per_node=size, groups=tuple(across)))
    return tuple(sorted(shapes, key=lambda shape: (shape.num_ranks, -shape.ranks_per_node)))


def _sizes(limit: int) -> list[int]:
    """1, 2, 4 ... and the limit itself."""
    return sorted({*(2**power for power in range(limit.bit_length()) if 2**power <= limit), limit})


@record
class CollectiveOptions:
    """``budget_s`` for all curves together; a call beyond ``longest_s`` is the last, if its curve has grown enough."""

    budget_s: float = 6.0
    longest_s: float = 0.1
    largest_bytes: int = 2**26
    repeats: int = 7


def measure_collectives(
    shapes: Sequence[GroupShape], clock: DeviceClock, options: CollectiveOptions, source: Source
) -> Iterator[CollectiveCurve]:
    """Each curve as it is measured, equal on every rank.

    Collective: every rank of the default group takes part, also where a group leaves it out.
    """
    share_s = options.budget_s / max(1, len(shapes) * len(OPS))
    for shape in shapes:
        mine: dist.ProcessGroup | None = None
        for ranks in shape.groups:  # every rank makes every group, in the same order
            group = dist.new_group(list(ranks))
            if isinstance(group, dist.ProcessGroup) and dist.get_rank() in ranks:
                mine = group
        for op in OPS:
            yield _curve(op, shape, mine, clock, options, share_s, source)


def _curve(
    op: CollectiveOp,
    shape: GroupShape,
    group: dist.ProcessGroup | None,
    clock: DeviceClock,
    options: CollectiveOptions,
    share_s: float,
    source: Source,
) -> CollectiveCurve:
    """One operation over growing sizes, until a call is too long or its share of the time is spent."""
    start = time.monotonic()
    size = SMALLEST_BYTES
    sizes: list[float] = []
    medians: list[float] = []
    means: list[float] = []
    spreads: list[float] = []
    while size <= options.largest_bytes:
        call, moved = _call(op, size, shape.num_ranks, group, clock.device)
        estimate = min(_together([clock.once(call) for _ in range(3)], clock))  # the first sets buffers up
        samples = _together(_samples(call, estimate, share_s / 6, clock, options), clock)
        low, middle, high = (float(value) for value in np.percentile(samples, [10, 50, 90]))
        sizes.append(float(moved))
        medians.append(middle)
        means.append(float(np.clip(samples, None, np.percentile(samples, RARE)).mean()))
        spreads.append((high - low) / middle)
        spent = torch.tensor([time.monotonic() - start], device=clock.device)
        dist.broadcast(spent, 0)
        size *= FACTOR if len(sizes) > 1 else FACTOR**2
        enough = len(sizes) >= MIN_SIZES and middle >= GROWN * medians[0]
        if (enough and (float(spent) > share_s or _next_seconds(sizes, medians, size) > options.longest_s)) or (
            middle > 10 * options.longest_s
        ):
            break
    return CollectiveCurve(
        op=op,
        num_ranks=shape.num_ranks,
        ranks_per_node=shape.ranks_per_node,
        message_bytes=tuple(sizes),
        seconds=monotone(sizes, medians),
        spread=tuple(spreads),
        mean_s=monotone_mean(means),
        source=source,
    )


def monotone(sizes: Sequence[float], medians: Sequence[float]) -> tuple[float, ...]:
    """Medians freed of what disturbances added: no size takes longer than a larger one.

    The last two points say what larger messages cost. Where a disturbance left them level, the last but one is lowered
    until their slope is half of the mean slope over all sizes, below which no curve that ends in bytes falls.
    """
    times = np.minimum.accumulate(np.asarray(medians)[::-1])[::-1].copy()
    if len(times) > 2:
        mean_slope = (times[-1] - times[0]) / (sizes[-1] - sizes[0])
        times[-2] = min(times[-2], times[-1] - mean_slope / 2 * (sizes[-1] - sizes[-2]))
        times[:-1] = np.minimum(times[:-1], times[-2])
    return tuple(float(value) for value in times)


def monotone_mean(means: Sequence[float]) -> tuple[float, ...]:
    """Means made monotone in size without a bias up or down: half way between the two tightest monotone bounds."""
    above = np.maximum.accumulate(np.asarray(means))
    below = np.minimum.accumulate(np.asarray(means)[::-1])[::-1]
    return tuple(float(value) for value in (above + below) / 2)


def _next_seconds(sizes: Sequence[float], medians: Sequence[float], size: int) -> float:
    """Where the last two points lead."""
    slope = (medians[-1] - medians[-2]) / (sizes[-1] - sizes[-2])
    return medians[-1] + max(slope, 0.0) * (size - sizes[-1])


def _samples(
    call: Call, estimate: float, budget_s: float, clock: DeviceClock, options: CollectiveOptions
) -> list[float]:
    """Seconds a call, after barriers, so that groups start together.

    On a CPU each call is timed by itself: the median then forgets calls that another process interrupted. On a GPU
    short calls are timed several in a row, as waiting for the device costs more than they do.
    """
    in_a_row = int(np.clip(2e-3 / max(estimate, 1e-6), 1, 16))
    repeats = int(np.clip(budget_s / max(estimate * in_a_row, 1e-6), 3, options.repeats))
    alone = clock.device.type == "cpu"
    out = []
    for _ in range(repeats):
        dist.barrier()
        calls, samples = (1, in_a_row) if alone else (in_a_row, 1)
        out += clock.samples(call, calls=calls, repeats=samples)
    return out


def _together(samples: Sequence[float], clock: DeviceClock) -> list[float]:
    """Each sample's slowest rank."""
    tensor = torch.tensor(samples, dtype=torch.float64, device=clock.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor.cpu()]


def _call(
    op: CollectiveOp, size: int, num_ranks: int, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Call, int]:
    """A call moving about ``size`` bytes of float32, and the exact size of its whole tensor."""
    share = max(1, size // 4 // num_ranks)
    whole = share * num_ranks
    if group is None:  # this rank is in no group of the shape
        return lambda: None, 4 * whole
    tensor = torch.zeros(whole, device=device)
    if op == "all_reduce":
        return lambda: dist.all_reduce(tensor, group=group), 4 * whole
    if op == "broadcast":
        members = dist.get_process_group_ranks(group)
        turn = iter(range(2**62))  # the source changes each call, or it would run ahead of those that follow
        return lambda: dist.broadcast(tensor, members[next(turn) % num_ranks], group=group), 4 * whole
    if op == "all_to_all":
        received = torch.empty_like(tensor)
        return lambda: dist.all_to_all_single(received, tensor, group=group), 4 * whole
    part = torch.zeros(share, device=device)
    if op == "all_gather":
        return lambda: _all_gather(tensor, part, group=group), 4 * whole
    return lambda: _reduce_scatter(part, tensor, group=group), 4 * whole
