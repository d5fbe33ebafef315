"""Phi-1.5 and Phi-2 (phi), Phi-3, Phi-4 and Phi-4-mini (phi3), Phi-3.5-MoE (phimoe)."""

from __future__ import annotations

from meshwright.profiler.hf_fields import Fields
from meshwright.profiler.hf_parts import Parts, aux_loss, head_layer, top_k
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)


def phi(fields: Fields, model_type: str) -> Parts:
    """The parts of a phi config: one LayerNorm before attention and feed-forward side by side, biases everywhere."""
    hidden = fields.size("hidden_size", 2048)
    num_heads = fields.size("num_attention_heads", 32)
    head_dim = fields.head_dim(hidden, num_heads)
    norm_size = hidden // num_heads
    norm = NormLayer(norm_kind=NormKind.LAYER, hidden=hidden)
    attention = _attention(
        fields, hidden, num_heads, head_dim, bias=True, qk_norm=4 * norm_size * fields.flag("qk_layernorm", False)
    )
    mlp = MlpLayer(
        hidden=hidden,
        ffn_size=fields.size("intermediate_size", 8192),
        gated=False,
        bias=True,
        activation=fields.word("hidden_act", "gelu_new"),
    )
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", 51200), hidden=hidden),
        layers=((norm, attention, mlp),) * fields.num_layers(24),
        final=(norm, head_layer(fields, hidden, 51200, tied=False, bias=True)),
        max_seq_len=fields.size("max_position_embeddings", 2048),
    )


def phi3(fields: Fields, model_type: str) -> Parts:
    """The parts of a phi3 config: a Llama with fused projections, and where the config says so a sliding window."""
    hidden = fields.size("hidden_size", 3072)
    num_heads = fields.size("num_attention_heads", 32)
    norm = NormLayer(norm_kind=NormKind.RMS, hidden=hidden)
    attention = _attention(fields, hidden, num_heads, fields.head_dim(hidden, num_heads), window=_window(fields))
    mlp = MlpLayer(
        hidden=hidden,
        ffn_size=fields.size("intermediate_size", 8192),
        activation=fields.word("hidden_act", "silu"),
    )
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", 32064), hidden=hidden),
        layers=((norm, attention, norm, mlp),) * fields.num_layers(32),
        final=(norm, head_layer(fields, hidden, 32064, tied=False)),
        max_seq_len=fields.size("max_position_embeddings", 4096),
    )


def phimoe(fields: Fields, model_type: str) -> Parts:
    """The parts of a phimoe config (arXiv 2404.14219, Phi-3.5-MoE): LayerNorms, experts in every layer."""
    hidden = fields.size("hidden_size", 4096)
    num_heads = fields.size("num_attention_heads", 32)
    norm = NormLayer(norm_kind=NormKind.LAYER, hidden=hidden)
    attention = _attention(
        fields,
        hidden,
        num_heads,
        fields.head_dim(hidden, num_heads),
        kv_heads=8,
        window=_window(fields),
        bias=fields.flag("attention_bias", False),
    )
    num_experts = fields.size("num_local_experts", 16)
    moe = MoeLayer(
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k(fields, num_experts, 2),
        expert_ffn_size=fields.size("intermediate_size", 6400),
        activation=fields.word("hidden_act", "silu"),
        aux_loss=aux_loss(fields, 0.001),
    )
    head = head_layer(fields, hidden, 32064, tied=False, bias=fields.flag("lm_head_bias", False))
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", 32064), hidden=hidden),
        layers=((norm, attention, norm, moe),) * fields.num_layers(32),
        final=(norm, head),
        max_seq_len=fields.size("max_position_embeddings", 131072),
    )


def _window(fields: Fields) -> int:
    return fields.optional_size("sliding_window", None) or 0


def _attention(
    fields: Fields,
    hidden: int,
    num_heads: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    window: int = 0,
    bias: bool = False,
    qk_norm: int = 0,
) -> AttentionLayer:
    num_kv_heads = fields.kv_heads(num_heads, kv_heads)
    return AttentionLayer(
        attention_kind=AttentionKind.MHA if num_kv_heads == num_heads else AttentionKind.GQA,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        window=window,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm_params=qk_norm,
    )
