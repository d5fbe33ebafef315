"""The moments of a rank of our own executors, and the fullest of them (``backward_moments`` says what each holds)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.backward_moments import Backward
from meshwright.cost_models.estimate import KINDS, MOMENTS, Moment
from meshwright.cost_models.rank_bytes import KindBytes, Rank
from meshwright.cost_models.saved import BlockBytes
from meshwright.cost_models.step_states import Pipeline, states

FloatArray = NDArray[np.float64]


def rank_moments(
    blocks: list[BlockBytes], pipe: Pipeline, rank: int, hop_bytes: FloatArray
) -> list[tuple[Moment, KindBytes]]:
    """All moments of a rank, arrays of ``[num_configs]`` or, of several times, ``[num_times, num_configs]``.

    ``hop_bytes`` is what a stage hands to the next.
    """
    held = Rank(blocks, pipe, rank, hop_bytes)
    found = [moment for state in states(pipe, rank) for moment in Backward(held, state).moments()]
    return [*found, (Moment.REDUCTION, held.at_the_end())] if (pipe.batch.tp > 1).any() else found


def fullest(
    blocks: list[BlockBytes], pipe: Pipeline, rank: int, hop_bytes: FloatArray
) -> tuple[FloatArray, dict[str, FloatArray], FloatArray]:
    """The largest total of a rank's moments, its bytes by kind, and its place in ``MOMENTS``: ``[num_configs]``."""
    columns = np.arange(len(pipe.batch))
    largest, which = np.full(len(columns), -1.0), np.zeros(len(columns))
    kinds = {name: np.zeros(len(columns)) for name in KINDS}
    for moment, held in rank_moments(blocks, pipe, rank, hop_bytes):
        total = held.total
        time = total.argmax(axis=0) if total.ndim == 2 else 0
        top = total[time, columns] if total.ndim == 2 else total
        more = top > largest
        if not more.any():
            continue
        np.copyto(largest, top, where=more)
        np.copyto(which, float(MOMENTS.index(moment)), where=more)
        for name, found in kinds.items():
            value = getattr(held, name)
            np.copyto(found, value[time, columns] if value.ndim == 2 else value, where=more)
    return largest, kinds, which
