"""Configs of one pipeline shape and schedule, and sums over the blocks of their stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.framework import Framework
from meshwright.cost_models.parts import BlockParts
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ConfigBatch, IntArray, Schedule
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.model import ModelSpec

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stages:
    """``counts`` ``[pp, vpp, num_kinds]``: blocks of each kind (``blocks.block_kinds``) on each chunk of each rank."""

    batch: ConfigBatch
    counts: IntArray | FloatArray
    schedule: Schedule
    model: ModelSpec
    workload: Workload
    cluster: ClusterProfile
    placement: Placement
    framework: Framework

    def by_chunk(self, values: list[FloatArray]) -> FloatArray:
        """Sum of a per-block quantity over the blocks of each chunk: ``[num_configs, pp, vpp]``."""
        total = np.zeros((len(self.batch), *self.counts.shape[:2]))
        for kind, value in enumerate(values):
            total += value[:, None, None] * self.counts[None, :, :, kind]
        return total

    def by_rank(self, parts: list[BlockParts], *names: str) -> FloatArray:
        """Sum of parts over the blocks of each rank: ``[num_configs, pp]``."""
        total, on_rank = np.zeros((len(self.batch), self.counts.shape[0])), self.counts.sum(axis=1)
        for kind, part in enumerate(parts):
            total += sum_of(part, names)[:, None] * on_rank[None, :, kind]
        return total


def sum_of(part: BlockParts, names: tuple[str, ...]) -> FloatArray:
    """Several parts of a block together."""
    return np.asarray(sum(getattr(part, name) for name in names))
