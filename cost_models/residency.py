"""Weights, gradients and optimizer states that one rank holds between micro-batches.

They follow the dtype recipe and what the target's ZeRO keeps resident (``executors/data_parallel.py``). ZeRO shards
dense weights over ``dp_shard`` ranks and the routed experts over those ranks that hold the same experts (``edp``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.framework import Framework, num_microbatches
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.cost_models.workload import Workload

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Parameters of a pipeline rank, counts of shape ``[num_configs]``.

    ``dense`` and ``expert`` are all of them; ``block`` those of the largest decoder block, ``outer`` those outside
    blocks (embedding, final norm, head).
    """

    dense: FloatArray
    expert: FloatArray
    block: FloatArray
    outer: FloatArray

    @property
    def all(self) -> FloatArray:
        """Dense and expert parameters together."""
        return self.dense + self.expert


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes resident between micro-batches, arrays of shape ``[num_configs]``.

    ``gathered`` are whole weights beside one's own shards (FSDP2's compute copies); where ZeRO 3 gathers unit by unit
    they are not resident, and ``memory`` adds what it holds at a moment.
    """

    params: FloatArray
    grads: FloatArray
    optimizer: FloatArray
    gathered: FloatArray


def expert_shards(batch: ConfigBatch) -> FloatArray:
    """Ranks that hold the same experts, over which ZeRO shards them; as many times fewer as ``dp_shard`` is."""
    same = batch.dp * batch.cp * batch.tp / (batch.ep * batch.etp)
    return np.asarray(np.maximum(same * batch.dp_shard / (batch.dp * batch.cp), 1.0))


def state_bytes(numbers: Numbers, workload: Workload, framework: Framework, batch: ConfigBatch) -> StateBytes:
    """What a rank holds of ``P`` parameters shared by ``d`` ranks.

    Weights ``P`` (0), ``P`` gathered and ``P / d`` of one's own (1, 2), ``P / d`` (3); gradients ``P`` (0, and 1 with
    more than one micro-batch, whose last backward frees a unit's as it reduces them) or ``P / d``; optimizer states and
    master weights ``P`` (0) or ``P / d``. Where ``framework.masters_are_parameters`` (FSDP2) the shards *are* the
    master weights, and what is gathered is a copy in the compute dtype, also at ZeRO 0; else the master weights are
    the optimizer's.
    """
    recipe, zero = workload.recipe, batch.zero_stage
    own = numbers.dense / np.where(zero > 0, batch.dp_shard, 1) + numbers.expert / np.where(
        zero > 0, expert_shards(batch), 1.0
    )
    weight, grad = float(recipe.params.num_bytes), float(recipe.grads.num_bytes)
    states = float(workload.optimizer.num_states * recipe.optimizer.num_bytes)
    master = float(recipe.master.num_bytes) if recipe.master else 0.0
    accumulates = (zero == 0) | ((zero == 1) & (num_microbatches(batch, workload) > 1))
    grads = np.where(accumulates, numbers.all, own) * grad
    nothing = np.zeros(len(batch))
    if framework.masters_are_parameters:
        copies = (zero < 3) & (recipe.has_master | (zero > 0))
        return StateBytes(
            params=own * (master or weight),
            grads=grads,
            optimizer=own * states,
            gathered=np.where(copies, numbers.all * weight, 0.0),
        )
    return StateBytes(
        params=np.where(zero == 3, own * (0.0 if master else weight), numbers.all * weight),
        grads=grads,
        optimizer=own * (states + master),
        gathered=nothing,
    )
