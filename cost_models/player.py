"""Plays a schedule action by action: when every rank starts and ends each pass, for one config or many at once.

A rank runs its list in order, each action as soon as the one before it has ended and what it needs has arrived: the
forward of the stage before, the gradient of the stage after, its own forward or input gradient. A result takes ``hop``
seconds to the next stage, and none to a stage on the same rank.

* Sends in the background (the default): a transfer starts when its result is there and delays the receiver only. Links
  carry any number of transfers at once.
* ``blocking_sends``, for one chunk a rank: a transfer starts when both ranks have come to it and holds both until it
  ends. Where a rank turns from forward to backward, or back, it sends and receives in one exchange, both ways at the
  same time; between two passes of the same direction it sends, then receives. So Megatron-LM's 1F1B without
  interleaving (``megatron/core/pipeline_parallel/schedules.py``: ``send_forward_recv_backward`` and
  ``send_backward_recv_forward``, otherwise ``recv_forward`` and ``send_forward`` apart).

Left out: anything that makes the same pass take longer once than another time, and links shared by other traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.schedules import Action, Actions, Pass, rank_actions, stage_indices
from meshwright.cost_models.strategy import IntArray, Schedule
from meshwright.profiler.record import record

FloatArray = NDArray[np.float64]

_BLOCK_BYTES = 64 << 20  # configs are played in blocks whose times fit into this


@record
class TimelineEntry:
    """One pass in a played step, seconds from its start."""

    rank: int
    kind: Pass
    stage: int
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Played:
    """When the ranks of each config end their last action, and how long they worked: ``[num_configs, pp]`` seconds."""

    finish: FloatArray
    busy: FloatArray

    @property
    def makespan(self) -> FloatArray:
        """Seconds from the start until all ranks are done: ``[num_configs]``."""
        return np.asarray(self.finish.max(axis=1))

    @property
    def bubble_share(self) -> FloatArray:
        """Idle part of all ranks' time, 0 to 1: ``[num_configs]``."""
        return np.asarray(1.0 - self.busy.mean(axis=1) / self.makespan)


def by_stage(schedule: Schedule, chunks: FloatArray) -> FloatArray:
    """``[num_configs, pp, vpp]``, by rank and chunk, in the order of the stages: ``[num_configs, pp * vpp]``."""
    pp, vpp = chunks.shape[1:]
    result = np.empty((len(chunks), pp * vpp))
    result[:, stage_indices(schedule, pp, vpp)] = chunks
    return result


def play(
    schedule: Schedule,
    pp: int,
    microbatches: int,
    forward: FloatArray,
    backward_input: FloatArray,
    backward_weight: FloatArray,
    hop: FloatArray,
    *,
    per_round: int | None = None,
    blocking_sends: bool = False,
) -> Played:
    """Play one schedule for many configs of ``pp`` ranks at once.

    ``forward``, ``backward_input``, ``backward_weight``: seconds of a pass of each stage,
    ``[num_configs, num_stages]``; a backward that is not split takes the sum of the last two. ``hop``: seconds of a
    transfer between each two stages that follow each other, ``[num_configs, num_stages - 1]``. ``per_round`` as in
    ``schedules.rank_actions``.

    Raises ``InputError`` when the schedule does not run with these numbers, or for ``blocking_sends`` with several
    chunks a rank.
    """
    game = _game(schedule, pp, forward.shape[1] // pp, microbatches, per_round, blocking_sends)
    finish = np.empty((len(forward), pp))
    block = max(1, _BLOCK_BYTES // (8 * len(game.seconds)))
    for start in range(0, len(forward), block):
        rows = slice(start, start + block)
        ends = game.ends(forward[rows], backward_input[rows], backward_weight[rows], hop[rows])
        finish[rows] = ends[game.last].T
    stages = stage_indices(schedule, pp, forward.shape[1] // pp)
    work = (forward + backward_input + backward_weight) * microbatches
    return Played(finish, work[:, stages].sum(axis=2))


def timeline(
    schedule: Schedule,
    pp: int,
    microbatches: int,
    forward: FloatArray,
    backward_input: FloatArray,
    backward_weight: FloatArray,
    hop: FloatArray,
    *,
    per_round: int | None = None,
    blocking_sends: bool = False,
) -> tuple[TimelineEntry, ...]:
    """Every pass of one config, rank by rank in order: arguments as of ``play``, arrays ``[num_stages]``."""
    game = _game(schedule, pp, len(forward) // pp, microbatches, per_round, blocking_sends)
    columns = (forward[None], backward_input[None], backward_weight[None], hop[None])
    ends = game.ends(*columns)[:, 0]
    seconds = game.table(*columns)[game.seconds, 0]
    return tuple(
        TimelineEntry(
            rank=rank,
            kind=action.kind,
            stage=action.stage,
            microbatch=action.microbatch,
            start_s=float(ends[node] - seconds[node]),
            end_s=float(ends[node]),
        )
        for rank, action, node in game.passes
    )


@dataclass(frozen=True, slots=True)
class _Game:
    """A schedule as a graph whose nodes are passes and, with blocking sends, transfers.

    Node 0 is the start. Node ``i`` starts when nodes ``after[i]`` and ``arrives[i]`` have ended, the latter followed by
    the transfer ``delay[i]``; ``seconds`` and ``delay`` are rows of ``table``. ``levels`` are runs of nodes in which
    none waits for another.
    """

    after: IntArray
    arrives: IntArray
    delay: IntArray
    seconds: IntArray
    levels: tuple[slice, ...]
    last: IntArray  # [pp]: the node of each rank's last pass
    passes: tuple[tuple[int, Action, int], ...]  # rank, action, node

    def table(
        self, forward: FloatArray, backward_input: FloatArray, backward_weight: FloatArray, hop: FloatArray
    ) -> Any:
        """Seconds by row: the four kinds of pass of each stage, the hops, nothing: ``[rows, num_configs]``."""
        nothing = np.zeros((len(forward), 1))
        whole = backward_input + backward_weight
        return np.concatenate([forward, whole, backward_input, backward_weight, hop, nothing], axis=1).T.copy()

    def ends(self, *columns: FloatArray) -> Any:
        """When each node ends: ``[num_nodes, num_configs]`` seconds."""
        table = self.table(*columns)
        ends = np.zeros((len(self.seconds), table.shape[1]))
        for level in self.levels:
            arrival = ends[self.arrives[level]] + table[self.delay[level]]
            np.maximum(arrival, ends[self.after[level]], out=arrival)
            np.add(arrival, table[self.seconds[level]], out=ends[level])
        return ends


@lru_cache(maxsize=32)
def _game(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, per_round: int | None, blocking_sends: bool
) -> _Game:
    lists = rank_actions(schedule, pp, vpp, microbatches, per_round)
    if blocking_sends and vpp > 1:
        raise InputError(f"blocking sends are modelled for one chunk on each rank, not for {schedule.value}")
    graph = _Graph(lists, stage_indices(schedule, pp, vpp), blocking_sends)
    order, levels = _levels(graph.after, graph.arrives)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    passes = [
        (rank, action, int(place[graph.first[rank] + index]))
        for rank, actions in enumerate(lists)
        for index, action in enumerate(actions)
    ]
    return _Game(
        after=place[np.array(graph.after)[order]],
        arrives=place[np.array(graph.arrives)[order]],
        delay=np.array(graph.delay)[order],
        seconds=np.array(graph.seconds)[order],
        levels=levels,
        last=place[np.array([graph.first[rank] + len(actions) - 1 for rank, actions in enumerate(lists)])],
        passes=tuple(passes),
    )


class _Graph:
    """The columns of a ``_Game``, passes rank by rank and then transfers, not yet in order of time."""

    def __init__(self, lists: tuple[Actions, ...], stages: IntArray, blocking: bool) -> None:
        self.lists, self.num_stages = lists, stages.size
        self.rank_of = {int(stage): rank for rank, row in enumerate(stages) for stage in row}
        self.nothing = 5 * self.num_stages - 1  # the last row of the table
        self.first = np.cumsum([1, *(len(actions) for actions in lists)]).tolist()
        self.made = {
            (action.kind is Pass.FORWARD, action.stage, action.microbatch): (rank, place)
            for rank, actions in enumerate(lists)
            for place, action in enumerate(actions)
            if action.kind is not Pass.WEIGHT_GRADIENT
        }
        self.after, self.arrives, self.delay, self.seconds = [0], [0], [self.nothing], [self.nothing]
        kinds = {kind: self.num_stages * row for row, kind in enumerate(Pass)}
        for rank, actions in enumerate(lists):
            for place, action in enumerate(actions):
                self.after.append(self.first[rank] + place - 1 if place else 0)
                self.arrives.append(0)
                self.delay.append(self.nothing)
                self.seconds.append(kinds[action.kind] + action.stage)
        self._exchange() if blocking else self._arrive()

    def source(self, action: Action) -> tuple[int, int, int] | None:
        """What ``action`` waits for from another rank: that rank, the place in its list, the table's row of the hop."""
        forward = action.kind is Pass.FORWARD
        other = action.stage - 1 if forward else action.stage + 1
        inside = action.kind is not Pass.WEIGHT_GRADIENT and 0 <= other < self.num_stages
        if not inside or self.rank_of[other] == self.rank_of[action.stage]:
            return None
        return *self.made[forward, other, action.microbatch], 4 * self.num_stages + min(other, action.stage)

    def _arrive(self) -> None:
        for rank, actions in enumerate(self.lists):
            for place, action in enumerate(actions):
                if found := self.source(action):
                    node, (peer, made, hop) = self.first[rank] + place, found
                    leaves = made + self.lists[peer][made].leaves_with_next
                    self.arrives[node], self.delay[node] = self.first[peer] + leaves, hop

    def _exchange(self) -> None:
        """One node for each transfer; passes then wait for the transfers on both sides of them."""
        sent: dict[int, int] = {}  # pass -> its transfer
        received: dict[int, tuple[int, int]] = {}  # pass -> the transfer it waits for, and the pass that sends
        for rank, actions in enumerate(self.lists):
            for place, action in enumerate(actions):
                if found := self.source(action):
                    peer, made, hop = found
                    sent[self.first[peer] + made] = len(self.after)
                    received[self.first[rank] + place] = len(self.after), self.first[peer] + made
                    for column, value in zip(
                        (self.after, self.arrives, self.delay, self.seconds), (0, 0, self.nothing, hop), strict=True
                    ):
                        column.append(value)
        for rank, actions in enumerate(self.lists):
            for place, action in enumerate(actions):
                node = self.first[rank] + place
                before = node - 1 if place else 0
                held = sent.get(before, before) if place else 0
                self.after[node] = held
                if node in received:
                    transfer, sender = received[node]
                    turns = place > 0 and (actions[place - 1].kind is Pass.FORWARD) != (action.kind is Pass.FORWARD)
                    self.after[transfer], self.arrives[transfer] = before if turns else held, sender
                    self.arrives[node] = transfer


def _levels(after: list[int], arrives: list[int]) -> tuple[IntArray, tuple[slice, ...]]:
    """Nodes ordered so that each comes after those it waits for, and the runs of which none waits for another.

    Raises ``InputError`` when nodes wait for each other in a circle.
    """
    followers: list[list[int]] = [[] for _ in after]
    for node in range(1, len(after)):
        followers[after[node]].append(node)
        followers[arrives[node]].append(node)
    missing = [0] + [2] * (len(after) - 1)
    order, starts, level = [0], [0], [0]
    while level:
        following = []
        for node in level:
            for follower in followers[node]:
                missing[follower] -= 1
                if not missing[follower]:
                    following.append(follower)
        level = following
        starts.append(len(order))
        order += level
    if len(order) < len(after):
        raise InputError("with blocking sends the ranks of this schedule would wait for each other for ever")
    levels = tuple(slice(start, end) for start, end in pairwise(starts[1:]))
    return np.array(order), levels
