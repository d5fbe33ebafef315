"""Every schedule as lists of actions, one list for each pipeline rank, in the order in which torch runs them.

An action is one pass of one stage over one micro-batch. The lists are those of torch 2.13
(``torch/distributed/pipelining/schedules.py``; in brackets its class):

* ``gpipe``: all forwards, then all backwards (``ScheduleGPipe``; Huang et al. 2019, arXiv 1811.06965).
* ``1f1b``: forward and backward in turn after ``pp - rank`` forwards (``Schedule1F1B``; Narayanan et al. 2019,
  PipeDream).
* ``interleaved``: the same over ``vpp`` chunks a rank (``ScheduleInterleaved1F1B``; Narayanan et al. 2021, arXiv
  2104.04473, section 2.2).
* ``zb-h1``: 1F1B whose weight gradients are put off to fill the bubble (``ScheduleInterleavedZeroBubble`` with one
  stage a rank; Qi et al. 2023, arXiv 2401.10241, section 2.1).
* ``zbv``: two chunks a rank in a V, down the ranks and back up (``ScheduleZBVZeroBubble``; Qi et al. 2024, arXiv
  2405.15362).
* ``dualpipev``: the V again, with forwards and backwards in pairs that a GPU may overlap (``ScheduleDualPipeV``;
  DeepSeek-V3, arXiv 2412.19437, section 3.2.1).

torch runs the two passes of a pair one after the other and sends their results after the second; ``leaves_with_next``
says so. Under torch's own split the first stage, which has no input to give a gradient for, does nothing in an ``I``
and its whole backward in the ``W`` (``stage.py``: ``backward_one_chunk``): a caller who plays that gives the stage such
durations. Our executors split the first stage's too (``executors/weight_gradients.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from meshwright import InputError
from meshwright.cost_models.strategy import V_SHAPED, IntArray, Schedule


class Pass(StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"  # gradients of input and weights
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


class Action(NamedTuple):
    """One pass of ``stage`` over ``microbatch``."""

    kind: Pass
    stage: int
    microbatch: int
    leaves_with_next: bool = False  # what it computed is sent after the next action of its rank


Actions = tuple[Action, ...]
F, B, I, W = Pass.FORWARD, Pass.BACKWARD, Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT  # noqa: E741


def stage_indices(schedule: Schedule, pp: int, vpp: int) -> IntArray:
    """The stage that each chunk of each rank is: ``[pp, vpp]``.

    Looped, chunk ``c`` of rank ``r`` is stage ``c * pp + r``; in a V ranks are passed downwards and upwards in turn, so
    rank ``r`` has ``r`` and ``2 * pp - 1 - r``.
    """
    stages = np.arange(pp * vpp).reshape(vpp, pp).T.copy()
    if schedule in V_SHAPED:
        stages[:, 1::2] = stages[::-1, 1::2]
    return stages


def rounds_size(pp: int, microbatches: int) -> int:
    """Micro-batches that torch's interleaved schedules run through one chunk before they turn to the next."""
    return microbatches // max(microbatches // pp, 1)


def check(schedule: Schedule, pp: int, vpp: int, microbatches: int, per_round: int) -> None:
    """Raise ``InputError`` when the schedule does not run with these numbers; arguments as of ``rank_actions``."""
    chunks = 2 if schedule in V_SHAPED else vpp if schedule is Schedule.INTERLEAVED else 1
    if vpp != chunks:
        raise InputError(f"{schedule.value} runs {chunks} chunk{'s' * (chunks > 1)} on each rank, not vpp={vpp}")
    if microbatches < 1:
        raise InputError(f"{schedule.value} needs at least 1 micro-batch, found {microbatches}")
    if schedule is Schedule.DUALPIPEV and microbatches < 2 * pp:
        raise InputError(f"dualpipev needs at least 2 * pp = {2 * pp} micro-batches, found {microbatches}")
    if schedule is Schedule.INTERLEAVED and microbatches % per_round:
        raise InputError(f"interleaved: {per_round} micro-batches a round do not divide {microbatches}")
    if schedule is Schedule.INTERLEAVED and per_round < min(pp, microbatches):
        raise InputError(f"interleaved: a round of {per_round} micro-batches is too short for pp={pp}")


@lru_cache(maxsize=32)
def rank_actions(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, per_round: int | None = None
) -> tuple[Actions, ...]:
    """The actions of each of ``pp`` ranks, which have ``vpp`` chunks each, in their order.

    ``per_round`` is how many micro-batches an interleaved schedule runs through a chunk before the next (default:
    torch's choice). Raises ``InputError`` when the schedule does not run with these numbers.
    """
    size = rounds_size(pp, microbatches) if per_round is None else per_round
    check(schedule, pp, vpp, microbatches, size)
    if schedule is Schedule.GPIPE:
        return tuple(_gpipe(rank, microbatches) for rank in range(pp))
    if schedule is Schedule.ONE_F_ONE_B:
        return tuple(_one_f_one_b(pp, rank, microbatches) for rank in range(pp))
    if schedule is Schedule.INTERLEAVED:
        return tuple(_interleaved(pp, rank, vpp, microbatches, size) for rank in range(pp))
    if schedule is Schedule.ZB_H1:
        return tuple(_zb_h1(pp, rank, microbatches) for rank in range(pp))
    rule = _zbv if schedule is Schedule.ZBV else _dualpipev
    return tuple(rule(pp, rank, microbatches) for rank in range(pp))


def _gpipe(rank: int, count: int) -> Actions:
    return tuple(Action(kind, rank, i) for kind in (F, B) for i in range(count))


def _one_f_one_b(pp: int, rank: int, count: int) -> Actions:
    warm_up = min(pp - rank, count)
    actions = [Action(F, rank, i) for i in range(warm_up)]
    for i in range(count):
        actions.append(Action(B, rank, i))
        if warm_up + i < count:
            actions.append(Action(F, rank, warm_up + i))
    return tuple(actions)


def _interleaved(pp: int, rank: int, vpp: int, count: int, per_round: int) -> Actions:
    def turns(chunks: Sequence[int]) -> list[tuple[int, int]]:
        return [
            (chunk * pp + rank, i)
            for start in range(0, count, per_round)
            for chunk in chunks
            for i in range(start, start + per_round)
        ]

    forwards, backwards = turns(range(vpp)), turns(range(vpp)[::-1])
    warm_up = min((vpp - 1) * per_round + 2 * (pp - 1 - rank), vpp * count)
    actions = [Action(F, *turn) for turn in forwards[:warm_up]]
    steady = len(forwards) - warm_up
    for forward, backward in zip(forwards[warm_up:], backwards[:steady], strict=True):
        actions += [Action(F, *forward), Action(B, *backward)]
    return tuple(actions + [Action(B, *turn) for turn in backwards[steady:]])


def _zb_h1(pp: int, rank: int, count: int) -> Actions:
    """Weight gradients start ``rank`` input gradients late: the later the rank, the longer the bubble they fill."""
    warm_up = min(pp - 1 - rank, count)
    actions = [Action(F, rank, i) for i in range(warm_up)]
    for i in range(count):
        if warm_up + i < count:
            actions.append(Action(F, rank, warm_up + i))
        actions.append(Action(I, rank, i))
        if i >= rank:
            actions.append(Action(W, rank, i - rank))
    return tuple(actions + [Action(W, rank, i) for i in range(max(count - rank, 0), count)])


class _Writer:
    """Writes a V-shaped list: each kind and chunk counts its own micro-batches, a ``W`` waits for its ``I``."""

    def __init__(self, pp: int, rank: int) -> None:
        self.stages = (rank, 2 * pp - 1 - rank)
        self.actions: list[Action] = []
        self.forwards, self.backwards = [0, 0], [0, 0]
        self.waiting: deque[tuple[int, int]] = deque()

    def forward(self, chunk: int, *, leaves_with_next: bool = False) -> None:
        self.actions.append(Action(F, self.stages[chunk], self.forwards[chunk], leaves_with_next))
        self.forwards[chunk] += 1

    def backward(self, chunk: int, *, split: bool = False) -> None:
        stage, microbatch = self.stages[chunk], self.backwards[chunk]
        self.actions.append(Action(I if split else B, stage, microbatch))
        self.backwards[chunk] += 1
        if split:
            self.waiting.append((stage, microbatch))

    def weights(self, stage: int | None = None) -> None:
        """The oldest weight gradient waiting, of ``stage`` if given; none if none waits."""
        found = [turn for turn in self.waiting if stage is None or turn[0] == stage]
        if found:
            self.waiting.remove(found[0])
            self.actions.append(Action(W, *found[0]))


def _zbv(pp: int, rank: int, count: int) -> Actions:
    """Written for at least ``2 * pp - 1`` micro-batches; of fewer the others' actions are left out."""
    full, writer = max(count, 2 * pp - 1), _Writer(pp, rank)

    def backward_and_weights(chunk: int) -> None:
        writer.backward(chunk, split=True)
        writer.weights(writer.stages[chunk])

    for _ in range(2 * (pp - rank) - 1):
        writer.forward(0)
    for _ in range(rank):
        writer.forward(1)
        writer.forward(0)
    for _ in range(pp - rank):
        writer.forward(1)
        backward_and_weights(1)
    while writer.forwards[1] < full:
        if writer.forwards[0] < full:
            writer.forward(0)
        backward_and_weights(0)
        writer.forward(1)
        backward_and_weights(1)
    for _ in range(rank):
        writer.backward(0, split=True)
        writer.backward(1, split=True)
    for _ in range(pp - rank):
        writer.backward(0, split=True)
        writer.weights(rank)
    for chunk in (1, 0):
        for _ in range(rank):
            writer.weights(writer.stages[chunk])
    return tuple(action for action in writer.actions if action.microbatch < count)


def _dualpipev(pp: int, rank: int, count: int) -> Actions:
    """The eight steps of DeepSeek's DualPipeV."""
    writer, later = _Writer(pp, rank), pp - 1 - rank

    def pair(forward: int, backward: int, *, together: bool = True) -> None:
        writer.forward(forward, leaves_with_next=together)
        writer.backward(backward)

    for _ in range(2 * later):
        writer.forward(0)
    for _ in range(rank + 1):
        writer.forward(0)
        writer.forward(1)
    for _ in range(later):
        writer.backward(1, split=True)
        writer.weights()
        writer.forward(1)
    for turn in range(count - 2 * pp + rank + 1):
        pair(0, 1, together=turn > 0 or rank < pp - 1)
        pair(1, 0)
    for _ in range(later):
        writer.backward(1)
        pair(1, 0)
    split = False
    for turn in range(rank + 1):
        split = split or (turn == (rank + 1) // 2 and rank % 2 == 1)
        writer.backward(1, split=split)
        split = split or (turn == (rank + 1) // 2 and rank % 2 == 0)
        writer.backward(0, split=split)
    for _ in range(later):
        writer.weights()
        writer.backward(0, split=split)
    for _ in range(rank + 1):
        writer.weights()
    return tuple(writer.actions)
