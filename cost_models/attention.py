"""Attention of one block: its projections, and the kernels between them.

Causal attention is charged half of the full FLOPs, ``2 * pairs * (head_dim + value_head_dim)`` over the pairs of query
and key that the mask keeps, as flash kernels skip the rest (Dao 2023, arXiv 2307.08691, section 3.1; the diagonal
tiles, done whole, are left out: tile / seq_len of the total). Backward is 2.5 times forward: five matmuls for two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.framework import TRITON_SLOWDOWN, AttentionKernel
from meshwright.cost_models.operators import Operators
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
    """Scores, softmax and values, each rank with its share of the sequence's queries."""
    before, calls_before = ops.forward, ops.forward_calls
    if ops.framework.attention is AttentionKernel.WRITTEN_OUT:
        _written_out(ops, heads, query_dim, value_dim)
    else:
        _flash(ops, layer, heads, kv_heads, query_dim, value_dim)
    ops.core = ops.core + (ops.forward - before)
    ops.core_calls = ops.core_calls + (ops.forward_calls - calls_before)


def _flash(ops: Operators, layer: AttentionLayer, heads: Any, kv_heads: Any, query_dim: int, value_dim: int) -> None:
    """One kernel that never writes the scores."""
    seq_len = ops.workload.seq_len
    pairs = attended_pairs(seq_len, layer.window, layer.causal, ops.framework.windowed_attention) / ops.batch.cp
    sequences = ops.batch.micro_batch_size
    flops = 2.0 * sequences * heads * pairs * (query_dim + value_dim)
    num_bytes = ops.size * ops.tokens * (heads + kv_heads) * (query_dim + value_dim)
    shape = (seq_len / ops.batch.cp, heads * sequences, float(seq_len))
    newer = ops.framework.attention is AttentionKernel.FLASH3
    forward, backward = (
        name + "_fa3" * (newer and ops.device.has_efficiency(name + "_fa3", ops.dtype.value))
        for name in ("attention_forward", "attention_backward")
    )
    triton = ops.framework.attention is AttentionKernel.TRITON
    width, slower = (query_dim + value_dim) / 2, (1.0, 1.0)
    if triton:
        width, slower = max(width, WIDE_HEAD), TRITON_SLOWDOWN
    first = ops.roofline(forward, flops, num_bytes, *shape, head_dim=width)
    second = ops.roofline(backward, 2.5 * flops, 2.0 * num_bytes, *shape, head_dim=width)
    ops.forward, ops.by_input = ops.forward + slower[0] * first, ops.by_input + slower[1] * second
    ops.launch(1, 3)  # backward: the dot product of outputs and their gradients, the kernel, a conversion


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
