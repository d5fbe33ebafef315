"""Hugging Face's Llama family: llama, mistral, mixtral, qwen2, qwen3 and the Qwen mixtures of experts.

RMSNorm before each half of a layer, rotary positions, gated feed-forward; they differ in biases, norms on queries and
keys, windows, experts, and in the defaults of their config classes.
"""

from __future__ import annotations

from collections.abc import Callable

from meshwright.profiler.hf_fields import Fields
from meshwright.profiler.hf_parts import Parts, aux_loss, check_divides, head_layer, layer_windows, top_k
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.record import record


@record
class LlamaLike:
    """Defaults of one member of the family: RMSNorm, rotary positions, gated feed-forward."""

    vocab_size: int
    hidden: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None  # None: as many as heads
    kv_heads_nullable: bool = True
    head_dim: int | None = None
    max_seq_len: int = 32768
    qkv_bias: bool = False
    bias_field: str = ""  # the flag over it; "attention_bias" is for the way out too
    hidden_must_divide: bool = False  # the config class refuses hidden sizes that the heads do not divide
    qk_norm: bool = False


LLAMA_LIKE = {
    "llama": LlamaLike(
        vocab_size=32000, hidden=4096, ffn_size=11008, num_layers=32, num_heads=32, max_seq_len=2048,
        bias_field="attention_bias", hidden_must_divide=True,
    ),
    "mistral": LlamaLike(
        vocab_size=32000, hidden=4096, ffn_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, max_seq_len=131072
    ),
    "mixtral": LlamaLike(
        vocab_size=32000, hidden=4096, ffn_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, max_seq_len=131072
    ),
    "qwen2": LlamaLike(
        vocab_size=151936, hidden=4096, ffn_size=22016, num_layers=32, num_heads=32, num_kv_heads=32, qkv_bias=True
    ),
    "qwen3": LlamaLike(
        vocab_size=151936, hidden=4096, ffn_size=22016, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
        bias_field="attention_bias", qk_norm=True,
    ),
    "qwen2_moe": LlamaLike(
        vocab_size=151936, hidden=2048, ffn_size=5632, num_layers=24, num_heads=16, num_kv_heads=16,
        kv_heads_nullable=False, qkv_bias=True, bias_field="qkv_bias",
    ),
    "qwen3_moe": LlamaLike(
        vocab_size=151936, hidden=2048, ffn_size=6144, num_layers=24, num_heads=32, num_kv_heads=4,
        kv_heads_nullable=False, bias_field="attention_bias", qk_norm=True,
    ),
}  # fmt: skip


def llama_like(fields: Fields, model_type: str) -> Parts:
    """The parts of a config of any member of the family."""
    family = LLAMA_LIKE[model_type]
    hidden = fields.size("hidden_size", family.hidden)
    num_layers = fields.num_layers(family.num_layers)
    attention = _llama_attention(fields, family, hidden)
    norm = NormLayer(norm_kind=NormKind.RMS, hidden=hidden)
    feed_forward = FEED_FORWARD.get(model_type, _dense)(fields, model_type, hidden, num_layers)
    windows = _windows(fields, model_type, num_layers)
    layers = tuple((norm, attention(window), norm, mlp) for window, mlp in zip(windows, feed_forward, strict=True))
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", family.vocab_size), hidden=hidden),
        layers=layers,
        final=(norm, head_layer(fields, hidden, family.vocab_size, tied=False)),
        max_seq_len=fields.size("max_position_embeddings", family.max_seq_len),
    )


def _llama_attention(fields: Fields, family: LlamaLike, hidden: int) -> Callable[[int], AttentionLayer]:
    num_heads = fields.size("num_attention_heads", family.num_heads)
    num_kv_heads = fields.kv_heads(num_heads, family.num_kv_heads, nullable=family.kv_heads_nullable)
    if family.hidden_must_divide:
        check_divides(fields, hidden, num_heads)
    head_dim = fields.head_dim(hidden, num_heads, family.head_dim)
    qkv_bias = fields.flag(family.bias_field, family.qkv_bias) if family.bias_field else family.qkv_bias
    made: dict[int, AttentionLayer] = {}

    def attention(window: int) -> AttentionLayer:
        if window not in made:
            made[window] = AttentionLayer(
                attention_kind=AttentionKind.MHA if num_kv_heads == num_heads else AttentionKind.GQA,
                hidden=hidden,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                value_head_dim=head_dim,
                window=window,
                qkv_bias=qkv_bias,
                out_bias=qkv_bias and family.bias_field == "attention_bias",
                qk_norm_params=2 * head_dim if family.qk_norm else 0,
            )
        return made[window]

    return attention


def _windows(fields: Fields, model_type: str, num_layers: int) -> list[int]:
    """The sliding window of each layer, 0 where attention reaches back to the start."""
    if model_type == "llama":
        return [0] * num_layers
    if model_type in ("mistral", "mixtral"):
        window = fields.optional_size("sliding_window", 4096 if model_type == "mistral" else None)
        return [window or 0] * num_layers
    if not fields.flag("use_sliding_window", False):
        return [0] * num_layers
    window = fields.optional_size("sliding_window", 4096) or 0
    if model_type == "qwen3_moe":
        return [window] * num_layers
    from_layer = fields.size("max_window_layers", 28, least=0)
    if model_type == "qwen2_moe":
        slides = [layer % 2 == 0 and layer < from_layer for layer in range(num_layers)]
    else:
        slides = [layer >= from_layer for layer in range(num_layers)]
    return layer_windows(fields, num_layers, window, slides)


def _dense(fields: Fields, model_type: str, hidden: int, num_layers: int) -> list[LayerSpec]:
    mlp = MlpLayer(
        hidden=hidden,
        ffn_size=fields.size("intermediate_size", LLAMA_LIKE[model_type].ffn_size),
        bias=model_type == "llama" and fields.flag("mlp_bias", False),
        activation=fields.word("hidden_act", "silu"),
    )
    return [mlp] * num_layers


def _mixtral(fields: Fields, model_type: str, hidden: int, num_layers: int) -> list[LayerSpec]:
    num_experts = fields.size("num_local_experts", 8)
    moe = MoeLayer(
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k(fields, num_experts, 2),
        expert_ffn_size=fields.size("intermediate_size", LLAMA_LIKE[model_type].ffn_size),
        activation=fields.word("hidden_act", "silu"),
        aux_loss=aux_loss(fields, 0.001),
    )
    return [moe] * num_layers


def _qwen_moe(fields: Fields, model_type: str, hidden: int, num_layers: int) -> list[LayerSpec]:
    """Experts in every ``decoder_sparse_step``-th layer not in ``mlp_only_layers``; qwen2_moe shares one more."""
    dense = _dense(fields, model_type, hidden, num_layers)[0]
    is_qwen2 = model_type == "qwen2_moe"
    num_experts = fields.size("num_experts", 60 if is_qwen2 else 128, least=0)
    step = fields.size("decoder_sparse_step", 1)
    only_dense = set(fields.items("mlp_only_layers", int) or ())
    if num_experts == 0:
        return [dense] * num_layers
    shared = fields.size("shared_expert_intermediate_size", 5632, least=0) if is_qwen2 else 0
    moe = MoeLayer(
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k(fields, num_experts, 4 if is_qwen2 else 8),
        expert_ffn_size=fields.size("moe_intermediate_size", 1408 if is_qwen2 else 768),
        shared_ffn_size=shared,
        extra_params=hidden if is_qwen2 else 0,  # the gate on the shared expert
        activation=fields.word("hidden_act", "silu"),
        aux_loss=aux_loss(fields, 0.001),
        narrow_weights=True,
    )
    return [moe if layer not in only_dense and (layer + 1) % step == 0 else dense for layer in range(num_layers)]


FEED_FORWARD: dict[str, Callable[[Fields, str, int, int], list[LayerSpec]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
}
