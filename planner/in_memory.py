"""Configs scored in memory alone, and whether configs that hold at least so much may be recommended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.estimate import KINDS
from meshwright.cost_models.margin import MemoryMargin, needed_bytes
from meshwright.cost_models.saved import BlockBytes
from meshwright.cost_models.step import batch_bytes
from meshwright.cost_models.strategy import BoolArray, ConfigBatch
from meshwright.planner.bounds import Bounds
from meshwright.planner.tails import Tails

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Found:
    """Configs with their memory, and their step time where it is known (else 0)."""

    batch: ConfigBatch
    step_s: FloatArray
    peak_bytes: FloatArray
    needed_bytes: FloatArray
    usable_bytes: FloatArray

    def take(self, rows: NDArray[Any]) -> Found:
        """The configs at these positions."""
        rest = (getattr(self, field.name)[rows] for field in fields(self)[1:])
        return Found(self.batch.take(rows), *rest)


class Memory:
    """Scores configs in memory, with what is kept free beside it."""

    def __init__(self, bounds: Bounds, tails: Tails, margin: MemoryMargin | None) -> None:
        self.bounds, self.tails, self.margin = bounds, tails, margin

    def of(self, batch: ConfigBatch, blocks: list[BlockBytes] | None = None) -> Found:
        """Configs with their memory; ``blocks`` is what their blocks hold, where it is known."""
        tails = self.tails
        held = batch_bytes(tails.model, tails.workload, self.bounds.cluster, tails.framework, batch, held=blocks)
        peak = np.asarray(sum(held[f"{name}_bytes"] for name in KINDS), dtype=np.float64)
        needs = needed_bytes(peak, held["fragmentation_bytes"], self.margin)
        offers = np.asarray(held["capacity_bytes"] - held["reserved_bytes"], dtype=np.float64)
        return Found(batch, np.zeros(len(batch)), peak, needs, offers)

    def lacking(self, least_bytes: FloatArray, batch: ConfigBatch) -> FloatArray:
        """Bytes that configs which hold at least so much lack to be recommended; negative where there is room."""
        return np.asarray(needed_bytes(least_bytes, np.zeros(len(batch)), self.margin) - self.bounds.usable(batch))

    def fits(self, least_bytes: FloatArray, batch: ConfigBatch) -> BoolArray:
        """Whether configs that hold at least so much may be recommended."""
        return np.asarray(self.lacking(least_bytes, batch) <= 0.0)


def together(found: Sequence[Found], cells: ConfigBatch) -> Found:
    """All in one; of none, none (of the kind of ``cells``)."""
    every = [*found, Found(cells.take(np.zeros(0, dtype=np.int64)), *(np.zeros(0) for _ in range(4)))]
    rest = (np.concatenate([getattr(each, field.name) for each in every]) for field in fields(Found)[1:])
    return Found(ConfigBatch.concatenate([each.batch for each in every]), *rest)
