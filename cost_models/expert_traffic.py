"""Collectives of an expert layer: rows exchanged over ep, gathered and scattered over etp (``expert_exchange``)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from meshwright.cost_models.expert_exchange import gathers, rows_of
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.issued import PER_MICROBATCH, Collective, FloatArray, Phase
from meshwright.cost_models.strategy import ConfigBatch, Recompute
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import Block


def moe_layer(block: Block) -> MoeLayer | None:
    """The expert layer of a block, if it has one."""
    return next((layer for layer in block.layers if isinstance(layer, MoeLayer)), None)


def expert_traffic(block: Block, workload: Workload, batch: ConfigBatch, framework: Framework) -> list[Collective]:
    """What a block's routed experts add on one rank: dispatch and combine, each again in backward.

    Full recompute repeats both. In chunks each is as many calls of a part each. Every rank is taken to send and
    receive as many rows; ``parts`` makes the most loaded one slower. Left out: counts of rows, a few bytes that go
    ahead of each dispatch.
    """
    layer = moe_layer(block)
    if layer is None:
        return []
    rows, chunks = rows_of(layer, workload, batch).sent, batch.ep_chunks.astype(np.float64)
    row_bytes = layer.hidden * workload.recipe.compute.num_bytes
    gathered = np.where(gathers(batch), rows * batch.etp, 0.0)

    def entry(axis: Literal["ep", "etp"], op: str, phase: Phase, calls: float, numbers: FloatArray) -> Collective:
        on = (batch.ep > 1) if axis == "ep" else gathers(batch)
        if phase == "recompute":
            on = on & batch.is_recompute(Recompute.FULL)
        return Collective(axis, op, phase, np.where(on, calls * chunks, 0.0), numbers * row_bytes / chunks)

    entries = []
    for phase in PER_MICROBATCH:
        entries += [
            entry("ep", "all_to_all", phase, 2.0, rows),
            entry("etp", "all_gather", phase, 1.0, gathered),
            entry("etp", "reduce_scatter", phase, 1.0, gathered),
        ]
    return entries
