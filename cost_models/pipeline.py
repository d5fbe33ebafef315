"""Closed forms for a pipeline's makespan over arrays, with unequal stages and transfers.

Every form is the length of a chain of actions that must follow each other, so it is a lower bound of the played
schedule; for equal stages it is the textbook makespan ``(m + pp - 1)(f + b)`` (Huang et al. 2019, arXiv 1811.06965;
Narayanan et al. 2021, arXiv 2104.04473, section 2.2: ``m (f + b) + (pp - 1)(f + b) / vpp`` interleaved).

Symbols: ``f_r, b_r`` seconds of one micro-batch forward and backward on rank ``r``, ``x_i`` of a transfer between
stage ``i`` and ``i + 1``; ``m`` micro-batches; ``D_r = sum over i > r of (f_i + b_i) + 2 sum over i >= r of x_i``, the
way from ``r`` to the end and back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import shortened
from meshwright.cost_models.schedules import Pass, rank_actions, stage_indices
from meshwright.cost_models.strategy import IntArray, Schedule

FloatArray = NDArray[np.float64]


def makespan(
    schedule: Schedule,
    forward: FloatArray,
    backward_input: FloatArray,
    backward_weight: FloatArray,
    hop: FloatArray,
    microbatches: IntArray,
    per_round: IntArray,
) -> FloatArray:
    """Seconds from the start until all ranks are done: ``[num_configs]``, from arguments as ``finish`` takes them."""
    ends = finish(schedule, forward, backward_input, backward_weight, hop, microbatches, per_round)
    return np.asarray(ends.max(axis=1))


def finish(
    schedule: Schedule,
    forward: FloatArray,
    backward_input: FloatArray,
    backward_weight: FloatArray,
    hop: FloatArray,
    microbatches: IntArray,
    per_round: IntArray,
) -> FloatArray:
    """Seconds from the start to each rank's last action, never above the played ones: ``[num_configs, pp]``.

    ``forward``, ``backward_input``, ``backward_weight``: seconds of a pass of each chunk of each rank,
    ``[num_configs, pp, vpp]``; which stage that is says ``schedules.stage_indices``. A backward that is not split takes
    the sum of the last two. ``hop``: seconds of a transfer between each two stages that follow each other,
    ``[num_configs, pp * vpp - 1]``; between two on the same rank it is not looked at. ``microbatches``, ``per_round``:
    ``[num_configs]``, the latter being how many micro-batches an interleaved schedule runs through a chunk before the
    next.

    Raises ``InputError`` where the schedule does not run with these numbers.
    """
    if schedule is Schedule.GPIPE:
        return _gpipe(forward[:, :, 0], (backward_input + backward_weight)[:, :, 0], hop, microbatches)
    return shortened.finish(schedule, forward, backward_input, backward_weight, hop, microbatches, per_round)


def _gpipe(forward: FloatArray, backward: FloatArray, hop: FloatArray, microbatches: IntArray) -> FloatArray:
    """All forwards, then all backwards: each a flow shop of equal jobs, ranks and links alike being its machines.

    That takes one job's way and ``m - 1`` times the slowest machine on it (exact); the first backward follows the last
    forward on the last rank, and the backwards of rank ``r`` pass the machines from the last rank to it.
    """
    more = (microbatches - 1.0)[:, None]
    links = hop.max(axis=1, initial=0.0)
    down = (forward.sum(axis=1) + hop.sum(axis=1))[:, None] + more * np.maximum(forward.max(axis=1), links)[:, None]
    slowest = backward.copy()
    slowest[:, :-1] = np.maximum(slowest[:, :-1], hop)
    slowest = np.maximum.accumulate(slowest[:, ::-1], axis=1)[:, ::-1]
    way = backward.copy()
    way[:, :-1] += hop
    return np.asarray(down + np.cumsum(way[:, ::-1], axis=1)[:, ::-1] + more * slowest)


def held_microbatches(
    schedule: Schedule, pp: int, vpp: int, rank: int, microbatches: IntArray, per_round: IntArray
) -> FloatArray:
    """Micro-batches whose activations a rank holds at its peak, by chunk: ``[num_configs, vpp]``.

    A micro-batch is held from its forward to its backward, or to its weight gradient, which needs the inputs of all
    matmuls; that the rest goes with the input gradient already is left out. Counted on the lists of actions, at the
    first moment with the largest sum over chunks.

    Raises ``InputError`` where the schedule does not run with these numbers.
    """
    if schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED):
        return in_flight(pp, vpp, rank, microbatches, per_round)[schedule.value]
    few = np.minimum(microbatches, 3 * pp)  # the warm-up is over by then, and from there on none is added
    counts, group = np.unique(few, return_inverse=True)
    return np.array([_peak(schedule, pp, vpp, rank, int(count)) for count in counts])[group]


def _peak(schedule: Schedule, pp: int, vpp: int, rank: int, microbatches: int) -> tuple[float, ...]:
    chunk_of = {int(stage): chunk for chunk, stage in enumerate(stage_indices(schedule, pp, vpp)[rank])}
    held, at_peak = [0.0] * vpp, [0.0] * vpp
    for action in rank_actions(schedule, pp, vpp, microbatches)[rank]:
        if action.kind is not Pass.INPUT_GRADIENT:
            held[chunk_of[action.stage]] += 1.0 if action.kind is Pass.FORWARD else -1.0
        if sum(held) > sum(at_peak):
            at_peak = list(held)
    return tuple(at_peak)


def gpipe(forward: FloatArray, backward: FloatArray, hop: FloatArray, microbatches: IntArray) -> FloatArray:
    """Seconds from start to the last backward on rank 0: all forwards, then all backwards; shape ``[num_configs]``.

    A flow shop of equal jobs, ranks and links alike being its machines, takes one job's way plus ``m - 1`` times the
    slowest machine: exact for each direction where links carry one transfer at a time.
    ``forward``, ``backward`` ``[num_configs, pp]``, ``hop`` ``[num_configs, pp - 1]``.
    """
    more, links = microbatches - 1.0, hop.max(axis=1, initial=0.0)
    way = forward.sum(axis=1) + backward.sum(axis=1) + 2.0 * hop.sum(axis=1)
    return np.asarray(way + more * (np.maximum(forward.max(axis=1), links) + np.maximum(backward.max(axis=1), links)))


def one_f_one_b(forward: FloatArray, backward: FloatArray, hop: FloatArray, microbatches: IntArray) -> FloatArray:
    """Seconds from start to the last backward on rank 0 under 1F1B; shapes as in ``gpipe``.

    Rank ``r`` keeps ``c = min(pp - r, m)`` micro-batches in flight. Around its own work stands the way to it and back
    from it, and then the larger of two chains:

    * its ``m (f + b)`` with the idle time before its first backward, ``D_r - (c - 1) f_r``, and after its last
      forward, ``D_r - (c - 1) b_r``, neither below 0 (where ``c = m`` both are one wait, and the larger counts);
    * forward ``j + c`` follows backward ``j``, so ``k = (m - 1) // c`` round trips ``f_r + D_r + b_r`` and then the
      rest: this is what transfers cost in the steady state.
    """
    pp = forward.shape[1]
    result = np.zeros(len(forward))
    for rank in range(pp):
        f, b = forward[:, rank], backward[:, rank]
        around = (forward[:, :rank] + backward[:, :rank] + 2.0 * hop[:, :rank]).sum(axis=1)
        beyond = (forward[:, rank + 1 :] + backward[:, rank + 1 :] + 2.0 * hop[:, rank:]).sum(axis=1)
        inflight = np.minimum(pp - rank, microbatches).astype(np.float64)
        first = np.maximum(beyond - (inflight - 1.0) * f, 0.0)
        last = np.maximum(beyond - (inflight - 1.0) * b, 0.0)
        own = microbatches * (f + b)
        waits = np.where(microbatches > inflight, first + last, np.maximum(first, last))
        rounds = (microbatches - 1) // inflight
        rest = microbatches - rounds * inflight
        chain = rounds * (f + beyond + b) + rest * (f + b) + (inflight - 1.0) * b + last
        result = np.maximum(result, around + np.maximum(own + waits, np.where(rounds > 0, chain, 0.0)))
    return result


def interleaved(
    forward: FloatArray, backward: FloatArray, hop: FloatArray, microbatches: IntArray, per_round: IntArray
) -> FloatArray:
    """Seconds from start to the last backward on rank 0 under interleaved 1F1B, as torch orders it.

    ``forward``, ``backward`` ``[num_configs, pp, vpp]``; ``hop`` ``[num_configs, pp * vpp - 1]`` between stages, stage
    ``s`` being chunk ``s // pp`` of rank ``s % pp``; ``per_round`` micro-batches run through a chunk before the next.

    The larger of: each rank's own work with the way to its first chunk and back; and the way of the first
    micro-batch through all stages to the last one and of the last micro-batch back, with the last rank's work between
    (all but ``per_round`` micro-batches of its earlier chunks, which it runs before and after).
    """
    pp, vpp = forward.shape[1:]
    both = forward + backward
    work = microbatches[:, None] * both.sum(axis=2)
    to_rank = np.cumsum(both[:, :, 0], axis=1) - both[:, :, 0]
    to_rank[:, 1:] += 2.0 * np.cumsum(hop[:, : pp - 1], axis=1)
    own = (work + to_rank).max(axis=1)
    way = both.sum(axis=(1, 2)) - both[:, -1, -1] + 2.0 * hop.sum(axis=1)
    early = per_round * both[:, -1, : vpp - 1].sum(axis=1)
    return np.asarray(np.maximum(own, way + work[:, -1] - early))


def tail(backward: FloatArray, hop: FloatArray) -> FloatArray:
    """Seconds between each rank's last backward and that of rank 0, of the first chunks: ``[num_configs, pp]``."""
    pp = backward.shape[1]
    result = np.cumsum(backward, axis=1) - backward
    result[:, 1:] += np.cumsum(hop[:, : pp - 1], axis=1)
    return result


def in_flight(pp: int, vpp: int, rank: int, microbatches: IntArray, per_round: IntArray) -> dict[str, FloatArray]:
    """Micro-batches whose activations a rank holds at its peak, by schedule: arrays ``[num_configs, vpp]`` per chunk.

    gpipe: all ``m``. 1F1B: ``min(pp - rank, m)``. Interleaved: ``(vpp - 1) * per_round + 2 (pp - 1 - rank)`` warm-up
    forwards and one more, at most ``vpp * m``, dealt to chunks ``per_round`` at a time, as torch 2.13 deals them
    (``schedules.py``: ``_get_warmup_ops``, ``ScheduleInterleaved1F1B``).
    """
    count = microbatches.astype(np.float64)
    whole = np.repeat(count[:, None], vpp, axis=1)
    units = np.minimum((vpp - 1) * per_round + 2 * (pp - 1 - rank) + 1, vpp * microbatches)
    full_turns, left = np.divmod(units, vpp * per_round)
    chunks = np.arange(vpp)
    dealt = full_turns[:, None] * per_round[:, None] + np.clip(
        left[:, None] - chunks * per_round[:, None], 0, per_round[:, None]
    )
    return {
        "gpipe": whole,
        "1f1b": np.minimum(whole, float(pp - rank)),
        "interleaved": dealt.astype(np.float64),
    }
