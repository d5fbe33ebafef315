"""gpt-oss (arXiv 2508.10925): attention sinks, biases everywhere, a window in every other layer, experts in all."""

from __future__ import annotations

from meshwright.profiler.hf_fields import Fields
from meshwright.profiler.hf_parts import Parts, aux_loss, head_layer, layer_windows, top_k
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)


def gpt_oss(fields: Fields, model_type: str) -> Parts:
    """The parts of a gpt_oss config: a sink for each head, and biases of router and experts, in ``extra_params``."""
    hidden = fields.size("hidden_size", 2880)
    num_heads = fields.size("num_attention_heads", 64)
    num_kv_heads = fields.kv_heads(num_heads, 8)
    head_dim = fields.optional_size("head_dim", 64) or fields.head_dim(hidden, num_heads)
    num_layers = fields.num_layers(36)
    bias = fields.flag("attention_bias", True)
    norm = NormLayer(norm_kind=NormKind.RMS, hidden=hidden)
    window = fields.optional_size("sliding_window", 128) or 0
    attention = {
        size: AttentionLayer(
            attention_kind=AttentionKind.MHA if num_kv_heads == num_heads else AttentionKind.GQA,
            hidden=hidden,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=head_dim,
            window=size,
            qkv_bias=bias,
            out_bias=bias,
            extra_params=num_heads,
        )
        for size in {0, window}
    }
    num_experts = fields.size("num_local_experts", 128)
    ffn_size = fields.size("intermediate_size", 2880)
    moe = MoeLayer(
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k(fields, num_experts, 4),
        expert_ffn_size=ffn_size,
        extra_params=num_experts * (2 * ffn_size + hidden + 1),
        activation=fields.word("hidden_act", "silu"),
        aux_loss=aux_loss(fields, 0.001),
        narrow_weights=True,
    )
    windows = layer_windows(fields, num_layers, window, tuple(layer % 2 == 0 for layer in range(num_layers)))
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", 201088), hidden=hidden),
        layers=tuple((norm, attention[size], norm, moe) for size in windows),
        final=(norm, head_layer(fields, hidden, 201088, tied=False)),
        max_seq_len=fields.size("max_position_embeddings", 131072),
    )
