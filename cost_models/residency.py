"""Weights, gradients and optimizer states that one rank holds between micro-batches.

They follow the dtype recipe and what the target's ZeRO keeps resident (``executors/data_parallel.py``). ZeRO shards
dense weights over ``dp_shard`` ranks and the routed experts over those ranks that hold the same experts (``edp``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.blocks import block_weights
from meshwright.cost_models.framework import Framework, num_microbatches
from meshwright.cost_models.operators import vocab_multiple
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.cost_models.weights import Weight, local_shape
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import Device
from meshwright.profiler.model import Block

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Parameters of a block or of a pipeline rank, counts of shape ``[num_configs]``.

    ``whole`` is what a rank computes with; ``owned`` what it keeps of them under ZeRO, of the ranks of a shard group
    the one with the most; ``gathered`` what a gather of all shards fills, padding and all.
    """

    whole: FloatArray
    owned: FloatArray
    gathered: FloatArray

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(self.whole + other.whole, self.owned + other.owned, self.gathered + other.gathered)

    def __mul__(self, count: float) -> Numbers:
        return Numbers(self.whole * count, self.owned * count, self.gathered * count)

    def larger(self, other: Numbers) -> Numbers:
        """The larger of both, count by count."""
        pairs = ((self.whole, other.whole), (self.owned, other.owned), (self.gathered, other.gathered))
        return Numbers(*(np.maximum(*pair) for pair in pairs))

    def take(self, rows: NDArray[np.int64]) -> Numbers:
        """The configs at these positions."""
        return Numbers(self.whole[rows], self.owned[rows], self.gathered[rows])

    @classmethod
    def zeros(cls, size: int) -> Numbers:
        """Nothing, for ``size`` configs."""
        return cls(np.zeros(size), np.zeros(size), np.zeros(size))


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


def reserved_bytes(device: Device, framework: Framework, batch: ConfigBatch) -> FloatArray:
    """What of a device is not there for tensors: context, kernels and others, and communicators; ``[num_configs]``.

    Measured (``Device.communicator_bytes``) a rank has one for each of its groups: all ranks, and its peers along each
    axis that is split (``executors/mesh.py``); else it is what the target is known to hold. Left out: pairs of a
    pipeline, which NCCL serves from their group's where sends and receives are batched.
    """
    split = [degree > 1 for degree in (batch.tp, batch.dp * batch.cp, batch.pp, batch.ep)]
    groups = np.where(np.logical_or.reduce(split), 1 + np.sum(split, axis=0), 0)
    measured = groups * float(device.communicator_bytes)
    held = measured if device.communicator_bytes else framework.memory.communicators_bytes
    return np.asarray(device.reserved_bytes + held + np.zeros(len(batch)))


def expert_shards(batch: ConfigBatch) -> FloatArray:
    """Ranks that hold the same experts, over which ZeRO shards them; as many times fewer as ``dp_shard`` is."""
    same = batch.dp * batch.cp * batch.tp / (batch.ep * batch.etp)
    return np.asarray(np.maximum(same * batch.dp_shard / (batch.dp * batch.cp), 1.0))


def block_numbers(block: Block, framework: Framework, batch: ConfigBatch) -> Numbers:
    """What a rank holds of a block's parameters: whole, of its own under ZeRO, and gathered.

    ZeRO over flat buffers divides evenly but for a little padding at the end of a buffer, which is left out (Megatron
    pads a bucket of 40 million parameters or more to a multiple of 128 times the ranks:
    ``core/distributed/param_and_grad_buffer.py``; below 1 % up to 3,000 ranks). FSDP2 (``framework.shards_rows``) cuts
    every tensor along its first dimension and pads each shard to the size of the first one
    (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``), in parameters, in gradients and in what it gathers: one
    row over 64 ranks is 64 rows gathered, and 8 experts over 64 ranks are 64 experts. So torchtitan cuts experts that
    it has cut by ep along the next dimension where they are fewer than their ranks (``llama4/infra/parallelize.py``),
    and our own executors along the first that divides (``memory.expert_units``).
    """
    return _numbers(block_weights(block), framework, batch)


def expert_numbers(block: Block, framework: Framework, batch: ConfigBatch) -> Numbers | None:
    """The same of the routed experts alone where they are a unit of FSDP2 of their own; None where none are."""
    routed = tuple(weight for weight in block_weights(block) if weight.experts)
    return _numbers(routed, framework, batch) if routed and framework.memory.expert_units else None


def _numbers(weights: tuple[Weight, ...], framework: Framework, batch: ConfigBatch) -> Numbers:
    few, inverse = batch.distinct("tp", "cp", "pp", "dp", "ep", "etp", "dp_shard", "zero_stage", "vocab_parallel")
    whole, owned, gathered = (np.zeros(len(few)) for _ in range(3))
    sharded = few.zero_stage > 0
    dense, routed = np.where(sharded, few.dp_shard, 1.0), np.where(sharded, expert_shards(few), 1.0)
    for weight in weights:
        shards = routed if weight.experts else dense
        shape = local_shape(weight, few, vocab_multiple(framework, few))
        held, own = _shard(weight, shape, few, shards, by_rows=framework.shards_rows)
        if weight.experts and framework.memory.expert_units:
            divides = np.logical_or.reduce([size % shards == 0 for size in shape])
            own = np.where(divides, held / shards, own)
        whole, owned = whole + weight.copies * held, owned + weight.copies * own
        gathered = gathered + weight.copies * own * shards
    return Numbers(whole, owned, gathered).take(inverse)


def _shard(
    weight: Weight,
    shape: tuple[FloatArray, FloatArray, FloatArray],
    batch: ConfigBatch,
    shards: FloatArray,
    *,
    by_rows: bool,
) -> tuple[FloatArray, FloatArray]:
    """Numbers of one tensor on a rank: whole, and in the largest of its ``shards``."""
    experts, rows, columns = shape
    held = experts * rows * columns
    if not by_rows:
        return held, held / shards
    if not weight.experts:
        return held, np.ceil(rows / shards) * columns
    inside = (batch.ep > 1) & (shards * batch.ep > weight.experts)
    return held, np.where(inside, held / shards, np.ceil(experts / shards) * rows * columns)


def state_bytes(numbers: Numbers, workload: Workload, framework: Framework, batch: ConfigBatch) -> StateBytes:
    """What a rank holds of ``P`` parameters shared by ``d`` ranks.

    Weights ``P`` (0), ``P`` gathered and ``P / d`` of one's own (1, 2), ``P / d`` (3); gradients ``P`` (0, and 1 with
    more than one micro-batch, whose last backward frees a unit's as it reduces them) or ``P / d``; optimizer states and
    master weights ``P`` (0) or ``P / d``. Where ``framework.masters_are_parameters`` (FSDP2) the shards *are* the
    master weights, and what is gathered is a copy in the compute dtype, also at ZeRO 0. Else the master weights are the
    optimizer's, beside the weights and, at stage 3, beside shards of them in their own dtype (Megatron-FSDP,
    ``param_and_grad_buffer.py``: ``model_weight_buffer`` and ``main_weight_buffer``; DeepSpeed's ``ds_tensor``); and
    what ``framework.reduces_once`` keeps gradients in is a buffer for all of them, however few micro-batches there are
    (Megatron-Core, ``distributed_data_parallel.py``: 6 bytes a parameter and 12 / d in its guide to the distributed
    optimizer).
    """
    recipe, zero = workload.recipe, batch.zero_stage
    weight, grad = float(recipe.params.num_bytes), float(recipe.grads.num_bytes)
    states = float(workload.optimizer.num_states * recipe.optimizer.num_bytes)
    master = float(recipe.master.num_bytes) if recipe.master else 0.0
    if framework.reduces_once:
        accumulates = zero <= 2
    else:
        accumulates = (zero == 0) | ((zero == 1) & (num_microbatches(batch, workload) > 1))
    grads = np.where(accumulates, numbers.whole, numbers.owned) * grad
    if framework.masters_are_parameters:
        copies = (zero < 3) & (recipe.has_master | (zero > 0))
        return StateBytes(
            params=numbers.owned * (master or weight),
            grads=grads,
            optimizer=numbers.owned * states,
            gathered=np.where(copies, numbers.gathered * weight, 0.0),
        )
    return StateBytes(
        params=np.where(zero == 3, numbers.owned, numbers.whole) * weight,
        grads=grads,
        optimizer=numbers.owned * (states + master),
        gathered=np.zeros(len(batch)),
    )
