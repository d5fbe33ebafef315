"""FLOPs and bytes of a block on one rank -> seconds on a device, from efficiency curves at the shapes it really has.

Each operator takes ``max(FLOPs / achievable rate, bytes / memory rate)`` (the roofline of Williams, Waterman and
Patterson 2009, doi:10.1145/1498765.1498785, with a rate that depends on shape). A matmul ``[m, k] x [k, n]`` has
``2 m n k`` FLOPs and reads or writes ``m k + k n + m n`` numbers; its gradients by input and by weight are matmuls
``(m, k, n)`` and ``(k, n, m)`` of the same FLOPs.

``operators.Operators`` adds them up; attention has a file of its own.

Left out: transposes, casts between operators that no layer owns, index arithmetic: a few percent of an eager step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.attention import add_attention
from meshwright.cost_models.feed_forward import add_experts, add_mlp
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.framework import forward_calls as times_forward
from meshwright.cost_models.operators import Operators, vocab_multiple
from meshwright.cost_models.strategy import ConfigBatch, Recompute
from meshwright.cost_models.weights import vocab_rows
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import Device
from meshwright.profiler.layers import (
    AttentionLayer,
    EmbeddingLayer,
    HeadLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.model import Block, BlockKind

FloatArray = NDArray[np.float64]
FIELDS = (
    "tp", "cp_ring", "cp_ulysses", "cp", "micro_batch_size", "sequence_parallel", "vocab_parallel", "recompute", "ep",
    "etp", "ep_chunks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockSeconds:
    """Seconds of one block on one micro-batch of one rank, each of shape ``[num_configs]``.

    Backward is apart by what it is for, the gradient of inputs or of weights. ``*_host`` is what the host spends on
    launching the kernels: see ``host_wait`` for what of it a step waits for. ``experts_*`` are the parts of forward and
    backward that exchanges of other chunks may run beside, ``attention_*`` those that a ring's messages may;
    ``experts_*_host`` is what of the launches comes after the host has read how many rows each expert has;
    ``experts_weight`` what of ``backward_weight`` is the routed experts'.
    """

    forward: FloatArray
    backward_input: FloatArray
    backward_weight: FloatArray
    recompute: FloatArray
    forward_host: FloatArray
    backward_host: FloatArray
    recompute_host: FloatArray
    experts_forward: FloatArray
    experts_backward: FloatArray
    experts_forward_host: FloatArray
    experts_backward_host: FloatArray
    attention_forward: FloatArray
    attention_backward: FloatArray
    experts_weight: FloatArray


def block_seconds(
    block: Block, workload: Workload, device: Device, framework: Framework, batch: ConfigBatch
) -> BlockSeconds:
    """Seconds of ``block`` for every config, worked out once for each different (tp, cp, micro batch, sp, recompute).

    Raises ``InputError`` when the device has no rate for an operator of the block in the compute dtype.
    """
    few, inverse = batch.distinct(*FIELDS)
    narrow = workload.recipe.matmul if block.kind is BlockKind.DECODER else None
    ops = Operators(workload, device, framework, few, narrow)
    for layer in block.layers:
        _add(ops, layer)
        if isinstance(layer, AttentionLayer | MlpLayer | MoeLayer):
            ops.pointwise(framework.pointwise.residual, ops.stream)
            ops.pointwise(framework.pointwise.dropout, ops.stream)
    return _total(ops, inverse, recomputes=block.kind is BlockKind.DECODER)


def _add(ops: Operators, layer: LayerSpec) -> None:
    """Add every operator of a layer."""
    ops.hidden = layer.hidden
    if isinstance(layer, NormLayer):
        rms = layer.norm_kind is NormKind.RMS
        ops.pointwise(ops.framework.pointwise.rms_norm if rms else ops.framework.pointwise.layer_norm, ops.stream)
    elif isinstance(layer, AttentionLayer):
        add_attention(ops, layer)
    elif isinstance(layer, MlpLayer):
        add_mlp(ops, layer.hidden, layer.ffn_size, layer.gated, bias=layer.bias, activation=layer.activation)
    elif isinstance(layer, MoeLayer):
        add_experts(ops, layer)
    elif isinstance(layer, EmbeddingLayer):
        ops.pointwise(ops.framework.pointwise.embedding, ops.tokens * layer.hidden)
        rows = vocab_rows(layer.vocab_size, ops.batch, vocab_multiple(ops.framework, ops.batch))
        ops.pointwise(ops.framework.pointwise.embedding_table, rows * layer.hidden)
    elif isinstance(layer, HeadLayer):
        logits = vocab_rows(layer.vocab_size, ops.batch, vocab_multiple(ops.framework, ops.batch))
        ops.matmul(ops.tokens, logits, layer.hidden)
        table, split = ops.framework.pointwise, ops.batch.vocab_parallel
        ops.pointwise(table.loss, np.where(split, 0.0, ops.tokens * logits))
        ops.pointwise(table.sharded_loss, np.where(split, ops.tokens * logits, 0.0))


def _total(ops: Operators, inverse: NDArray[np.int64], *, recomputes: bool) -> BlockSeconds:
    """The sums, spread to every config; only decoder blocks are recomputed.

    Where the target stops early, a recomputed forward ends at the last tensor that backward needs: the block's last
    projection and the residual addition behind it are not repeated (torch/utils/checkpoint.py, early stop;
    ``executors/recompute.py``).
    """
    times = (recomputes * (times_forward(ops.batch) - 1)).astype(np.float64)
    full = ops.batch.is_recompute(Recompute.FULL)
    choice, early = ops.framework.selective, ops.framework.recompute_stops_early
    again = ops.forward - early * (ops.last + ops.last_rest)
    part = choice.rest * (ops.rest - ops.last_rest) + choice.core * ops.core
    part = part + choice.projections * ops.projections
    part_calls = choice.rest * ops.rest_calls + choice.core * ops.core_calls
    part_calls = part_calls + choice.projections * (ops.forward_calls - ops.rest_calls - ops.core_calls)
    recompute = times * np.where(full, again, part)
    recompute_calls = times * np.where(full, ops.forward_calls, part_calls)
    launch_s = ops.device.launch_s * ops.framework.host.launch_factor
    replayed = ops.framework.experts.dense_in_graph & (ops.routed_forward_calls > 0)
    forward_calls = np.where(replayed, ops.routed_forward_calls, ops.forward_calls)
    backward_calls = np.where(replayed, ops.routed_backward_calls, ops.backward_calls)
    arrays = (
        ops.forward,
        ops.by_input,
        ops.by_weight,
        recompute,
        forward_calls * launch_s,
        backward_calls * launch_s,
        recompute_calls * launch_s,
        ops.experts_forward,
        ops.experts_backward,
        ops.routed_forward_calls * launch_s,
        ops.routed_backward_calls * launch_s,
        ops.core,
        ops.core_backward,
        ops.experts_weight,
    )
    return BlockSeconds(*(np.broadcast_to(array, (len(ops.batch),))[inverse] for array in arrays))
