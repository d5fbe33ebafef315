"""Attention of one block: its projections, and the kernels between them.

Causal attention is charged half of the full FLOPs, ``2 * pairs * (head_dim + value_head_dim)`` over the pairs of query
and key that the mask keeps, as flash kernels skip the rest (Dao 2023, arXiv 2307.08691, section 3.1; the diagonal
tiles, done whole, are left out: tile / seq_len of the total). Backward is 2.5 times forward: five matmuls for two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.framework import TRITON_SLOWDOWN, AttentionKernel, Framework, PointwiseCost
from meshwright.cost_models.operators import Operators
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.profiler.efficiency import WIDE_HEAD
from meshwright.profiler.layers import AttentionKind, AttentionLayer

FloatArray = NDArray[np.float64]


def add_attention(ops: Operators, layer: AttentionLayer) -> None:
    """Add every operator of an attention layer to ``ops``."""
    heads, kv_heads = layer.num_heads / ops.tp, np.maximum(layer.num_kv_heads / ops.tp, 1.0)
    query_dim, value_dim = layer.head_dim + layer.rope_head_dim, layer.value_head_dim
    if layer.attention_kind is AttentionKind.MLA:
        _latent_projections(ops, layer, heads)
        kv_heads = heads
    elif ops.framework.fused_projections:
        width = heads * query_dim + kv_heads * (query_dim + value_dim)
        ops.matmul(ops.tokens, width, layer.hidden, bias=layer.qkv_bias, cut="columns")
        ops.pointwise(ops.framework.pointwise.split, ops.tokens * width)
    else:
        widths = (heads * query_dim, kv_heads * query_dim, kv_heads * value_dim)
        for place, width in enumerate(widths):
            ops.matmul(ops.tokens, width, layer.hidden, bias=layer.qkv_bias, also=place, cut="columns")
        ops.branch(2)
    if layer.rotary:
        rotated = layer.rope_head_dim or query_dim
        rotated_heads = heads + (1.0 if layer.rope_head_dim else kv_heads)
        ops.pointwise(ops.framework.pointwise.rotary, ops.tokens * rotated_heads * rotated)
    _core(ops, layer, heads, kv_heads, query_dim, value_dim)
    ops.matmul(ops.tokens, layer.hidden, heads * value_dim, bias=layer.out_bias, cut="rows")


def _latent_projections(ops: Operators, layer: AttentionLayer, heads: FloatArray) -> None:
    query_width = heads * (layer.head_dim + layer.rope_head_dim)
    if layer.q_lora_rank:
        ops.matmul(ops.tokens, layer.q_lora_rank, layer.hidden)
    ops.matmul(ops.tokens, query_width, layer.q_lora_rank or layer.hidden)
    ops.matmul(ops.tokens, layer.kv_lora_rank + layer.rope_head_dim, layer.hidden)
    ops.matmul(ops.tokens, heads * (layer.head_dim + layer.value_head_dim), layer.kv_lora_rank)


def _core(ops: Operators, layer: AttentionLayer, heads: Any, kv_heads: Any, query_dim: int, value_dim: int) -> None:
    """Scores, softmax and values, each rank with its share of the sequence's queries or of the heads."""
    before, backward_before, calls_before = ops.forward, ops.by_input, ops.forward_calls
    sinks = layer.extra_params > 0 and layer.attention_kind is not AttentionKind.MLA
    if ops.framework.attention is AttentionKernel.WRITTEN_OUT or (sinks and ops.framework.sinks_written_out):
        _written_out(ops, heads, query_dim, value_dim)
    else:
        _flash(ops, layer, heads, kv_heads, query_dim, value_dim)
    ops.core = ops.core + (ops.forward - before)
    ops.core_backward = ops.core_backward + (ops.by_input - backward_before)
    ops.core_calls = ops.core_calls + (ops.forward_calls - calls_before)


def _flash(ops: Operators, layer: AttentionLayer, heads: Any, kv_heads: Any, query_dim: int, value_dim: int) -> None:
    """One kernel that never writes the scores, or one for each step of a ring and what puts their results together.

    With Ulysses a rank has its heads over the tokens of all that exchange with it.
    """
    sequences, exchanged = ops.batch.micro_batch_size, ops.batch.cp_ulysses
    heads, kv_heads = heads / exchanged, np.maximum(kv_heads / exchanged, 1.0)
    tokens = ops.tokens * exchanged
    num_bytes = ops.size * tokens * (heads + kv_heads) * (query_dim + value_dim)
    newer = ops.framework.attention is AttentionKernel.FLASH3
    names = [
        name + "_fa3" * (newer and ops.device.has_efficiency(name + "_fa3", ops.dtype.value))
        for name in ("attention_forward", "attention_backward")
    ]
    width, slower = (query_dim + value_dim) / 2, (1.0, 1.0)
    if ops.framework.attention is AttentionKernel.TRITON:
        width, slower = max(width, WIDE_HEAD), TRITON_SLOWDOWN
    first, second, calls = (np.zeros(len(ops.batch)) for _ in range(3))
    for step in kernel_steps(layer, ops.workload.seq_len, ops.framework, ops.batch):
        flops = 2.0 * sequences * heads * step.pairs * (query_dim + value_dim)
        one, two = (
            [
                ops.roofline(
                    name, more * flops, moved, m, heads * sequences, k, head_dim=width, even_tiles=not step.masked
                )
                for m, k in step.shapes
            ]
            for name, more, moved in zip(names, (1.0, 2.5), (num_bytes, 2.0 * num_bytes), strict=True)
        )
        # of two shapes that a step has on different places the ring waits for the slower
        often = step.times * step.slower
        first, second = first + often * np.max(one, axis=0), second + often * np.max(two, axis=0)
        calls = calls + step.times
    ops.forward, ops.by_input = ops.forward + slower[0] * first, ops.by_input + slower[1] * second
    ops.launch(calls, 3.0 * calls)  # backward: the dot product of outputs and their gradients, the kernel, a conversion
    if not ops.framework.context.gathers and (ops.batch.cp_ring > 1).any():
        _merge(ops, layer, tokens * heads, tokens * kv_heads, query_dim, value_dim)


@dataclass(frozen=True, slots=True)
class KernelStep:
    """Calls of an attention kernel that are alike, on one rank: arrays of shape ``[num_configs]``.

    ``times`` calls over ``pairs`` of query and key for each head of each sequence, in the ``shapes`` (queries, keys as
    ``Efficiency`` counts them for a causal kernel: twice the mean number of keys that a query meets) that the call
    has on one place of a ring or another. ``masked`` ones leave tiles of unequal length; those of a ring's later steps
    may be ``slower`` than the device's curve.
    """

    times: FloatArray
    pairs: FloatArray
    shapes: tuple[tuple[FloatArray, FloatArray], ...]
    masked: bool = True
    slower: float = 1.0


def kernel_steps(
    layer: AttentionLayer, seq_len: int, framework: Framework, batch: ConfigBatch
) -> tuple[KernelStep, ...]:
    """The kernels that ``layer`` runs on one rank: one, or step by step where keys come round a ring of R places.

    Under a causal mask a place of ``n = seq_len / R`` tokens, half from each end of the sequence, attends over its own
    block (``n (n + 1) / 2`` pairs), then over half of each other: all its queries and the first half of the keys of an
    earlier place, the second half of its queries and all keys of a later one; ``n^2 / 2`` pairs both, together a share
    ``1 / R`` of all (arXiv 2407.21783, section 3.3.2). With whole pieces in order the last place meets all of every
    other block. A target that gathers keys runs two kernels, one for each of its chunks. A window leaves a place the
    blocks that its chunks' neighbours are in.
    """
    traits, s, w = framework.context, float(seq_len), layer.window
    ring = batch.cp_ring.astype(np.float64)
    n = s / ring
    one, windowed = np.ones(len(batch)), 0 < w < seq_len
    skips = np.where(batch.cp > 1, traits.windows, framework.windowed_attention)
    if windowed and skips.any():
        pairs = np.where(
            skips, attended_pairs(seq_len, w, layer.causal, True), attended_pairs(seq_len, w, layer.causal, False)
        )
        met = np.where(skips, np.minimum(ring, 1.0 + 2.0 * np.ceil((w - 1) / (n / 2.0))), ring)
        met = np.where(traits.gathers, 1.0, met)
        return (KernelStep(met, pairs / ring / met, ((n, np.where(met > 1, n, s)),)),)
    if traits.gathers:
        pairs = attended_pairs(seq_len, w, layer.causal, False) / ring
        alone = np.where(ring > 1, 0.0, 1.0)
        # a chunk's queries meet nearly as many keys each
        chunks = 1.0 + layer.causal
        apart = KernelStep((1.0 - alone) * chunks, pairs / chunks, ((n / chunks, one * s),), masked=False)
        return KernelStep(alone, pairs, ((n, one * s),), masked=layer.causal), apart
    if windowed or not layer.causal:
        return (KernelStep(ring, n * n, ((n, n),), masked=windowed),)
    own = KernelStep(one, n * (n + 1) / 2, ((n, n),))
    if not (ring > 1).any():
        return (own,)
    if not traits.balanced:
        return own, KernelStep(ring - 1.0, n * n, ((n, 2.0 * n),), masked=False, slower=traits.step_factor)
    return own, KernelStep(
        ring - 1.0, n * n / 2.0, ((n, n), (n / 2.0, 2.0 * n)), masked=False, slower=traits.step_factor
    )


def _merge(ops: Operators, layer: AttentionLayer, queries: Any, keys: Any, query_dim: int, value_dim: int) -> None:
    """Results of a ring's steps put together: every step but the first, part of attention's own kernels.

    ``queries`` and ``keys`` are tokens times heads. Under a causal mask a step has all queries and half of the keys or
    the reverse: three quarters of both.
    """
    traits, table = ops.framework.context, ops.framework.context.merge
    steps = ops.batch.cp_ring - 1.0
    part = 0.75 if layer.causal and traits.balanced else 1.0
    kept = ops.rest, ops.rest_calls, ops.last_rest
    output = PointwiseCost(
        forward_kernels=0,
        forward_passes=table.output_passes,
        forward_float32_passes=table.output_float32_passes,
        backward_kernels=0,
        backward_passes=table.query_passes,
        backward_float32_passes=table.query_float32_passes,
    )
    both = PointwiseCost(
        forward_kernels=0,
        forward_passes=0,
        backward_kernels=0,
        backward_passes=table.kv_passes,
        backward_float32_passes=table.kv_float32_passes,
    )
    ops.pointwise(output, steps * part * queries * (query_dim + value_dim) / 2)
    ops.pointwise(both, steps * part * keys * (query_dim + value_dim))
    ops.rest, ops.rest_calls, ops.last_rest = kept
    ops.launch(steps * table.forward_kernels, steps * table.backward_kernels)


def _written_out(ops: Operators, heads: Any, query_dim: int, value_dim: int) -> None:
    """Two batched matmuls, one product a head and sequence, over all pairs, with the softmax's passes between.

    Megatron's fused softmax works on blocks of four score matrices: where heads a rank times sequences is no
    multiple of four it is written out as well, in float32 (megatron/fused_kernels, ``get_batch_per_block``;
    ``fused_softmax.py: is_kernel_available``).
    """
    seq_len, table = float(ops.workload.seq_len), ops.framework.pointwise
    queries, products = seq_len / ops.batch.cp, heads * ops.batch.micro_batch_size
    for contracted, wide in ((query_dim, seq_len), (value_dim, seq_len)):
        flops = 2.0 * products * queries * wide * contracted
        num_bytes = ops.size * products * (queries * wide + (queries + wide) * contracted)
        first = ops.roofline("matmul", flops, num_bytes, queries, wide, float(contracted))
        ops.forward = ops.forward + first
        ops.by_input = ops.by_input + 2.0 * first
        ops.launch(1, 2)
    if table.softmax is not None:
        scores = products * queries * seq_len
        ops.pointwise(table.softmax, scores)
        ops.pointwise(table.loss, np.where(products % 4 == 0, 0.0, scores))


def attended_pairs(seq_len: int, window: int, causal: bool, skips: bool) -> float:
    """Pairs of query and key that attention works out for one head of one sequence.

    Causal: ``s (s + 1) / 2``; a window of ``w`` keys keeps ``w s - w (w - 1) / 2`` of them. A target whose kernels
    do not skip the window (``skips`` false) is given it as a mask and works out all ``s * s``.
    """
    s, w = seq_len, window
    if 0 < w < s:
        return w * s - w * (w - 1) / 2 if skips else float(s) * s
    return s * (s + 1) / 2 if causal else float(s) * s
