"""Plays a schedule action by action: when every rank starts and ends each pass, for one config or many at once.

A rank runs its list in order, each action as soon as the one before it has ended and what it needs has arrived: the
forward of the stage before, the gradient of the stage after, its own forward or input gradient. A result takes ``hop``
seconds to the next stage, and none to a stage on the same rank.

* Sends in the background (the default): a transfer delays the receiver only. From one rank to another one transfer
  runs at a time, in the order in which their results are sent; both directions run at once.
* ``blocking_sends``, for gpipe and 1f1b: a transfer starts when both ranks have come to it and holds both until it
  ends. Where a rank turns from forward to backward, or back, it sends and receives in one exchange, both ways at the
  same time; between two passes of the same direction it sends, then receives. So Megatron-LM's 1F1B without
  interleaving (``megatron/core/pipeline_parallel/schedules.py``: ``send_forward_recv_backward`` and
  ``send_backward_recv_forward``, otherwise ``recv_forward`` and ``send_forward`` apart).

Left out: anything that makes the same pass take longer once than another time, and what else uses the links.
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

BLOCKING = (Schedule.GPIPE, Schedule.ONE_F_ONE_B)  # what is played with blocking sends
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

    Raises ``InputError`` when the schedule does not run with these numbers, or for ``blocking_sends`` with another
    schedule than gpipe and 1f1b.
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
    """Every pass of one config, rank by rank in order: arguments and errors as of ``play``, arrays ``[num_stages]``."""
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
    """A schedule as a graph whose nodes are passes and the transfers between ranks.

    Node 0 is the start. Node ``i`` starts when nodes ``first[i]`` and ``second[i]`` have ended and takes the seconds of
    row ``seconds[i]`` of ``table``. ``levels`` are runs of nodes of which none waits for another.
    """

    first: IntArray
    second: IntArray
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
            start = np.maximum(ends[self.first[level]], ends[self.second[level]])
            np.add(start, table[self.seconds[level]], out=ends[level])
        return ends


@lru_cache(maxsize=32)
def _game(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, per_round: int | None, blocking_sends: bool
) -> _Game:
    lists = rank_actions(schedule, pp, vpp, microbatches, per_round)
    if blocking_sends and schedule not in BLOCKING:
        raise InputError(f"blocking sends are modelled for gpipe and 1f1b, not for {schedule.value}")
    graph = _Graph(lists, stage_indices(schedule, pp, vpp))
    graph.exchange() if blocking_sends else graph.send()
    order, levels = node_levels(graph.first, graph.second)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return _Game(
        first=place[np.array(graph.first)[order]],
        second=place[np.array(graph.second)[order]],
        seconds=np.array(graph.seconds)[order],
        levels=levels,
        last=place[[nodes[-1] for nodes in graph.nodes]],
        passes=tuple(
            (rank, action, int(place[node]))
            for rank, actions in enumerate(lists)
            for action, node in zip(actions, graph.nodes[rank], strict=True)
        ),
    )


class _Graph:
    """The columns of a ``_Game``, passes rank by rank and then transfers, not yet in order of time."""

    def __init__(self, lists: tuple[Actions, ...], stages: IntArray) -> None:
        self.lists, self.num_stages = lists, stages.size
        nothing = 5 * self.num_stages - 1  # the last row of the table
        self.first, self.second, self.seconds = [0], [0], [nothing]
        rows = {kind: self.num_stages * place for place, kind in enumerate(Pass)}
        self.nodes = [
            [
                self.add(len(self.first) - 1 if place else 0, 0, rows[action.kind] + action.stage)
                for place, action in enumerate(actions)
            ]
            for actions in lists
        ]
        self.transfers = sorted(transfers(lists, stages))

    def add(self, first: int, second: int, seconds: int) -> int:
        """A node that waits for two others; its number."""
        for column, value in zip((self.first, self.second, self.seconds), (first, second, seconds), strict=True):
            column.append(value)
        return len(self.first) - 1

    def send(self) -> None:
        """Transfers in the background, one after another from each rank to each other."""
        on_link: dict[tuple[int, int], int] = {}
        for sender, leaves, receiver, needed, stage in self.transfers:
            before = on_link.get((sender, receiver), 0)
            node = self.add(self.nodes[sender][leaves], before, 4 * self.num_stages + stage)
            on_link[sender, receiver] = self.second[self.nodes[receiver][needed]] = node

    def exchange(self) -> None:
        """Transfers that hold both ranks: a pass waits for those on both sides of it."""
        sent: dict[tuple[int, int], int] = {}
        received: dict[tuple[int, int], int] = {}
        for sender, leaves, receiver, needed, stage in self.transfers:
            node = self.add(self.nodes[sender][leaves], 0, 4 * self.num_stages + stage)
            sent[sender, leaves] = received[receiver, needed] = node
        for rank, actions in enumerate(self.lists):
            for place, (node, action) in enumerate(zip(self.nodes[rank], actions, strict=True)):
                self.first[node] = held = sent.get((rank, place - 1), self.first[node])
                if transfer := received.get((rank, place)):
                    turns = place > 0 and (actions[place - 1].kind is Pass.FORWARD) != (action.kind is Pass.FORWARD)
                    self.second[transfer] = self.nodes[rank][place - 1] if turns else held
                    self.second[node] = transfer


def transfers(lists: tuple[Actions, ...], stages: IntArray) -> list[tuple[int, int, int, int, int]]:
    """Every result that goes to another rank, in the order of the receivers' lists.

    Of each: the sender, the place in its list after which it leaves, the receiver, the place in its list that needs it,
    and the stage before the hop it takes.
    """
    rank_of = {int(stage): rank for rank, row in enumerate(stages) for stage in row}
    made = {
        (action.kind is Pass.FORWARD, action.stage, action.microbatch): place + action.leaves_with_next
        for actions in lists
        for place, action in enumerate(actions)
        if action.kind is not Pass.WEIGHT_GRADIENT
    }
    found = []
    for rank, actions in enumerate(lists):
        for place, action in enumerate(actions):
            forward = action.kind is Pass.FORWARD
            other = action.stage - 1 if forward else action.stage + 1
            sender = rank_of.get(other, rank)
            if action.kind is not Pass.WEIGHT_GRADIENT and sender != rank:
                leaves = made[forward, other, action.microbatch]
                found.append((sender, leaves, rank, place, min(other, action.stage)))
    return found


def node_levels(first: list[int], second: list[int]) -> tuple[IntArray, tuple[slice, ...]]:
    """Nodes ordered so that each comes after those it waits for, and the runs of which none waits for another."""
    followers: list[list[int]] = [[] for _ in first]
    for node in range(1, len(first)):
        followers[first[node]].append(node)
        followers[second[node]].append(node)
    missing = [0] + [2] * (len(first) - 1)
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
    assert len(order) == len(first), "nodes wait for each other in a circle"
    levels = tuple(slice(start, end) for start, end in pairwise(starts[1:]))
    return np.array(order), levels
