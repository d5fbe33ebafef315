"""Targets: what runs a plan, which configs it supports, and what its ZeRO, recompute and schedules really mean.

A plan is for something that runs it. Only what the target executes is searched; the rest is rejected as
NOT_IN_FRAMEWORK and counted.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.context_traits import ContextTraits
from meshwright.cost_models.expert_traits import ExpertTraits
from meshwright.cost_models.memory_traits import MemoryTraits
from meshwright.cost_models.strategy import (
    RECOMPUTES,
    SCHEDULES,
    SPLIT_BACKWARD,
    BoolArray,
    ConfigBatch,
    IntArray,
    Partition,
    Recompute,
    Schedule,
)
from meshwright.cost_models.workload import DType, Workload
from meshwright.profiler.layers import AttentionLayer
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

    @property
    def forward_only(self) -> PointwiseCost:
        """The same with nothing backward."""
        return replace(self, backward_kernels=0, backward_passes=0, backward_float32_passes=0, backward_casts=0)

    @property
    def backward_only(self) -> PointwiseCost:
        """The same with nothing forward."""
        return replace(self, forward_kernels=0, forward_passes=0, forward_float32_passes=0, forward_casts=0)


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
    routing: PointwiseCost  # rows read or written on their way to experts and back (``feed_forward.add_experts``)
    adamw: PointwiseCost  # a parameter tensor in the optimizer's dtype, forward being the update
    sgd: PointwiseCost  # the same
    accumulate: PointwiseCost  # a gradient added to those of earlier micro-batches
    dropout: PointwiseCost = PointwiseCost(
        forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0
    )  # the residual stream, after each attention and feed-forward layer
    router: PointwiseCost = PointwiseCost(
        forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0
    )  # the router's scores, a number for each token and expert, where ``routing`` does not hold it
    squared_relu: PointwiseCost | None = None  # the same tensor as ``activation``, where it is that and costs another
    softmax: PointwiseCost | None = None  # the scores, where attention is written out
    quantize: PointwiseCost = PointwiseCost(
        forward_kernels=2, forward_passes=3, backward_kernels=3, backward_passes=4
    )  # matmuls in fewer bits: ranges found, cast, laid out anew; forward the input, backward the output's gradient
    bias: PointwiseCost = PointwiseCost(
        forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0
    )  # the output of a projection with a bias, whose gradient sums over tokens
    split: PointwiseCost = PointwiseCost(
        forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0
    )  # queries, keys and values of one matmul: parted, and their gradients put together


class AttentionKernel(StrEnum):
    """Which kernels work out attention; the curves of ``Device.efficiency`` that they follow."""

    FLASH = "flash"  # FlashAttention-2, as torch's own
    FLASH3 = "flash3"  # FlashAttention-3 or cuDNN on Hopper
    TRITON = "triton"  # FlashAttention of 2022 in Triton: TRITON_SLOWDOWN times the seconds of FLASH
    WRITTEN_OUT = "written out"  # batched matmuls with a softmax between them


# seconds of the Triton kernel over those of FlashAttention-2, forward and backward: 1.3 to 2.5 over sequence lengths
# and head sizes on an A100 (arXiv 2307.08691, section 4.1), less forward than backward, which adds up the gradient of
# queries in memory, block after block of keys; heads of 64 run at the rate of heads of 128
TRITON_SLOWDOWN = (1.4, 2.1)


@record
class Selective:
    """What selective recompute works out again of a decoder block, as shares of each part's forward.

    ``rest`` are the memory-bound operators, ``core`` is attention between its projections, ``projections`` the
    matmuls with weights.
    """

    rest: float = 1.0
    core: float = 0.0
    projections: float = 0.0
    gathers: bool = False  # sequence-parallel inputs are gathered again
    outputs: float = 0.0  # of what projections put out, the share that is not kept


@record
class HostCost:
    """What a target's Python costs, apart from the kernels it launches.

    A device that runs behind its host hides these up to ``run_ahead``: a block takes
    ``(device^q + host^q)^(1/q)`` seconds, ``q = run_ahead``, from the sum (1) to the larger of both (infinity): kernels
    differ in length, so that some always wait for the host.
    """

    launch_factor: float = 1.0  # seconds of one operator over the device's ``launch_s``
    collective_s: float = 0.0  # one call of a collective
    skew_s: float = 0.0  # a tp collective waits so long, on the device, for the last of its ranks
    pipelined_collective_s: float = 0.0  # the same for each rank of a tp group, on top, while a pipeline runs beside it
    checked_collective_s: float = 0.0  # for each rank of its group that a collective meets before it starts, exposed
    hop_s: float = 0.0  # one send or receive between stages, exposed
    microbatch_s: float = 0.0  # one micro-batch on one stage: the schedule's own work, exposed
    step_s: float = 0.0  # one step: batch, bookkeeping, synchronisation, exposed
    run_ahead: float = 8.0


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
    masters_are_parameters: bool  # FSDP2: shards are the master weights, computed with are copies that it gathers
    shards_rows: bool  # FSDP2: ZeRO cuts each tensor along its first dimension and pads shards to equal size
    eager_rms_norm: bool  # RMSNorm written out in float32, which keeps more for backward than a fused one
    regathers_sequence: bool  # with sp, saves the sharded input of a matmul and gathers it again in backward
    overlap_dp_reduce: float  # gradients summed over replicas during backward
    overlap_dp_gather: float  # weights of ZeRO 1 to 3
    overlap_dp_scatter: float | None = None  # gradients scattered to their shards' owners; None as overlap_dp_reduce
    overlap_tp: float
    overlap_tp_backward: float = 0.0  # the same in backward alone, behind gradients of weights, where it is more
    overlap_pp: float
    pointwise: Pointwise
    host: HostCost = HostCost()
    memory: MemoryTraits = MemoryTraits()
    context: ContextTraits = ContextTraits()
    experts: ExpertTraits = ExpertTraits()
    attention: AttentionKernel = AttentionKernel.FLASH
    sinks_written_out: bool = False  # attention with sinks (gpt-oss) is written out, whatever the kernel else
    partition: Partition = Partition.EVEN
    pointwise_factor: float = 1.0  # seconds of the memory-bound rest over what its passes cost
    dp_factor: float = 1.0  # seconds of data-parallel collectives over what their bytes cost
    fused_loss: bool = False  # one kernel from logits to their loss: no float32 copies of them
    gather_copies: float = 2.0  # passes over gathered weights: FSDP2 copies them out of a flat buffer
    reduce_copies: float = 2.0  # passes over gradients, in their dtype: into a flat buffer
    copies_exposed: bool = False  # they run among the kernels, not beside them
    sequence_copies: float = 0.0  # passes over what sequence parallelism gathers or scatters, from two sequences on
    selective: Selective = Selective()
    recompute_stops_early: bool = True  # as torch's checkpoint; Megatron repeats the whole block
    reduces_once: bool = False  # gradients stay whole until the last micro-batch whatever the ZeRO stage (1 and 2)
    broadcasts_weights: bool = False  # ZeRO 1 gives whole tensors to ranks, and each sends its own to the others
    blocking_hops: tuple[Schedule, ...] = ()  # schedules whose sends and receives hold both ranks until they end
    receives_ahead: bool = True  # torch's pipelines allocate a buffer for every micro-batch that a stage receives
    splits_hops: bool = False  # without sp, tp peers send a share each between stages and gather it there
    vocab_multiple: int = 1  # the vocabulary is padded to a multiple of this times tp
    pads_whole_vocab: bool = True  # also where tp does not split it
    tensor_parallel: bool = True
    pipeline_parallel: bool = True
    torch_schedules: bool = True  # its pipelines are torch's, with their rules for the number of micro-batches
    defers_products: bool = False  # a split backward puts off the products of blocks' weights; else it is torch's own
    expert_chunks: tuple[int, ...] = (1,)  # values of ep_chunks that it runs where ep is above 1
    half_precision: bool = False  # runs float16 (loss scaling)
    float8: bool = False  # runs float8 matmuls
    float8_gathers: bool = False  # with them, gathers weights and sequence-parallel activations in float8
    row_scaled_factor: float = 1.0  # seconds of float8 matmuls with a scale for each row over those with one for all
    block_scaled_factor: float = 1.0  # the same with a scale for each block of a row and of a column
    matmul_factor: float = 1.0  # seconds of matmuls over the device's: library, layout of operands
    hopper_factor: float = 1.0  # seconds of matmuls on Hopper over those of today's library: fewer kernels at first
    version_of: str = ""  # the target that this is a version of, whose fitted constants it shares
    differs_in: tuple[str, ...] = ()  # but for these (``constants.CONSTANTS``)
    calibrated_on: str = ""  # which measurements the constants above were fitted on


def reduce_overlap(framework: Framework, batch: ConfigBatch) -> NDArray[np.float64]:
    """Share of gradient reduction that each config hides; shape ``[num_configs]``."""
    scatter = framework.overlap_dp_reduce if framework.overlap_dp_scatter is None else framework.overlap_dp_scatter
    return np.where(batch.zero_stage > 0, scatter, framework.overlap_dp_reduce)


def supported(batch: ConfigBatch, framework: Framework, model: ModelSpec, workload: Workload) -> BoolArray:
    """Whether the target executes each config; shape ``[num_configs]``.

    Rules of torch 2.13 that a target built on it inherits (``torch/distributed/pipelining/schedules.py``): 1F1B
    wants ``num_microbatches >= pp``, DualPipeV twice as many; interleaved 1F1B and ZB-H1 run
    ``max(1, num_microbatches // pp)`` rounds, which must divide ``num_microbatches``. What a split backward allows says
    ``splits_backward``. Others interleave multiples of pp only (Megatron-LM,
    ``megatron/core/pipeline_parallel/schedules.py``) and want equal stages. A batch that does not divide is left to
    ``strategy.legal``, which has a reason of its own.
    """
    run = runs_pipeline(batch, framework, model, workload) & runs_degrees(batch, framework, model)
    return run & combines(batch, framework)


def runs_pipeline(batch: ConfigBatch, framework: Framework, model: ModelSpec, workload: Workload) -> BoolArray:
    """The rules of ``supported`` about schedules with their stages and micro-batches; shape ``[num_configs]``.

    They look at nothing of a config but ``pp``, ``vpp``, ``schedule``, ``dp`` and ``micro_batch_size``.
    """
    rules: list[BoolArray] = [
        np.isin(batch.schedule, [SCHEDULES.index(schedule) for schedule in framework.schedules]),
        _runs(batch, num_microbatches(batch, workload), framework) | (_remainder(batch, workload) != 0),
    ]
    if not framework.torch_schedules and framework.partition is Partition.EVEN:
        rules.append(model.num_layers % batch.num_stages == 0)
    return np.asarray(np.logical_and.reduce(rules), dtype=np.bool_)


def runs_degrees(batch: ConfigBatch, framework: Framework, model: ModelSpec) -> BoolArray:
    """The rules of ``supported`` about degrees alone: axes that the target has for this model; ``[num_configs]``."""
    rules = [np.ones(len(batch), dtype=np.bool_), *_runs_context(batch, framework, model)]
    if not framework.tensor_parallel or (not framework.tensor_parallel_moe and model.moe is not None):
        rules.append(batch.tp == 1)
    if not framework.pipeline_parallel:
        rules.append(batch.pp == 1)
    if not framework.expert_parallel:
        rules.append((batch.ep == 1) & (batch.etp == 1))
    return np.asarray(np.logical_and.reduce(rules), dtype=np.bool_)


def combines(batch: ConfigBatch, framework: Framework) -> BoolArray:
    """The other rules of ``supported``, each about a field or about how some go together; shape ``[num_configs]``.

    Of the schedule they look at its name alone, of degrees at none but whether ``dp_shard`` is all of ``dp * cp`` and
    what switches go with.
    """
    shard = np.where(batch.zero_stage > 0, batch.dp * batch.cp, 1)
    rules: list[BoolArray] = [
        np.isin(batch.zero_stage, framework.zero_stages),
        np.isin(batch.recompute, [RECOMPUTES.index(recompute) for recompute in framework.recomputes]),
        batch.vocab_parallel == ((batch.tp > 1) & framework.vocab_parallel),
        (batch.ep_chunks == 1) | ((batch.ep > 1) & np.isin(batch.ep_chunks, framework.expert_chunks)),
    ]
    if framework.torch_schedules:
        recomputes = framework.defers_products | batch.is_recompute(Recompute.NONE)
        rules.append(~splits_backward(batch) | (recomputes & (batch.zero_stage < 2)))
    if not framework.partial_sharding:
        rules.append(batch.dp_shard == shard)
    return np.asarray(np.logical_and.reduce(rules), dtype=np.bool_)


def _runs_context(batch: ConfigBatch, framework: Framework, model: ModelSpec) -> list[BoolArray]:
    """The rules about cp: degrees that the target has, and whether its ring runs the model's sliding windows."""
    if not framework.context_parallel:
        return [batch.cp == 1]
    windows = any(isinstance(layer, AttentionLayer) and layer.window for layer in model.layers())
    rules: list[BoolArray] = []
    if not framework.context.ring or (windows and not framework.context.ring_windows):
        rules.append(batch.cp_ring == 1)
    if not framework.context.ulysses:
        rules.append(batch.cp_ulysses == 1)
    return rules


def num_microbatches(batch: ConfigBatch, workload: Workload) -> IntArray:
    """Micro-batches of each data rank in a step; ``[num_configs]``, rounded down where the batch does not divide."""
    return np.asarray(workload.global_batch_size // (batch.dp * batch.micro_batch_size), dtype=np.int64)


def microbatches_per_round(batch: ConfigBatch, workload: Workload) -> IntArray:
    """Micro-batches that torch's interleaved 1F1B runs through one chunk before it turns to the next."""
    count = num_microbatches(batch, workload)
    return np.asarray(count // np.maximum(count // batch.pp, 1), dtype=np.int64)


def _remainder(batch: ConfigBatch, workload: Workload) -> IntArray:
    return np.asarray(workload.global_batch_size % (batch.dp * batch.micro_batch_size), dtype=np.int64)


def _runs(batch: ConfigBatch, count: IntArray, framework: Framework) -> BoolArray:
    interleaved = batch.is_schedule(Schedule.INTERLEAVED)
    if not framework.torch_schedules:
        return np.asarray(~interleaved | (count % batch.pp == 0))
    rules = (
        ~batch.is_schedule(Schedule.ONE_F_ONE_B) | (batch.pp == 1) | (count >= batch.pp),
        ~batch.is_schedule(Schedule.DUALPIPEV) | (count >= 2 * batch.pp),
        ~(interleaved | batch.is_schedule(Schedule.ZB_H1)) | (count % np.maximum(count // batch.pp, 1) == 0),
    )
    return np.asarray(np.logical_and.reduce(rules), dtype=np.bool_)


def splits_backward(batch: ConfigBatch) -> BoolArray:
    """Whether some backwards are split, into gradients of inputs and of weights; shape ``[num_configs]``.

    On a target whose pipelines are torch's, these run with ZeRO 0 or 1 only: gradients of weights come for the whole
    stage at a time, so that sharding them, or the weights, saves nothing. Where the split is torch's own too
    (``torch/distributed/pipelining/_backward.py``), they run without recompute: torch walks the graph of a stage once
    for its input and once more for each of its weights, and each walk recomputes the block: counted on real ranks, a
    Llama block runs 11 forwards (one, one for its input, nine for its weights) under full recompute; selective
    recompute refuses a second walk. What ``defers_products`` says instead is in ``executors/weight_gradients.py``.
    """
    return batch.is_schedule(*SPLIT_BACKWARD)


def forward_calls(batch: ConfigBatch) -> IntArray:
    """How often a decoder block's forward runs for one micro-batch, whole or in part; shape ``[num_configs]``.

    What the models of time and memory assume: once, and with recompute once more, ahead of the block's backward. A test
    counts the calls of real steps for every schedule.
    """
    return np.asarray(2 - batch.is_recompute(Recompute.NONE), dtype=np.int64)


def refuse_dtypes(framework: Framework, workload: Workload) -> None:
    """Raise ``InputError`` where the target does not train in the recipe's dtypes."""
    recipe = workload.recipe
    if recipe.compute is DType.FLOAT16 and not framework.half_precision:
        raise InputError(f"{framework.name} does not train in float16 (it has no loss scaling); bfloat16 needs none")
    if recipe.matmul is not None and not framework.float8:
        raise InputError(f"{framework.name} does not run {recipe.matmul.value} matmuls; take the recipe bf16")
