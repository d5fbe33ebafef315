"""Seconds of a pipeline under every schedule, over arrays: what ranks millions of configs.

Stages may be unequal and transfers take time; nothing is ever above what ``player.play`` gives for the same numbers.
For equal stages and transfers not longer than a forward pass it is what the player gives: ``(m + pp - 1)(f + b)`` for
gpipe and 1f1b (Huang et al. 2019, arXiv 1811.06965), ``m (f + b) + (pp - 1)(f + b) / vpp`` interleaved (Narayanan et
al. 2021, arXiv 2104.04473, section 2.2), and so on. For uneven layers, with an embedding and a head, it is within 1 %
of the player nearly always; the worst are interleaved schedules whose chunks differ much, about 7 % low.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models import shortened
from meshwright.cost_models.player import BLOCKING
from meshwright.cost_models.schedules import Pass, rank_actions, stage_indices
from meshwright.cost_models.strategy import SPLIT_BACKWARD, IntArray, Schedule

FloatArray = NDArray[np.float64]


def makespan(
    schedule: Schedule,
    forward: FloatArray,
    backward_input: FloatArray,
    backward_weight: FloatArray,
    hop: FloatArray,
    microbatches: IntArray,
    per_round: IntArray,
    *,
    blocking_sends: bool = False,
) -> FloatArray:
    """Seconds from the start until all ranks are done: ``[num_configs]``, from arguments as ``finish`` takes them."""
    ends = finish(
        schedule,
        forward,
        backward_input,
        backward_weight,
        hop,
        microbatches,
        per_round,
        blocking_sends=blocking_sends,
    )
    return np.asarray(ends.max(axis=1))


def finish(
    schedule: Schedule,
    forward: FloatArray,
    backward_input: FloatArray,
    backward_weight: FloatArray,
    hop: FloatArray,
    microbatches: IntArray,
    per_round: IntArray,
    *,
    blocking_sends: bool = False,
) -> FloatArray:
    """Seconds from the start to each rank's last action, never above the played ones: ``[num_configs, pp]``.

    ``forward``, ``backward_input``, ``backward_weight``: seconds of a pass of each chunk of each rank,
    ``[num_configs, pp, vpp]``; which stage that is says ``schedules.stage_indices``. A backward that is not split takes
    the sum of the last two. ``hop``: seconds of a transfer between each two stages that follow each other,
    ``[num_configs, pp * vpp - 1]``; between two on the same rank it is not looked at. ``microbatches``, ``per_round``:
    ``[num_configs]``, the latter being how many micro-batches an interleaved schedule runs through a chunk before the
    next. ``blocking_sends`` as of ``player.play``.

    Raises ``InputError`` where the schedule does not run with these numbers, or not with blocking sends.
    """
    if blocking_sends and schedule not in BLOCKING:
        raise InputError(f"blocking sends are modelled for gpipe and 1f1b, not for {schedule.value}")
    if schedule is Schedule.GPIPE:
        backward = (backward_input + backward_weight)[:, :, 0]
        return _gpipe(forward[:, :, 0], backward, hop, microbatches, blocking_sends=blocking_sends)
    if not blocking_sends:
        return shortened.finish(schedule, forward, backward_input, backward_weight, hop, microbatches, per_round)
    # a pass with the transfer that its rank is held by afterwards; receiving holds it longer in warm-up and cool-down
    nothing = np.zeros((len(hop), 1, 1))
    down = forward + np.concatenate([hop[:, :, None], nothing], axis=1)
    sent = np.concatenate([nothing, hop[:, :, None]], axis=1)
    ends = shortened.finish(
        schedule, down, backward_input + sent, backward_weight, np.zeros_like(hop), microbatches, per_round
    )
    return np.asarray(ends - sent[:, :, 0])


def _gpipe(
    forward: FloatArray, backward: FloatArray, hop: FloatArray, microbatches: IntArray, *, blocking_sends: bool
) -> FloatArray:
    """All forwards, then all backwards: each a flow shop of equal jobs, ranks and links alike being its machines.

    That takes one job's way and ``m - 1`` times the slowest machine on it (exact); the first backward follows the last
    forward on the last rank, and the backwards of rank ``r`` pass the machines from the last rank to it. With blocking
    sends a rank is one machine with the transfers on its two sides, one after the other.
    """
    more, links = (microbatches - 1.0)[:, None], hop
    around = np.zeros_like(forward)
    if blocking_sends:
        around[:, :-1] += hop
        around[:, 1:] += hop
        links = np.zeros_like(hop)
    slowest = np.maximum((forward + around).max(axis=1), links.max(axis=1, initial=0.0))[:, None]
    down = (forward.sum(axis=1) + hop.sum(axis=1))[:, None] + more * slowest
    machine = backward + around
    machine[:, :-1] = np.maximum(machine[:, :-1], links)
    way = backward.copy()
    way[:, :-1] += hop
    up = np.cumsum(way[:, ::-1], axis=1) + more * np.maximum.accumulate(machine[:, ::-1], axis=1)
    return np.asarray(down + up[:, ::-1])


def held_microbatches(
    schedule: Schedule, pp: int, vpp: int, rank: int, microbatches: IntArray, per_round: IntArray
) -> FloatArray:
    """Micro-batches whose activations a rank holds when most are, by chunk: ``[num_configs, vpp]``, of ``holdings``."""
    return np.asarray(holdings(schedule, pp, vpp, rank, microbatches, per_round)[0, 0])


def holdings(
    schedule: Schedule, pp: int, vpp: int, rank: int, microbatches: IntArray, per_round: IntArray
) -> FloatArray:
    """What a rank holds at its fullest moments, by chunk, in micro-batches: ``[num_moments, 2, num_configs, vpp]``.

    First those *held*, whose saved activations are all there: from a micro-batch's forward to its backward, or to the
    gradient of its input where backward is split. Second those that *wait* from there to their weight gradients, with
    what these take: inputs of blocks' matrices and gradients of their outputs (``executors/weight_gradients.py``); with
    torch's own split (``torch/distributed/pipelining/_backward.py``) these gradients and all that was held. Which
    moment is the peak depends on what either weighs: whatever that is, if chunks weigh alike, one of these is it. The
    first of them has most held.

    They are what the lists of actions say:

    * gpipe holds all ``m``, 1f1b ``min(pp - rank, m)``, and nothing waits;
    * interleaved ``(vpp - 1) * per_round + 2 (pp - 1 - rank)`` warm-up forwards and one more, at most ``vpp * m``,
      dealt to chunks ``per_round`` at a time; nothing waits;
    * the others as counted on the lists: with zb-h1 ``pp - rank`` are held and up to ``rank + 1`` wait; with zbv about
      ``2 * pp`` are held at first, and on the last ranks nearly as many wait in the cool-down.

    Raises ``InputError`` where the schedule does not run with these numbers.
    """
    if schedule in SPLIT_BACKWARD:
        few = np.minimum(microbatches, 3 * pp)  # the warm-up is over by then, and from there on none is added
        counts, group = np.unique(few, return_inverse=True)
        found = [_fullest(schedule, pp, vpp, rank, int(count)) for count in counts]
        most = max(len(moments) for moments in found)
        padded = [(*moments, *moments[:1] * (most - len(moments))) for moments in found]
        return np.array(padded)[group].transpose(1, 2, 0, 3)
    if schedule is Schedule.INTERLEAVED:
        units = np.minimum((vpp - 1) * per_round + 2 * (pp - 1 - rank) + 1, vpp * microbatches)
        full_turns, left = np.divmod(units, vpp * per_round)
        size = per_round[:, None]
        held = full_turns[:, None] * size + np.clip(left[:, None] - np.arange(vpp) * size, 0, size)
    else:
        held = (microbatches if schedule is Schedule.GPIPE else np.minimum(microbatches, pp - rank))[:, None]
    return np.array([[held, np.zeros_like(held)]], dtype=np.float64)


_Counts = tuple[float, ...]  # of each chunk


@lru_cache(maxsize=1024)
def _fullest(
    schedule: Schedule, pp: int, vpp: int, rank: int, microbatches: int
) -> tuple[tuple[_Counts, _Counts], ...]:
    """(held, waiting) of the moments one of which is the peak, those with most held first."""
    chunk_of = {int(stage): chunk for chunk, stage in enumerate(stage_indices(schedule, pp, vpp)[rank])}
    held, waiting = [0.0] * vpp, [0.0] * vpp
    moments: dict[tuple[_Counts, _Counts], None] = {}  # in the order of time
    for action in rank_actions(schedule, pp, vpp, microbatches)[rank]:
        chunk = chunk_of[action.stage]
        held[chunk] += {Pass.FORWARD: 1.0, Pass.WEIGHT_GRADIENT: 0.0}.get(action.kind, -1.0)
        waiting[chunk] += {Pass.INPUT_GRADIENT: 1.0, Pass.WEIGHT_GRADIENT: -1.0}.get(action.kind, 0.0)
        moments[tuple(held), tuple(waiting)] = None
    corners = _corners({(sum(held), sum(waiting)) for held, waiting in moments})
    full = [moment for moment in moments if (sum(moment[0]), sum(moment[1])) in corners]
    return tuple(sorted(full, key=lambda moment: -sum(moment[0])))


def _corners(points: set[tuple[float, float]]) -> set[tuple[float, float]]:
    """Corners of the convex hull's upper right: those with the largest ``x + w y`` for some ``w`` from 0 on."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], -point[1])):  # from the right, upwards
        if corners and y <= corners[-1][1]:
            continue
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (x0 - x1) * (y - y1) < (x1 - x) * (y1 - y0):
                break
            corners.pop()
        corners.append((x, y))
    return set(corners)
