"""Collectives of an expert layer: rows exchanged over ep, gathered and scattered over etp (``expert_exchange``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.expert_exchange import gathers, rows_of
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.issued import PER_MICROBATCH, Axis, Collective, FloatArray, Phase
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
    receive as many rows; ``parts`` makes the most loaded one slower. Where the host waits for the sizes of what comes
    (``reads_counts``), they go ahead, 8 bytes for each expert and chunk (``executors/expert_parallel.py`` has the
    table). Left out: sums of a number an expert for the auxiliary loss.
    """
    layer = moe_layer(block)
    if layer is None:
        return []
    rows, chunks = rows_of(layer, workload, batch).sent, batch.ep_chunks.astype(np.float64)
    row_bytes = layer.hidden * workload.recipe.compute.num_bytes
    gathered = np.where(gathers(batch), rows * batch.etp, 0.0)

    def on(axis: str, phase: Phase) -> NDArray[np.bool_]:
        split = batch.ep > 1 if axis == "ep" else gathers(batch)
        return split & batch.is_recompute(Recompute.FULL) if phase == "recompute" else split

    entries = []
    for phase in PER_MICROBATCH:
        ways: tuple[tuple[Axis, str, float, FloatArray], ...] = (
            ("ep", "all_to_all", 2.0, rows),
            ("etp", "all_gather", 1.0, gathered),
            ("etp", "reduce_scatter", 1.0, gathered),
        )
        for axis, op, calls, numbers in ways:
            often = np.where(on(axis, phase), calls * chunks, 0.0)
            entries.append(Collective(axis, op, phase, often, numbers * row_bytes / chunks))
        if phase != "backward" and framework.experts.reads_counts:
            told = 8.0 * chunks * layer.num_experts
            entries.append(Collective("ep", "all_to_all", phase, np.where(on("ep", phase), 1.0, 0.0), told))
            once = np.where(on("etp", phase), 1.0, 0.0)
            entries.append(Collective("etp", "all_gather", phase, once, told * batch.etp))
    return entries
