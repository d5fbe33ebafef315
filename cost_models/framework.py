"""Targets: what runs a plan, which configs it supports, and what its ZeRO, recompute and schedules really mean.

A plan is for something that runs it. Only what the target executes is searched; the rest is rejected as
NOT_IN_FRAMEWORK and counted.
"""

from __future__ import annotations

import numpy as np

from meshwright import InputError
from meshwright.cost_models.strategy import (
    RECOMPUTES,
    SCHEDULES,
    BoolArray,
    ConfigBatch,
    IntArray,
    Recompute,
    Schedule,
)
from meshwright.cost_models.workload import Workload
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.record import record


@record
class PointwiseCost:
    """Kernels that a memory-bound operator launches, and how often it passes over its tensor, in one direction each.

    A pass is one read or one write of the whole tensor in the compute dtype; a ``float32_pass`` the same in float32; a
    cast reads in one of the two and writes in the other, and is nothing where they are the same.
    """

    forward_kernels: float
    forward_passes: float
    backward_kernels: float
    backward_passes: float
    forward_float32_passes: float = 0.0
    backward_float32_passes: float = 0.0
    forward_casts: float = 0.0
    backward_casts: float = 0.0


@record
class Pointwise:
    """The memory-bound rest of a model as a target runs it. Each names the tensor its passes are counted on."""

    rms_norm: PointwiseCost  # the residual stream
    layer_norm: PointwiseCost  # the residual stream
    rotary: PointwiseCost  # queries and keys together
    activation: PointwiseCost  # the widest tensor of a feed-forward layer that is not gated
    gated_activation: PointwiseCost  # gate, and up of the same size
    residual: PointwiseCost  # the residual stream
    branch: PointwiseCost  # the input of several projections, whose gradients are added: each but the first
    embedding: PointwiseCost  # the rows looked up
    embedding_table: PointwiseCost  # the whole table, whose gradient is dense
    loss: PointwiseCost  # the logits
    sharded_loss: PointwiseCost  # the logits, split by vocabulary
    routing: PointwiseCost  # the rows of tokens that experts take
    adamw: PointwiseCost  # a parameter tensor in the optimizer's dtype, forward being the update
    sgd: PointwiseCost  # the same
    accumulate: PointwiseCost  # a gradient added to those of earlier micro-batches


@record
class Framework:
    """Traits of a target, each a fact about its code.

    ``overlap_*`` is the share of that communication which the target starts early enough to hide behind compute,
    0 (exposed) to 1, on devices that run collectives beside compute; what is hidden still cannot exceed the compute
    it hides behind, and a device without streams of its own (a CPU) hides nothing.
    """

    name: str
    schedules: tuple[Schedule, ...]
    zero_stages: tuple[int, ...]
    recomputes: tuple[Recompute, ...]
    context_parallel: bool
    expert_parallel: bool
    partial_sharding: bool  # dp_shard below dp * cp (HSDP)
    vocab_parallel: bool  # splits embedding and head by vocabulary whenever tp > 1
    tensor_parallel_moe: bool  # cuts attention of a model with experts by tp
    fused_projections: bool  # queries, keys and values are one matmul, gate and up another
    windowed_attention: bool  # attention kernels skip what a sliding window masks
    eager_rms_norm: bool  # RMSNorm written out in float32, which keeps more for backward than a fused one
    regathers_sequence: bool  # with sp, saves the sharded input of a matmul and gathers it again in backward
    overlap_dp_reduce: float  # gradients reduced during backward
    overlap_dp_gather: float  # weights of ZeRO 1 to 3
    overlap_tp: float
    overlap_pp: float
    pointwise: Pointwise


# One ATen kernel after another, as Hugging Face's modules call them: operands of each operator counted once, on
# transformers 5.23 and torch 2.13 (models/llama/modeling_llama.py, autograd's derivatives, cross entropy over float32
# logits, executors/loss.py, torch.optim.AdamW). An RMSNorm that calls functional.rms_norm costs as little as LayerNorm;
# GPT-2's gelu, written out, passes 18 and 29 times instead of 2 and 3.
EAGER_TORCH = Pointwise(
    rms_norm=PointwiseCost(
        forward_kernels=8,
        forward_passes=2,
        forward_float32_passes=5,
        forward_casts=2,
        backward_kernels=16,
        backward_passes=6,
        backward_float32_passes=18,
        backward_casts=2,
    ),
    layer_norm=PointwiseCost(forward_kernels=1, forward_passes=2, backward_kernels=1, backward_passes=3),
    rotary=PointwiseCost(forward_kernels=10, forward_passes=10, backward_kernels=18, backward_passes=16),
    activation=PointwiseCost(forward_kernels=1, forward_passes=2, backward_kernels=1, backward_passes=3),
    gated_activation=PointwiseCost(forward_kernels=2, forward_passes=5, backward_kernels=3, backward_passes=9),
    residual=PointwiseCost(forward_kernels=1, forward_passes=3, backward_kernels=1, backward_passes=3),
    branch=PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=1, backward_passes=3),
    embedding=PointwiseCost(forward_kernels=1, forward_passes=2, backward_kernels=1, backward_passes=1),
    embedding_table=PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=1),
    loss=PointwiseCost(
        forward_kernels=3,
        forward_passes=0,
        forward_float32_passes=3,
        forward_casts=1,
        backward_kernels=4,
        backward_passes=0,
        backward_float32_passes=5,
        backward_casts=1,
    ),
    sharded_loss=PointwiseCost(
        forward_kernels=16,
        forward_passes=0,
        forward_float32_passes=6,
        forward_casts=1,
        backward_kernels=10,
        backward_passes=0,
        backward_float32_passes=8,
        backward_casts=2,
    ),
    routing=PointwiseCost(forward_kernels=12, forward_passes=4, backward_kernels=8, backward_passes=6),
    adamw=PointwiseCost(forward_kernels=9, forward_passes=25, backward_kernels=0, backward_passes=0),
    sgd=PointwiseCost(forward_kernels=1, forward_passes=3, backward_kernels=0, backward_passes=0),
    accumulate=PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=1, backward_passes=3),
)

MESHWRIGHT = Framework(
    name="meshwright",
    schedules=(Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED),
    zero_stages=(0, 1, 2, 3),
    recomputes=(Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL),
    context_parallel=False,
    expert_parallel=False,
    partial_sharding=False,
    vocab_parallel=True,
    tensor_parallel_moe=False,
    fused_projections=False,
    windowed_attention=False,
    eager_rms_norm=True,
    regathers_sequence=False,
    overlap_dp_reduce=1.0,  # FSDP2 reduces a unit while the backward of the one before it runs
    overlap_dp_gather=1.0,  # FSDP2 gathers the next unit while the one at hand runs
    overlap_tp=0.0,
    overlap_pp=0.0,
    pointwise=EAGER_TORCH,
)

FRAMEWORKS: dict[str, Framework] = {"meshwright": MESHWRIGHT}


def framework_named(name: str) -> Framework:
    """The target of that name. Raises ``InputError`` naming the known ones."""
    try:
        return FRAMEWORKS[name]
    except KeyError:
        raise InputError(f"unknown framework {name!r}: expected one of {', '.join(FRAMEWORKS)}") from None


def supported(batch: ConfigBatch, framework: Framework, model: ModelSpec, workload: Workload) -> BoolArray:
    """Whether the target executes each config; shape ``[num_configs]``.

    Rules of torch 2.13 that a target built on it inherits (``torch/distributed/pipelining/schedules.py``): 1F1B
    wants ``num_microbatches >= pp``; interleaved 1F1B runs ``max(1, num_microbatches // pp)`` rounds, which must divide
    ``num_microbatches``. A batch that does not divide is left to ``strategy.legal``, which has a reason of its own.
    """
    data_ranks = batch.dp * batch.cp
    shard = np.where(batch.zero_stage > 0, data_ranks, 1)
    rules: list[BoolArray] = [
        np.isin(batch.schedule, [SCHEDULES.index(schedule) for schedule in framework.schedules]),
        np.isin(batch.zero_stage, framework.zero_stages),
        np.isin(batch.recompute, [RECOMPUTES.index(recompute) for recompute in framework.recomputes]),
        batch.vocab_parallel == ((batch.tp > 1) & framework.vocab_parallel),
        _torch_runs(batch, num_microbatches(batch, workload)) | (_remainder(batch, workload) != 0),
    ]
    if not framework.context_parallel:
        rules.append(batch.cp == 1)
    if not framework.expert_parallel:
        rules.append((batch.ep == 1) & (batch.etp == 1))
    if not framework.partial_sharding:
        rules.append(batch.dp_shard == shard)
    if not framework.tensor_parallel_moe and model.moe is not None:
        rules.append(batch.tp == 1)
    return np.asarray(np.logical_and.reduce(rules), dtype=np.bool_)


def num_microbatches(batch: ConfigBatch, workload: Workload) -> IntArray:
    """Micro-batches of each data rank in a step; ``[num_configs]``, rounded down where the batch does not divide."""
    return np.asarray(workload.global_batch_size // (batch.dp * batch.micro_batch_size), dtype=np.int64)


def microbatches_per_round(batch: ConfigBatch, workload: Workload) -> IntArray:
    """Micro-batches that torch's interleaved 1F1B runs through one chunk before it turns to the next."""
    count = num_microbatches(batch, workload)
    return np.asarray(count // np.maximum(count // batch.pp, 1), dtype=np.int64)


def _remainder(batch: ConfigBatch, workload: Workload) -> IntArray:
    return np.asarray(workload.global_batch_size % (batch.dp * batch.micro_batch_size), dtype=np.int64)


def _torch_runs(batch: ConfigBatch, count: IntArray) -> BoolArray:
    rounds = np.maximum(count // batch.pp, 1)
    one_f_one_b = (batch.pp == 1) | (count >= batch.pp)
    interleaved = count % rounds == 0
    by_schedule = np.where(batch.is_schedule(Schedule.INTERLEAVED), interleaved, True)
    return np.asarray(np.where(batch.is_schedule(Schedule.ONE_F_ONE_B), one_f_one_b, by_schedule), dtype=np.bool_)
