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

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.short_lists import ShortLists, short_lists, shortest
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
        short = short_lists(schedule, pp, vpp, played, one)
        block = max(500, _BLOCK_NUMBERS // len(short.seconds))
        for start in range(0, len(rows), block):
            some = rows[start : start + block]
            work = (forward[some], backward_input[some], backward_weight[some])
            result[some] = _finish(short, schedule, *work, hop[some], microbatches[some] - played * one)
    return result


def _finish(
    short: ShortLists,
    schedule: Schedule,
    forward: FloatArray,
    backward_input: FloatArray,
    backward_weight: FloatArray,
    hop: FloatArray,
    more: IntArray,
) -> FloatArray:
    """When each rank ends, with periods of ``more`` micro-batches put in: ``[num_configs, pp]`` seconds."""
    num_stages, num_configs = short.stages.size, len(forward)
    table = np.zeros((5 * num_stages, num_configs))
    passes = (forward, backward_input + backward_weight, backward_input, backward_weight)
    for kind, seconds in enumerate(passes):
        table[kind * num_stages + short.stages] = seconds.transpose(1, 2, 0)
    table[4 * num_stages : -1] = hop.T
    gaps = np.zeros((len(short.gap_rows), num_configs))
    for rows, counts in zip(short.gap_rows.T, short.gap_counts.T, strict=True):
        gaps += table[rows] * counts[:, None]
    ends = np.zeros((len(short.seconds), num_configs))
    _play(short, short.before, table, gaps, ends)
    if more.any():
        ends[short.slab] += _periods(schedule, passes, hop, more)[short.slab_rank]
    _play(short, short.behind, table, gaps, ends)
    return ends[short.last].T


def _play(short: ShortLists, levels: tuple[slice, ...], table: FloatArray, gaps: FloatArray, ends: FloatArray) -> None:
    sends = table[4 * short.stages.size :].any()
    for level in levels:
        start = ends[short.after[level]]
        if len(gaps) > 1:
            start += gaps[short.gap[level]]
        arrival = ends[short.arrives[level]]
        if sends:
            arrival += table[short.delay[level]]
        np.maximum(start, arrival, out=start)
        np.add(start, table[short.seconds[level]], out=ends[level])


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
