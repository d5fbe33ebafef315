"""Score every legal config: the way to choose in small spaces, and the oracle that ``pruned`` is compared with.

Ranking: by step time; configs within 0.1 % of the fastest of them count as equal and go by free memory, then by
simplicity (fewer axes in use, fewer chunks, lower ZeRO stage, less recompute), so that a difference far below what any
model predicts does not buy a fuller device or a more complicated run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.estimate import Estimate
from meshwright.cost_models.margin import MemoryMargin, needed_bytes
from meshwright.cost_models.strategy import BoolArray, ConfigBatch, IntArray
from meshwright.planner.plan import RejectedCount

FloatArray = NDArray[np.float64]

TIE = 1e-3  # relative difference in step time below which two configs count as equally fast
CHUNK = 2**16  # configs scored at once: bounds memory to some tens of MB


class Scores(Protocol):
    """What a scorer gives for a batch: arrays of shape ``[num_configs]`` (``cost_models.estimate.BatchEstimate``)."""

    @property
    def step_s(self) -> NDArray[Any]:
        """Predicted seconds of a step."""
        ...

    @property
    def peak_bytes(self) -> NDArray[Any]:
        """Predicted peak of the fullest stage."""
        ...

    @property
    def fragmentation_bytes(self) -> NDArray[Any]:
        """What its allocator holds on top of that."""
        ...

    @property
    def capacity_bytes(self) -> NDArray[Any]:
        """Memory of that stage's device."""
        ...

    @property
    def reserved_bytes(self) -> NDArray[Any]:
        """What of it the model cannot have."""
        ...

    def estimate(self, index: int, batch: ConfigBatch) -> Estimate:
        """The estimate of one config of the batch."""
        ...


Scorer = Callable[[ConfigBatch], Scores]


@dataclass(frozen=True, slots=True)
class Ranking:
    """All configs with their scores; ``order`` holds the positions of the recommended, fastest first, ties unbroken."""

    batch: ConfigBatch
    step_s: FloatArray
    peak_bytes: FloatArray
    needed_bytes: FloatArray  # the peak, with fragmentation and margin where one is kept
    usable_bytes: FloatArray  # capacity less reserved
    order: IntArray
    scorer: Scorer

    @property
    def fits(self) -> BoolArray:
        """Whether the peak alone is at most what the device offers; shape ``[num_configs]``."""
        return np.asarray(self.peak_bytes <= self.usable_bytes)

    def best(self, count: int) -> IntArray:
        """Positions of the ``count`` best configs, ties broken; fewer when fewer are recommended."""
        sorted_s = self.step_s[self.order]
        picked: list[IntArray] = []
        start, wanted = 0, min(count, len(self.order))
        while start < wanted:
            end = max(int(np.searchsorted(sorted_s, sorted_s[start] * (1 + TIE), side="right")), start + 1)
            picked.append(self._by_headroom(self.order[start:end]))
            start = end
        return np.concatenate(picked)[:wanted] if picked else np.zeros(0, dtype=np.int64)

    def pareto(self) -> IntArray:
        """Positions of the configs that no other is both faster (or as fast) and smaller than, fastest first."""
        order = self.order[np.lexsort((self.peak_bytes[self.order], self.step_s[self.order]))]
        peaks = self.peak_bytes[order]
        before = np.concatenate(([np.inf], np.minimum.accumulate(peaks)[:-1])) if len(peaks) else peaks
        return np.asarray(order[peaks < before])

    def nearest_miss(self) -> int:
        """Position of the config that lacks least memory: of those that fit but for the margin, if there are any."""
        lacking, fits = self.needed_bytes - self.usable_bytes, self.fits
        return int(np.argmin(np.where(fits, lacking, np.inf) if fits.any() else lacking))

    def estimates(self, positions: IntArray) -> tuple[Estimate, ...]:
        """The estimates of some configs, in that order."""
        batch = self.batch.take(positions)
        scores = self.scorer(batch)
        return tuple(scores.estimate(index, batch) for index in range(len(batch)))

    def _by_headroom(self, group: IntArray) -> IntArray:
        batch = self.batch.take(group)
        in_use = [getattr(batch, axis) > 1 for axis in ("tp", "cp", "pp", "dp", "ep", "etp")]
        num_axes = np.sum(in_use, axis=0)
        headroom = self.usable_bytes[group] - self.needed_bytes[group]
        # lexsort's last key counts most
        keys = (batch.sequence_parallel, batch.recompute, batch.zero_stage, batch.vpp, num_axes, -headroom)
        return np.asarray(group[np.lexsort(np.stack([np.asarray(key, dtype=np.float64) for key in keys]))])


EXHAUSTIVE, PRUNED = "exhaustive", "branch and bound"


@dataclass(frozen=True, slots=True)
class Scored:
    """A ranking that holds the ``wanted`` best configs of a space, and what became of the others.

    ``num_scored`` configs were scored, of which ``unfit`` hold too much; ``num_too_slow`` and ``num_too_large`` were
    ruled out by bounds.
    """

    ranking: Ranking
    method: str
    wanted: int
    num_scored: int
    unfit: tuple[RejectedCount, ...] = ()
    num_too_slow: int = 0
    num_too_large: int = 0


def rank(batch: ConfigBatch, scorer: Scorer, *, margin: MemoryMargin | None) -> Ranking:
    """Score ``batch`` in chunks and order what is recommended: with a margin, or what fits where it is ``None``."""
    steps, peaks, needed, usable = [], [], [], []
    for start in range(0, len(batch), CHUNK):
        scores = scorer(batch.take(np.arange(start, min(start + CHUNK, len(batch)))))
        steps.append(np.asarray(scores.step_s, dtype=np.float64))
        peaks.append(np.asarray(scores.peak_bytes, dtype=np.float64))
        needed.append(needed_bytes(scores.peak_bytes, scores.fragmentation_bytes, margin))
        usable.append(np.asarray(scores.capacity_bytes, dtype=np.float64) - np.asarray(scores.reserved_bytes))
    step_s, peak_bytes, needs, offers = (np.concatenate(each) for each in (steps, peaks, needed, usable))
    return ranked(batch, step_s, peak_bytes, needs, offers, scorer)


def ranked(
    batch: ConfigBatch,
    step_s: FloatArray,
    peak_bytes: FloatArray,
    needs: FloatArray,
    offers: FloatArray,
    scorer: Scorer,
) -> Ranking:
    """Configs with their scores, in order."""
    recommended = np.flatnonzero(needs <= offers)
    order = recommended[np.argsort(step_s[recommended], kind="stable")]
    return Ranking(
        batch=batch,
        step_s=step_s,
        peak_bytes=peak_bytes,
        needed_bytes=needs,
        usable_bytes=offers,
        order=order,
        scorer=scorer,
    )
