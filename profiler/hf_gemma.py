"""Gemma (arXiv 2403.08295), Gemma 2 (2408.00118) and the text part of Gemma 3 (2503.19786): heads of their own size,
tied embeddings; from the second on norms around each half of a layer, and windows in most layers."""

from __future__ import annotations

from meshwright.profiler.hf_fields import Fields
from meshwright.profiler.hf_parts import Layers, Parts, head_layer, layer_windows
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    MlpLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.record import record


@record
class GemmaLike:
    """Defaults of one generation; ``full_every`` counts layers from one with full attention to the next."""

    vocab_size: int = 256000
    hidden: int = 2304
    ffn_size: int = 9216
    num_layers: int = 26
    num_heads: int = 8
    num_kv_heads: int = 4
    max_seq_len: int = 8192
    full_every: int = 1
    norms_around: bool = True
    qk_norm: bool = False


GENERATIONS = {
    "gemma": GemmaLike(hidden=3072, ffn_size=24576, num_layers=28, num_heads=16, num_kv_heads=16, norms_around=False),
    "gemma2": GemmaLike(full_every=2),
    "gemma3_text": GemmaLike(vocab_size=262208, max_seq_len=131072, full_every=6, qk_norm=True),
}


def gemma(fields: Fields, model_type: str) -> Parts:
    """The parts of a gemma, gemma2 or gemma3_text config; softcaps and scaled embeddings have no weights."""
    family = GENERATIONS[model_type]
    hidden = fields.size("hidden_size", family.hidden)
    num_heads = fields.size("num_attention_heads", family.num_heads)
    if hidden % num_heads and family.norms_around:
        raise fields.error("num_attention_heads", f"{num_heads} does not divide hidden_size={hidden}")
    if fields.flag("use_bidirectional_attention", False, null=False):
        raise fields.error("use_bidirectional_attention", "not supported: expected a causal decoder")
    num_layers = fields.num_layers(family.num_layers)
    norm = NormLayer(norm_kind=NormKind.RMS, hidden=hidden)
    mlp = MlpLayer(
        hidden=hidden,
        ffn_size=fields.size("intermediate_size", family.ffn_size),
        activation=_activation(fields, model_type),
    )
    attention = _attention(fields, family, hidden, num_heads)
    windows = _windows(fields, family, num_layers)

    def block(window: int) -> Layers:
        if family.norms_around:
            return (norm, attention[window], norm, norm, mlp, norm)
        return (norm, attention[window], norm, mlp)

    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", family.vocab_size), hidden=hidden),
        layers=tuple(block(window) for window in windows),
        final=(norm, head_layer(fields, hidden, family.vocab_size, tied=True)),
        max_seq_len=fields.size("max_position_embeddings", family.max_seq_len),
    )


def _attention(fields: Fields, family: GemmaLike, hidden: int, num_heads: int) -> dict[int, AttentionLayer]:
    num_kv_heads = fields.kv_heads(num_heads, family.num_kv_heads, nullable=False)
    head_dim = fields.size("head_dim", 256)
    bias = fields.flag("attention_bias", False)
    window = fields.optional_size("sliding_window", 4096) or 0 if family.full_every > 1 else 0
    return {
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
            qk_norm_params=2 * head_dim if family.qk_norm else 0,
        )
        for size in (0, window)
    }


def _windows(fields: Fields, family: GemmaLike, num_layers: int) -> list[int]:
    if family.full_every == 1:
        return [0] * num_layers
    window = fields.optional_size("sliding_window", 4096) or 0
    every = fields.size("sliding_window_pattern", family.full_every) if family.qk_norm else family.full_every
    return layer_windows(fields, num_layers, window, [(layer + 1) % every != 0 for layer in range(num_layers)])


def _activation(fields: Fields, model_type: str) -> str:
    if model_type != "gemma":
        return fields.word("hidden_activation", "gelu_pytorch_tanh")
    word = fields.word("hidden_act", "gelu_pytorch_tanh")
    return (
        "gelu_pytorch_tanh" if word == "gelu" else word
    )  # as the config class has it: a slip of the first checkpoints
