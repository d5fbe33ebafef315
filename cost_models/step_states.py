"""Where in a step of our executors a pipeline rank may hold the most: what is in flight when a backward starts.

Times are those of the schedules' lists of actions (``schedules``): the first backward, with the most micro-batches in
flight; the last one with as many, which finds gradients of earlier micro-batches; and the step's last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import pipeline
from meshwright.cost_models.blocks import BlockKinds
from meshwright.cost_models.framework import Framework, microbatches_per_round, num_microbatches
from meshwright.cost_models.schedules import Pass, rank_actions, stage_indices
from meshwright.cost_models.strategy import SPLIT_BACKWARD, ConfigBatch, IntArray, Schedule
from meshwright.cost_models.workload import Workload

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Configs of one pipeline shape: ``counts`` ``[pp, vpp, num_kinds]`` blocks of ``kinds`` on each chunk."""

    kinds: BlockKinds
    counts: FloatArray
    schedule: Schedule
    workload: Workload
    framework: Framework
    batch: ConfigBatch


@dataclass(frozen=True, slots=True)
class State:
    """Where in the step a rank is when a chunk's backward starts: several such times, one after the other.

    Arrays are ``[num_times, num_configs, vpp]``, ``last`` is ``[num_times, num_configs]``. ``held`` micro-batches of
    each chunk are in flight, the one at hand among them; ``waiting`` ones wait for their gradients of matrices;
    ``sent`` have gone through, ``back`` of them backward too; ``resident`` chunks have gradients of earlier
    micro-batches in their blocks, ``outer`` ones outside of them; it is a chunk's ``last`` backward of the step;
    ``after_forward``: a forward has just run. ``kind``: the backward is whole, or the first or second half of one.
    """

    chunk: int
    held: FloatArray
    waiting: FloatArray
    sent: FloatArray
    back: FloatArray
    resident: BoolArray
    outer: BoolArray
    last: BoolArray
    after_forward: BoolArray
    kind: Pass = Pass.BACKWARD


def states(pipe: Pipeline, rank: int) -> list[State]:
    """The states of a rank of which one is the fullest, whatever the config."""
    found = list(_states(pipe, rank))
    alike: dict[tuple[int, Pass], list[State]] = {}
    for state in found:
        alike.setdefault((state.chunk, state.kind), []).append(state)
    return [
        State(
            chunk,
            held=np.stack([one.held for one in of]),
            waiting=np.stack([one.waiting for one in of]),
            sent=np.stack([one.sent for one in of]),
            back=np.stack([one.back for one in of]),
            resident=np.stack([one.resident for one in of]),
            outer=np.stack([one.outer for one in of]),
            last=np.stack([one.last for one in of]),
            after_forward=np.stack([one.after_forward for one in of]),
            kind=kind,
        )
        for (chunk, kind), of in alike.items()
    ]


def _states(pipe: Pipeline, rank: int) -> list[State]:
    """The same one by one, without the axis of times."""
    batch, (pp, vpp) = pipe.batch, pipe.counts.shape[:2]
    count = num_microbatches(batch, pipe.workload)
    per_round = microbatches_per_round(batch, pipe.workload)
    whole = np.repeat(count[:, None], vpp, axis=1).astype(np.float64)
    if pipe.schedule in SPLIT_BACKWARD:
        return _split_states(pipe, rank, count)
    if pipe.schedule is Schedule.INTERLEAVED:
        return _interleaved_states(pipe, rank, count, per_round)
    nothing, one = np.zeros_like(whole), np.ones_like(whole)
    several = whole > 1
    most = pipeline.held_microbatches(pipe.schedule, pp, vpp, rank, count, per_round)
    later = np.clip(np.minimum(most, whole - 1.0), 1.0, None)
    none = several & False
    first = State(0, most, nothing, most, nothing, none, none, count == 1, count >= 1)
    steady = (count > most[:, 0]) & (pipe.schedule is Schedule.ONE_F_ONE_B)
    last = State(0, one, nothing, whole, whole - 1.0, several, several, count >= 1, steady & (most[:, 0] == 1.0))
    if pp == 1:
        return [first, last]
    back = np.minimum(whole - 1.0, 1.0)
    return [first, State(0, later, nothing, whole, back, several, several, later[:, 0] == 1.0, steady), last]


def _split_states(pipe: Pipeline, rank: int, count: IntArray) -> list[State]:
    """Ahead of the backwards and weight gradients of the lists of actions at which more is there than at others."""
    pp, vpp = pipe.counts.shape[:2]
    few = np.minimum(count, 3 * pp)  # the warm-up is over by then
    counts, group = np.unique(few, return_inverse=True)
    played = [_played(pipe.schedule, pp, vpp, rank, int(number)) for number in counts]
    found = []
    for chunk, kind in sorted({key for states_of in played for key in states_of}):
        absent = np.zeros((1, 6, vpp))
        lists = [states_of.get((chunk, kind), absent) for states_of in played]
        for number in range(max(map(len, lists))):
            chosen = np.array([of[min(number, len(of) - 1)] for of in lists])[group]
            held, waiting, sent, back, resident, outer = chosen.transpose(1, 0, 2)
            rest = np.where(back.sum(axis=1) >= pp, count - few, 0)[:, None]  # of the steady state that was left out
            found.append(
                State(
                    chunk,
                    held,
                    waiting,
                    sent + rest,
                    back + rest,
                    resident > 0,
                    outer > 0,
                    count == 1,
                    count >= 1,
                    kind,
                )
            )
    return found


@lru_cache(maxsize=1024)
def _played(schedule: Schedule, pp: int, vpp: int, rank: int, microbatches: int) -> dict[tuple[int, Pass], FloatArray]:
    """(held, waiting, sent, back, resident, outer) ahead of a chunk's backwards, whole or either half.

    By chunk and which it is: ``[num_times, 6, vpp]``, those that may be the fullest.
    """
    chunk_of = {int(stage): chunk for chunk, stage in enumerate(stage_indices(schedule, pp, vpp)[rank])}
    actions = rank_actions(schedule, pp, vpp, microbatches)[rank]
    kinds = np.array([action.kind.value for action in actions])
    chunks = np.array([chunk_of[action.stage] for action in actions])
    on_chunk = chunks[:, None] == np.arange(vpp)

    def before(kind: Pass) -> FloatArray:
        done = on_chunk & (kinds == kind.value)[:, None]
        return np.asarray(done.cumsum(axis=0) - done.astype(np.float64))

    forward, whole = before(Pass.FORWARD), before(Pass.BACKWARD)
    inputs, weights = before(Pass.INPUT_GRADIENT), before(Pass.WEIGHT_GRADIENT)
    back = whole + inputs
    resident, outer = whole + weights > 0, back > 0
    flags = resident.astype(np.float64), outer.astype(np.float64)
    states_of = np.stack([forward - back, inputs - weights, forward, back, *flags], axis=1)
    found = {}
    for chunk in range(vpp):
        for kind in (Pass.BACKWARD, Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT):
            rows = np.flatnonzero((kinds == kind.value) & (chunks == chunk))
            if len(rows):
                found[chunk, kind] = _largest(states_of[rows])
    return found


# what a micro-batch weighs that is held, that waits, that was sent, whose gradient was: without recompute, and with it
_WEIGHTS = ((10.0, 7.0, 0.4, 0.4), (0.4, 7.0, 0.4, 0.4))


def _largest(unlike: FloatArray) -> FloatArray:
    """Those that are the fullest with all chunks' gradients there, and before."""
    resident, kept = unlike[:, 4].all(axis=1), set()
    for weights in _WEIGHTS:
        filled = unlike[:, :4].sum(axis=2) @ np.array(weights)
        for among in (resident, ~resident):
            if among.any():
                kept.add(int(np.argmax(np.where(among, filled, -1.0))))
    return unlike[sorted(kept)]


def _interleaved_states(pipe: Pipeline, rank: int, count: IntArray, per_round: IntArray) -> list[State]:
    """Of the first and the last chunk: the first and the second backward, the last one with most in flight, the last.

    Ahead of backward ``j`` of all chunks ``f + j`` forwards have run, of ``vpp m``, where ``f`` ran ahead of the first.
    """
    pp, vpp = pipe.counts.shape[:2]
    total = vpp * count
    ahead = pipeline.held_microbatches(pipe.schedule, pp, vpp, rank, count, per_round).sum(axis=1).astype(np.int64)
    size, cycle = per_round, vpp * per_round
    places = np.arange(vpp)

    def dealt(units: IntArray) -> FloatArray:
        """Passes of each chunk, in the order in which chunks have their turn."""
        turns, left = np.divmod(units, cycle)
        return np.asarray(
            turns[:, None] * size[:, None] + np.clip(left[:, None] - places * size[:, None], 0, size[:, None])
        )

    found = []
    for chunk in sorted({0, vpp - 1}):
        start = (vpp - 1 - chunk) * size  # of its turn in a cycle of backwards
        full, place = np.divmod(np.maximum(total - ahead, 0), cycle)
        late = np.where(place >= start, full * cycle + np.minimum(place, start + size - 1), start)
        late = np.where((place < start) & (full > 0), (full - 1) * cycle + start + size - 1, late)
        last = total - cycle + start + size - 1
        for number in (start, np.minimum(start + 1, last), late, last):
            sent = dealt(np.minimum(ahead + number, total)).astype(np.float64)
            back = dealt(number)[:, ::-1].astype(np.float64)
            held = np.maximum(sent - back, places == chunk)
            ends = back[:, chunk] == count - 1.0
            resident = back > 0
            found.append(
                State(chunk, held, np.zeros_like(held), sent, back, resident, resident, ends, ahead + number <= total)
            )
    return found


def unlike_ranks(pipe: Pipeline) -> list[int]:
    """Ranks of which one may hold the most.

    Of those with the same blocks it is the first: it has the most micro-batches in flight. Where backward is split
    the last of them has the most waiting for their weight gradients.
    """
    pp = pipe.counts.shape[0]
    _, first, group = np.unique(pipe.counts.reshape(pp, -1), axis=0, return_index=True, return_inverse=True)
    ends = {int(rank) for rank in first}
    if pipe.schedule in SPLIT_BACKWARD:
        ends |= {int(np.flatnonzero(group.ravel() == number)[-1]) for number in range(len(first))}
    return sorted(ends)
