"""The weight tensors of a layer: their shapes, and how tensor and expert parallelism cut each.

What a rank holds, what an optimizer loops over and what a shard of ZeRO is all follow from this one list. Shapes are
those of Hugging Face's modules and of Megatron-Core's with its fused projections apart: queries, keys and values are
three matrices, gate and up two, the routed experts of a layer two stacks ``[num_experts, ...]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import ConfigBatch, IntArray
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    HeadLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)

FloatArray = NDArray[np.float64]


class Cut(StrEnum):
    """What tp (for routed experts: etp) does with a matrix ``[rows, columns]``, rows being outputs."""

    WHOLE = "whole"  # each rank holds it
    ROWS = "rows"  # a column-parallel matmul: outputs are cut
    COLUMNS = "columns"  # a row-parallel matmul: inputs are cut
    VOCAB = "vocabulary"  # rows, padded up to a multiple of tp, where the config splits the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """``copies`` tensors ``[rows, columns]``, or ``[experts, rows, columns]`` of routed experts.

    ``least_rows`` is what a rank keeps of the rows at least (a whole key/value head). ``tied`` is the embedding's own
    tensor where no pipeline parts the two.
    """

    rows: int
    columns: int = 1
    cut: Cut = Cut.WHOLE
    copies: int = 1
    experts: int = 0
    least_rows: int = 0
    tied: bool = False


@lru_cache(maxsize=1024)
def layer_weights(layer: LayerSpec) -> tuple[Weight, ...]:
    """Every weight tensor of a layer; their sizes sum to ``layer.params`` and what a tied head shares."""
    if isinstance(layer, NormLayer):
        copies = 1 if layer.norm_kind is NormKind.RMS else 2
        return (Weight(rows=layer.hidden, copies=copies),) if layer.affine else ()
    if isinstance(layer, EmbeddingLayer):
        table = Weight(rows=layer.vocab_size, columns=layer.hidden, cut=Cut.VOCAB)
        positions = Weight(rows=layer.num_positions, columns=layer.hidden)
        return (table, positions) if layer.num_positions else (table,)
    if isinstance(layer, HeadLayer):
        head = Weight(rows=layer.vocab_size, columns=layer.hidden, cut=Cut.VOCAB, tied=layer.tied)
        return (head, Weight(rows=layer.vocab_size, cut=Cut.VOCAB)) if layer.bias else (head,)
    if isinstance(layer, MlpLayer):
        return _feed_forward(layer.hidden, layer.ffn_size, gated=layer.gated, bias=layer.bias)
    if isinstance(layer, MoeLayer):
        return _moe(layer)
    return (*_latent(layer), *_norms(layer)) if _is_latent(layer) else (*_heads(layer), *_norms(layer))


def local_shape(
    weight: Weight, batch: ConfigBatch, multiple: IntArray | int = 1
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Experts (1 of other weights), rows and columns that a rank of each config holds before ZeRO: ``[num_configs]``.

    A rank without the tensor has no rows; those of a vocabulary are padded to a multiple of ``multiple``.
    """
    ones = np.ones(len(batch))
    experts = weight.experts / batch.ep if weight.experts else ones
    ways = batch.etp if weight.experts else batch.tp
    rows, columns = weight.rows * ones, weight.columns * ones
    if weight.cut is Cut.VOCAB:
        rows = vocab_rows(weight.rows, batch, multiple)
        rows = np.where(weight.tied & (batch.pp == 1), 0.0, rows)
    elif weight.cut is Cut.ROWS:
        rows = np.maximum(rows / ways, float(weight.least_rows))
    elif weight.cut is Cut.COLUMNS:
        columns = columns / ways
    return experts, rows, columns


def vocab_rows(vocab_size: int, batch: ConfigBatch, multiple: IntArray | int = 1) -> FloatArray:
    """Rows of the token table or head on one rank, a multiple of ``multiple``."""
    ranks = np.where(batch.vocab_parallel, batch.tp, 1)
    return np.asarray(np.ceil(vocab_size / ranks / multiple) * multiple, dtype=np.float64)


def _is_latent(layer: AttentionLayer) -> bool:
    return layer.attention_kind is AttentionKind.MLA


def _heads(layer: AttentionLayer) -> list[Weight]:
    """Projections of attention with heads of its own: each rank keeps whole heads, of keys and values one at least."""
    widths = (
        (layer.num_heads * layer.head_dim, 0),
        (layer.num_kv_heads * layer.head_dim, layer.head_dim),
        (layer.num_kv_heads * layer.value_head_dim, layer.value_head_dim),
    )
    found = []
    for rows, least in widths:
        found.append(Weight(rows=rows, columns=layer.hidden, cut=Cut.ROWS, least_rows=least))
        if layer.qkv_bias:
            found.append(Weight(rows=rows, cut=Cut.ROWS, least_rows=least))
    return [*found, *_way_out(layer)]


def _latent(layer: AttentionLayer) -> list[Weight]:
    """MLA's projections: those down to a latent (and their biases) are whole on each rank, those up from it are cut.

    So Megatron-Core has them (``transformer/multi_latent_attention.py``: ``parallel_mode="duplicated"``), whose ranks
    would otherwise exchange the latents.
    """
    query_width = layer.num_heads * (layer.head_dim + layer.rope_head_dim)
    downs, ups = [layer.kv_lora_rank + layer.rope_head_dim], []
    if layer.q_lora_rank:
        downs.append(layer.q_lora_rank)
    ups.append((query_width, layer.q_lora_rank or layer.hidden))
    ups.append((layer.num_heads * (layer.head_dim + layer.value_head_dim), layer.kv_lora_rank))
    found = [Weight(rows=rows, columns=layer.hidden) for rows in downs]
    found += [Weight(rows=rows) for rows in downs if layer.qkv_bias]
    found += [Weight(rows=rows, columns=columns, cut=Cut.ROWS) for rows, columns in ups]
    return [*found, *_way_out(layer)]


def _way_out(layer: AttentionLayer) -> list[Weight]:
    out = Weight(rows=layer.hidden, columns=layer.num_heads * layer.value_head_dim, cut=Cut.COLUMNS)
    return [out, Weight(rows=layer.hidden)] if layer.out_bias else [out]


def _norms(layer: AttentionLayer) -> list[Weight]:
    """Norms on queries and keys, and on latents, whole on each rank; attention sinks, cut with their heads."""
    sinks = layer.extra_params == layer.num_heads and not _is_latent(layer)
    half, rest = divmod(layer.qk_norm_params, 2)
    sizes = [half, half + rest]
    if layer.extra_params == layer.q_lora_rank + layer.kv_lora_rank:
        sizes += [layer.q_lora_rank, layer.kv_lora_rank]
    elif not sinks:
        sizes.append(layer.extra_params)
    found = [Weight(rows=size) for size in sizes if size]
    return [*found, Weight(rows=layer.num_heads, cut=Cut.ROWS)] if sinks else found


def _feed_forward(hidden: int, ffn_size: int, *, gated: bool, bias: bool = False) -> tuple[Weight, ...]:
    ways_in = 2 if gated else 1
    matrices = (
        Weight(rows=ffn_size, columns=hidden, cut=Cut.ROWS, copies=ways_in),
        Weight(rows=hidden, columns=ffn_size, cut=Cut.COLUMNS),
    )
    if not bias:
        return matrices
    return (*matrices, Weight(rows=ffn_size, cut=Cut.ROWS, copies=ways_in), Weight(rows=hidden))


def has_biases(layer: MoeLayer) -> bool:
    """Whether router and experts have biases: as many as ``extra_params`` says."""
    ways_in = 2 if layer.gated else 1
    return layer.extra_params == layer.num_experts * (ways_in * layer.expert_ffn_size + layer.hidden + 1)


def has_shared_gate(layer: MoeLayer) -> bool:
    """Whether a shared expert's output is multiplied with a number that a token has (Qwen2-MoE)."""
    return bool(layer.shared_ffn_size) and layer.extra_params == layer.hidden


def _moe(layer: MoeLayer) -> tuple[Weight, ...]:
    """Two stacks of routed experts; the router whole, a shared expert cut by tp, its gate one row.

    Where experts and router have biases (gpt-oss), that of the first matrix is cut with it. What else is in
    ``extra_params`` (biases of routers) is taken to be whole on each rank: below 0.1 % of a layer.
    """
    ways_in = 2 if layer.gated else 1
    found = [
        Weight(experts=layer.num_experts, rows=ways_in * layer.expert_ffn_size, columns=layer.hidden, cut=Cut.ROWS),
        Weight(experts=layer.num_experts, rows=layer.hidden, columns=layer.expert_ffn_size, cut=Cut.COLUMNS),
        Weight(rows=layer.num_experts, columns=layer.hidden),
    ]
    if layer.shared_ffn_size:
        found += _feed_forward(layer.hidden, layer.shared_ffn_size, gated=layer.gated)
    if has_biases(layer):
        found.append(Weight(experts=layer.num_experts, rows=ways_in * layer.expert_ffn_size, cut=Cut.ROWS))
        found += [Weight(experts=layer.num_experts, rows=layer.hidden), Weight(rows=layer.num_experts)]
    elif has_shared_gate(layer):
        found.append(Weight(rows=1, columns=layer.hidden))
    elif layer.extra_params:
        found.append(Weight(rows=layer.extra_params))
    return tuple(found)
