"""Shortened lists of actions as graphs: which passes wait for which, and which period is repeated (``shortened``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from meshwright.cost_models.player import node_levels, transfers
from meshwright.cost_models.schedules import Actions, Pass, check, rank_actions, stage_indices
from meshwright.cost_models.strategy import IntArray, Schedule


def shortest(schedule: Schedule, pp: int) -> int:
    """Periods after which a list is shortened: the warm-up is over on all ranks, and there is a slab and some more."""
    if schedule is Schedule.INTERLEAVED:
        return 3
    return {Schedule.ONE_F_ONE_B: pp + 1, Schedule.ZB_H1: pp + 5, Schedule.ZBV: 2 * pp}.get(schedule, 2 * pp + 1)


def slabs(schedule: Schedule, pp: int, vpp: int, per_round: int) -> list[slice]:
    """The places of the repeated period in each rank's shortened list; what they wait for is not behind them."""
    ranks = range(pp)
    if schedule is Schedule.ONE_F_ONE_B:  # warm-up, then B F
        starts, length = [pp - rank for rank in ranks], 2
    elif schedule is Schedule.INTERLEAVED:  # warm-up, then F B for all chunks
        starts, length = [(vpp - 1) * per_round + 2 * (pp - 1 - rank) for rank in ranks], 2 * vpp * per_round
    elif schedule is Schedule.ZB_H1:  # F t, I t - (pp - 1 - rank), W t - (pp - 1) for t up to pp + 1
        starts, length = [(pp + 2) + (rank + 3) + 3 for rank in ranks], 3
    elif schedule is Schedule.ZBV:  # F, I W, F, I W of both chunks
        starts, length = [2 * pp - 1 - rank + pp + 2 * (pp - rank) for rank in ranks], 6
    else:  # two pairs; one period stays before the slab, since on the last rank it is not quite the same
        starts, length = [2 * pp - rank + pp + 1 + 2 * (pp - 1 - rank) + 2 for rank in ranks], 4
    return [slice(start, start + length) for start in starts]


@dataclass(frozen=True, slots=True)
class ShortLists:
    """The passes of shortened lists that wait or are waited for, as nodes in order of time; node 0 is the start.

    Node ``i`` starts when ``after[i]``, on its rank, has ended and the passes in between are done, row ``gap[i]``, and
    when ``arrives[i]`` has ended and the transfer, row ``delay[i]``, is over; it takes row ``seconds[i]``. ``delay``
    and ``seconds`` are rows of the table of times; gap ``g`` is the sum over ``t`` of ``gap_counts[g, t]`` times row
    ``gap_rows[g, t]``. ``before`` and ``behind`` are runs of nodes of which none waits for another, up to the slab's
    end and after it; ``slab`` are the slab's nodes, on ranks ``slab_rank``.
    """

    stages: IntArray  # [pp, vpp]
    after: IntArray
    gap: IntArray
    arrives: IntArray
    delay: IntArray
    seconds: IntArray
    gap_rows: IntArray
    gap_counts: IntArray
    before: tuple[slice, ...]
    behind: tuple[slice, ...]
    slab: IntArray
    slab_rank: IntArray
    last: IntArray  # [pp]


@lru_cache(maxsize=1024)
def short_lists(schedule: Schedule, pp: int, vpp: int, periods: int, per_round: int) -> ShortLists:
    """The shortened lists of ``periods`` periods, of ``per_round`` micro-batches each."""
    check(schedule, pp, vpp, periods * per_round, per_round)
    stages = stage_indices(schedule, pp, vpp)
    repeated: list[slice] | None = None
    if periods >= shortest(schedule, pp):
        repeated = slabs(schedule, pp, vpp, per_round)
    builder = _Builder(stages, repeated)
    if schedule is Schedule.INTERLEAVED:
        builder.interleave(periods, per_round)
    else:
        builder.take(rank_actions(schedule, pp, vpp, periods))
    return builder.short()


class _Builder:
    """The columns of ``ShortLists``, rank by rank, and then in order of time."""

    def __init__(self, stages: IntArray, repeated: list[slice] | None) -> None:
        self.stages, self.repeated = stages, repeated
        self.nothing = 5 * stages.size - 1
        self.rows = {kind: stages.size * place for place, kind in enumerate(Pass)}
        self.after, self.gap, self.seconds = [0], [0], [self.nothing]
        self.arrives, self.delay = [0], [self.nothing]
        self.slab_rank, self.behind = [-1], [False]
        self.last: list[int] = []
        self.gap_rows = self.gap_counts = np.zeros((1, 0), dtype=np.int64)

    def take(self, lists: tuple[Actions, ...]) -> None:
        """Of lists those actions that wait or are waited for."""
        edges = transfers(lists, self.stages)
        kept = {edge[:2] for edge in edges} | {edge[2:4] for edge in edges}
        gaps: dict[tuple[tuple[int, int], ...], int] = {(): 0}
        nodes: dict[tuple[int, int], int] = {}
        for rank, actions in enumerate(lists):
            slab = slice(0, 0) if self.repeated is None else self.repeated[rank]
            kept |= {(rank, len(actions) - 1), (rank, slab.stop - 1)}
            previous, between = 0, Counter[int]()
            for place, action in enumerate(actions):
                row = self.rows[action.kind] + action.stage
                if (rank, place) not in kept:
                    between[row] += 1
                    continue
                self.after.append(previous)
                self.gap.append(gaps.setdefault(tuple(sorted(between.items())), len(gaps)))
                self.seconds.append(row)
                self.slab_rank.append(rank if slab.start <= place < slab.stop else -1)
                self.behind.append(self.repeated is not None and place >= slab.stop)
                previous = nodes[rank, place] = len(self.after) - 1
                between.clear()
            self.last.append(previous)
        self.arrives, self.delay = [0] * len(self.after), [self.nothing] * len(self.after)
        for sender, leaves, receiver, needed, stage in edges:
            node = nodes[receiver, needed]
            self.arrives[node], self.delay[node] = nodes[sender, leaves], 4 * self.stages.size + stage
        width = max(len(gap) for gap in gaps)
        padded = [[*gap, *[(self.nothing, 0)] * (width - len(gap))] for gap in gaps]
        table = np.array(padded, dtype=np.int64).reshape(len(padded), width, 2)
        self.gap_rows, self.gap_counts = table[:, :, 0], table[:, :, 1]

    def interleave(self, rounds: int, size: int) -> None:
        """Of interleaved lists the first and the last micro-batch of each round in each chunk.

        Slot ``n`` of the forwards is in window ``n // size``, whose chunk is the window's rest by ``vpp``; backwards
        take the chunks the other way round. Forwards and backwards take turns once the warm-up is over.
        """
        (pp, vpp), num_stages = self.stages.shape, self.stages.size
        total, rank = rounds * vpp * size, np.arange(pp)[:, None]
        slots = (np.arange(rounds * vpp)[:, None] * size + np.unique([0, size - 1])).ravel()
        warm_up = np.minimum((vpp - 1) * size + 2 * (pp - 1 - rank), total)
        forward_places = np.where(slots < warm_up, slots, 2 * slots - warm_up)
        backward_places = np.where(slots < total - warm_up, warm_up + 2 * slots + 1, total + slots)
        places = np.concatenate([forward_places, backward_places], axis=1)
        order = np.argsort(places, axis=1)
        places, forward = np.take_along_axis(places, order, axis=1), order < len(slots)
        slot = slots[order % len(slots)]

        def row(forward: Any, slot: IntArray) -> IntArray:
            chunk = slot // size % vpp
            stage = np.where(forward, chunk, vpp - 1 - chunk) * pp + rank
            return np.asarray(np.where(forward, self.rows[Pass.FORWARD], self.rows[Pass.BACKWARD]) + stage)

        forwards = np.where(forward, slot, places - slot)  # before this place
        backwards = places - forwards
        nothing = np.zeros((pp, 1), dtype=np.int64)
        passed = [
            np.concatenate([nothing, (before + own)[:, :-1]], axis=1)
            for before, own in ((forwards, forward), (backwards, ~forward))
        ]
        between = [row(True, passed[0]), forwards - passed[0], row(False, passed[1]), backwards - passed[1]]
        gaps, gap = np.unique(np.stack(between, axis=2).reshape(-1, 4), axis=0, return_inverse=True)
        self.gap_rows, self.gap_counts = gaps[:, 0::2], gaps[:, 1::2]
        nodes = 1 + np.arange(places.size).reshape(places.shape)
        self.last = nodes[:, -1].tolist()
        after = nodes - 1
        after[:, 0] = 0
        self.after, self.gap = [0, *after.ravel().tolist()], [0, *gap.ravel().tolist()]
        self.seconds = [self.nothing, *row(forward, slot).ravel().tolist()]
        behind, in_slab = np.zeros_like(forward), np.zeros_like(forward)
        if self.repeated is not None:
            start, stop = (np.array([[getattr(slab, end)] for slab in self.repeated]) for end in ("start", "stop"))
            behind, in_slab = places >= stop, (places >= start) & (places < stop)
        self.behind = [False, *behind.ravel().tolist()]
        self.slab_rank = [-1, *np.where(in_slab, rank, -1).ravel().tolist()]
        arrives, delay = np.zeros(places.size + 1, dtype=np.int64), np.full(places.size + 1, self.nothing)
        found = np.empty_like(nodes)
        np.put_along_axis(found, order, nodes, axis=1)
        ends = len(slots) // (rounds * vpp)
        for half, turned in ((found[:, : len(slots)], False), (found[:, len(slots) :], True)):
            by_chunk = half.reshape(pp, rounds, vpp, ends).transpose(2, 0, 1, 3)
            stage = (by_chunk[::-1] if turned else by_chunk).reshape(num_stages, rounds, ends)
            later, earlier = (stage[:-1], stage[1:]) if turned else (stage[1:], stage[:-1])
            if pp > 1:
                arrives[later] = earlier
                delay[later] = 4 * num_stages + np.arange(num_stages - 1)[:, None, None]
        self.arrives, self.delay = arrives.tolist(), delay.tolist()

    def short(self) -> ShortLists:
        """Number the nodes in order of time, those up to the slab's end first."""
        order, levels = node_levels(self.after, self.arrives)
        level = np.zeros(len(order), dtype=np.int64)
        for number, nodes in enumerate(levels, start=1):
            level[order[nodes]] = number
        behind = np.array(self.behind)
        order = np.lexsort((level, behind))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        num_before = len(order) - int(behind.sum())
        changes = (np.flatnonzero(np.diff(level[order])) + 1).tolist()
        runs = [slice(start, end) for start, end in pairwise(sorted({*changes, num_before, len(order)}))]
        slab = np.flatnonzero(np.array(self.slab_rank) >= 0)
        return ShortLists(
            stages=self.stages,
            after=place[np.array(self.after)[order]],
            gap=np.array(self.gap)[order],
            arrives=place[np.array(self.arrives)[order]],
            delay=np.array(self.delay)[order],
            seconds=np.array(self.seconds)[order],
            gap_rows=self.gap_rows,
            gap_counts=self.gap_counts,
            before=tuple(run for run in runs if run.start < num_before),
            behind=tuple(run for run in runs if run.start >= num_before),
            slab=place[slab],
            slab_rank=np.array(self.slab_rank)[slab],
            last=place[self.last],
        )
