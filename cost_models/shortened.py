"""A lower bound of a played step, from a play of its beginning and its end: what ranks millions of configs.

After their warm-up all ranks repeat one period of actions. So a list for ``m`` micro-batches is a shorter list with
more periods put in after one that is there, the *slab*. Play the short lists; move all ends in the slab by the time
that the periods left out take at least, and play on. Each end that comes out is the length of a chain of actions which
must follow each other in the full schedule: up to the slab the same actions, behind it those of the same name so many
periods later, between them these periods of one rank's own actions. So it is never above the played end, and equal to
it wherever the slowest chain crosses the periods on one rank. Few micro-batches are played in full.

Where results come back to a rank only after a way through its neighbours (1f1b, zb-h1, dualpipev), a chain may run in
loops instead: the forwards of ranks ``r`` to ``s``, the backwards of ``s`` to ``r``, and again with the micro-batch
that the schedule lets in for this one. One such loop takes ``s - r + 1`` periods, and with transfers it is longer than
these periods of one rank. Of the many intervals ``(r, s)`` those are tried that end at the first or the last rank, and
pairs of neighbours.

Links carry any number of transfers at once here, which can only be faster. Interleaved lists wait for the first and the
last micro-batch of a round only; in between a chunk runs on one rank like jobs of equal length through a flow shop,
where waiting for others in the middle is hardly ever the longest chain (0.2 % at most on random stages).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.player import node_levels, transfers
from meshwright.cost_models.schedules import Actions, Pass, check, rank_actions, stage_indices
from meshwright.cost_models.strategy import V_SHAPED, IntArray, Schedule

FloatArray = NDArray[np.float64]

_BLOCK_NUMBERS = 250_000  # configs are played in blocks whose times stay in the processor's cache
_LOOPED_BACK = (Schedule.ONE_F_ONE_B, Schedule.ZB_H1, Schedule.DUALPIPEV)


def finish(
    schedule: Schedule,
    forward: FloatArray,
    backward_input: FloatArray,
    backward_weight: FloatArray,
    hop: FloatArray,
    microbatches: IntArray,
    per_round: IntArray,
) -> FloatArray:
    """At least the seconds from the start to each rank's last action: ``[num_configs, pp]``.

    Arguments as of ``pipeline.finish``. Raises ``InputError`` where the schedule does not run with these numbers.
    """
    pp, vpp = forward.shape[1:]
    size = per_round if schedule is Schedule.INTERLEAVED else np.ones_like(microbatches)
    periods, left = np.divmod(microbatches, size)
    if left.any():
        row = int(np.argmax(left))
        raise InputError(f"interleaved: {size[row]} micro-batches a round do not divide {microbatches[row]}")
    least = shortest(schedule, pp)
    loop = pp if schedule in _LOOPED_BACK else 1
    few = np.where(periods > least, least + (periods - least) % loop, periods)
    result = np.empty(forward.shape[:2])
    keys, group = np.unique(few << 32 | size, return_inverse=True)
    for number, key in enumerate(keys.tolist()):
        rows = np.flatnonzero(group == number)
        played, one = key >> 32, key & 0xFFFFFFFF
        short = _short(schedule, pp, vpp, played, one)
        block = max(500, _BLOCK_NUMBERS // len(short.seconds))
        for start in range(0, len(rows), block):
            some = rows[start : start + block]
            work = (forward[some], backward_input[some], backward_weight[some])
            result[some] = short.finish(schedule, *work, hop[some], microbatches[some] - played * one)
    return result


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
class _Short:
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

    def finish(
        self,
        schedule: Schedule,
        forward: FloatArray,
        backward_input: FloatArray,
        backward_weight: FloatArray,
        hop: FloatArray,
        more: IntArray,
    ) -> FloatArray:
        """When each rank ends, with periods of ``more`` micro-batches put in: ``[num_configs, pp]`` seconds."""
        num_stages, num_configs = self.stages.size, len(forward)
        table = np.zeros((5 * num_stages, num_configs))
        passes = (forward, backward_input + backward_weight, backward_input, backward_weight)
        for kind, seconds in enumerate(passes):
            table[kind * num_stages + self.stages] = seconds.transpose(1, 2, 0)
        table[4 * num_stages : -1] = hop.T
        gaps = np.zeros((len(self.gap_rows), num_configs))
        for rows, counts in zip(self.gap_rows.T, self.gap_counts.T, strict=True):
            gaps += table[rows] * counts[:, None]
        ends = np.zeros((len(self.seconds), num_configs))
        self._play(self.before, table, gaps, ends)
        if more.any():
            ends[self.slab] += _periods(schedule, passes, hop, more)[self.slab_rank]
        self._play(self.behind, table, gaps, ends)
        return ends[self.last].T

    def _play(self, levels: tuple[slice, ...], table: FloatArray, gaps: FloatArray, ends: FloatArray) -> None:
        sends = table[4 * self.stages.size :].any()
        for level in levels:
            start = ends[self.after[level]]
            if len(gaps) > 1:
                start += gaps[self.gap[level]]
            arrival = ends[self.arrives[level]]
            if sends:
                arrival += table[self.delay[level]]
            np.maximum(start, arrival, out=start)
            np.add(start, table[self.seconds[level]], out=ends[level])


def _periods(
    schedule: Schedule, passes: tuple[FloatArray, FloatArray, FloatArray, FloatArray], hop: FloatArray, more: IntArray
) -> FloatArray:
    """Seconds that periods of ``more`` micro-batches take each rank at least, loops included: ``[pp, num_configs]``."""
    forward, backward, backward_input, backward_weight = passes
    pp = forward.shape[1]
    work = np.ascontiguousarray((forward + backward).sum(axis=2).T)
    result = more.astype(np.float64) * work
    if schedule not in _LOOPED_BACK or not hop.any():
        return np.asarray(result)
    links = hop[:, : pp - 1] * 2 if schedule not in V_SHAPED else hop[:, : pp - 1] + hop[:, : pp - 1 : -1]
    through, top = work, 0.0 * work
    if schedule is Schedule.ZB_H1:  # weight gradients stand in the way of the next forward only
        through, top = (forward + backward_input)[:, :, 0].T, backward_weight[:, :, 0].T
    start = np.zeros((1, len(forward)))
    to = np.concatenate([start, np.cumsum(through, axis=0)])
    over = np.concatenate([start, np.cumsum(links.T, axis=0)])
    inner = range(1, pp - 1)
    for first, end in {*((0, s) for s in inner), *((r, pp - 1) for r in range(pp - 1)), *pairwise(range(pp))}:
        ranks = slice(first, end + 1)
        loop = to[end + 1] - to[first] + over[end] - over[first] + top[first]
        turns, left = np.divmod(more, end + 1 - first)
        np.maximum(result[ranks], turns * loop + left * work[ranks], out=result[ranks])
    return np.asarray(result)


@lru_cache(maxsize=1024)
def _short(schedule: Schedule, pp: int, vpp: int, periods: int, per_round: int) -> _Short:
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
    """The columns of a ``_Short``, rank by rank, and then in order of time."""

    def __init__(self, stages: IntArray, repeated: list[slice] | None) -> None:
        self.stages, self.repeated = stages, repeated
        self.nothing = 5 * stages.size - 1
        self.rows = {kind: stages.size * place for place, kind in enumerate(Pass)}
        self.gaps: dict[tuple[tuple[int, int], ...], int] = {(): 0}
        self.after, self.gap, self.seconds = [0], [0], [self.nothing]
        self.arrives, self.delay = [0], [self.nothing]
        self.slab_rank, self.behind = [-1], [False]
        self.last: list[int] = []

    def add(self, rank: int, place: int, row: int, after: int, between: tuple[tuple[int, int], ...]) -> int:
        """A node for the action at ``place``, after another and what is ``between``: rows and how often each."""
        slab = slice(0) if self.repeated is None else self.repeated[rank]
        self.after.append(after)
        self.gap.append(self.gaps.setdefault(between, len(self.gaps)))
        self.seconds.append(row)
        self.arrives.append(0)
        self.delay.append(self.nothing)
        self.slab_rank.append(rank if place in range(slab.start or 0, slab.stop) else -1)
        self.behind.append(self.repeated is not None and place >= slab.stop)
        return len(self.after) - 1

    def wait(self, node: int, other: int, stage: int) -> None:
        """``node`` waits for what ``other`` sends over the hop behind ``stage``."""
        self.arrives[node], self.delay[node] = other, 4 * self.stages.size + stage

    def take(self, lists: tuple[Actions, ...]) -> None:
        """Of lists those actions that wait or are waited for."""
        edges = transfers(lists, self.stages)
        kept = {edge[:2] for edge in edges} | {edge[2:4] for edge in edges}
        nodes: dict[tuple[int, int], int] = {}
        for rank, actions in enumerate(lists):
            kept |= {(rank, len(actions) - 1)} | ({(rank, self.repeated[rank].stop - 1)} if self.repeated else set())
            previous, between = 0, Counter[int]()
            for place, action in enumerate(actions):
                row = self.rows[action.kind] + action.stage
                if (rank, place) in kept:
                    previous = self.add(rank, place, row, previous, tuple(sorted(between.items())))
                    between.clear()
                    nodes[rank, place] = previous
                else:
                    between[row] += 1
            self.last.append(previous)
        for sender, leaves, receiver, needed, stage in edges:
            self.wait(nodes[receiver, needed], nodes[sender, leaves], stage)

    def interleave(self, rounds: int, size: int) -> None:
        """Of interleaved lists the first and the last micro-batch of each round in each chunk.

        Slot ``n`` of the forwards is in window ``n // size``, whose chunk is the window's rest by ``vpp``; backwards
        take the chunks the other way round. Forwards and backwards take turns once the warm-up is over.
        """
        pp, vpp = self.stages.shape
        total = rounds * vpp * size
        slots = sorted({window * size + end for window in range(rounds * vpp) for end in (0, size - 1)})
        nodes: dict[tuple[bool, int, int], int] = {}

        def row(forward: bool, rank: int, slot: int) -> int:
            chunk = slot // size % vpp
            stage = chunk * pp + rank if forward else (vpp - 1 - chunk) * pp + rank
            return self.rows[Pass.FORWARD if forward else Pass.BACKWARD] + stage

        for rank in range(pp):
            warm_up = min((vpp - 1) * size + 2 * (pp - 1 - rank), total)
            places = [(slot if slot < warm_up else 2 * slot - warm_up, True, slot) for slot in slots]
            places += [
                (warm_up + 2 * slot + 1 if slot < total - warm_up else total + slot, False, slot) for slot in slots
            ]
            previous, forwards, backwards = 0, 0, 0  # the passes so far
            for place, forward, slot in sorted(places):
                before = slot if forward else place - slot  # forwards before this place
                between = ((True, forwards, before - forwards), (False, backwards, place - before - backwards))
                gap = tuple((row(kind, rank, first), count) for kind, first, count in between if count)
                own = row(forward, rank, slot)
                previous = self.add(rank, place, own, previous, gap)
                forwards, backwards = before + forward, place - before + (not forward)
                nodes[forward, own % self.stages.size, slot // size // vpp * size + slot % size] = previous
            self.last.append(previous)
        for (forward, stage, microbatch), node in nodes.items():
            other = stage - 1 if forward else stage + 1
            if pp > 1 and 0 <= other < self.stages.size:
                self.wait(node, nodes[forward, other, microbatch], min(stage, other))

    def short(self) -> _Short:
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
        starts = [1, *(np.flatnonzero(np.diff(level[order]) | np.diff(behind[order])) + 1).tolist()[1:], len(order)]
        runs = [slice(start, end) for start, end in pairwise(sorted({*starts, num_before}))]
        slab = np.flatnonzero(np.array(self.slab_rank) >= 0)
        width = max(len(gap) for gap in self.gaps)
        padded = [[*gap, *[(self.nothing, 0)] * (width - len(gap))] for gap in self.gaps]
        gaps = np.array(padded, dtype=np.int64).reshape(len(padded), width, 2)
        return _Short(
            stages=self.stages,
            after=place[np.array(self.after)[order]],
            gap=np.array(self.gap)[order],
            arrives=place[np.array(self.arrives)[order]],
            delay=np.array(self.delay)[order],
            seconds=np.array(self.seconds)[order],
            gap_rows=gaps[:, :, 0],
            gap_counts=gaps[:, :, 1],
            before=tuple(run for run in runs if run.start < num_before),
            behind=tuple(run for run in runs if run.start >= num_before),
            slab=place[slab],
            slab_rank=np.array(self.slab_rank)[slab],
            last=place[self.last],
        )
