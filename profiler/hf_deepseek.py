"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, shared experts, first layers dense."""

from __future__ import annotations

from meshwright.profiler.hf_fields import Fields
from meshwright.profiler.hf_parts import Parts, check_divides, head_layer, top_k
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)


def deepseek(fields: Fields, model_type: str) -> Parts:
    """The parts of a deepseek_v2 or deepseek_v3 config; V3's multi-token prediction layers are noted, not counted."""
    is_v3 = model_type != "deepseek_v2"
    hidden = fields.size("hidden_size", 7168 if is_v3 else 4096)
    num_layers = fields.num_layers(61 if is_v3 else 32)
    norm = NormLayer(norm_kind=NormKind.RMS, hidden=hidden)
    attention = _latent_attention(fields, is_v3, hidden)
    activation = fields.word("hidden_act", "silu")
    bias = not is_v3 and fields.flag("mlp_bias", False)
    dense = MlpLayer(
        hidden=hidden,
        ffn_size=fields.size("intermediate_size", 18432 if is_v3 else 11008),
        bias=bias,
        activation=activation,
    )
    num_experts = fields.size("n_routed_experts", 256 if is_v3 else 64)
    expert_ffn = fields.size("moe_intermediate_size", 2048 if is_v3 else 1407)
    shared = expert_ffn * fields.size("n_shared_experts", 1 if is_v3 else 2, least=0)
    if fields.size("moe_layer_freq", 1) != 1:
        raise fields.error("moe_layer_freq", "only 1 is supported: transformers' module ignores it")
    moe = MoeLayer(
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k(fields, num_experts, 8 if is_v3 else None),
        expert_ffn_size=expert_ffn,
        shared_ffn_size=shared,
        extra_params=2 * shared + hidden if bias else 0,
        activation=activation,
        float32_router=True,
    )
    num_dense = fields.size("first_k_dense_replace", 3 if is_v3 else 0, least=0)
    mtp = fields.size("num_nextn_predict_layers", 0, least=0) if is_v3 else 0
    left_out = f"{mtp} multi-token prediction layer(s) are not counted: transformers' causal LM module holds none"
    vocab_size = 129280 if is_v3 else 102400
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", vocab_size), hidden=hidden),
        layers=tuple((norm, attention, norm, dense if layer < num_dense else moe) for layer in range(num_layers)),
        final=(norm, head_layer(fields, hidden, vocab_size, tied=False)),
        max_seq_len=fields.size("max_position_embeddings", 4096 if is_v3 else 2048),
        notes=(left_out,) if mtp else (),
    )


def _latent_attention(fields: Fields, is_v3: bool, hidden: int) -> AttentionLayer:
    num_heads = fields.size("num_attention_heads", 128 if is_v3 else 32)
    fields.optional_size("num_key_value_heads", None)  # without effect: latent attention has a key for every head
    if not is_v3:
        check_divides(fields, hidden, num_heads)
    q_lora_rank = fields.optional_size("q_lora_rank", 1536)
    kv_lora_rank = fields.size("kv_lora_rank", 512)
    bias = fields.flag("attention_bias", False)
    return AttentionLayer(
        attention_kind=AttentionKind.MLA,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=fields.size("qk_nope_head_dim", 128),
        value_head_dim=fields.size("v_head_dim", 128),
        q_lora_rank=q_lora_rank or 0,
        kv_lora_rank=kv_lora_rank,
        rope_head_dim=fields.size("qk_rope_head_dim", 64),
        qkv_bias=bias,
        out_bias=bias,
        extra_params=(q_lora_rank or 0) + kv_lora_rank,  # the norms on the latents
    )
