"""The text part of Llama 4 (llama4_text): a shared expert beside the routed ones, in every layer or in every other,
and attention in chunks in three layers of four."""

from __future__ import annotations

from meshwright.profiler.hf_fields import Fields, shorten
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

CHUNKED = "attention inside chunks of {:,} tokens stands as a window of as many, which sees up to twice the keys"


def llama4(fields: Fields, model_type: str) -> Parts:
    """The parts of a llama4_text config: norms on queries and keys have no weights, layers without rotation are full.

    Chunked attention stands as a sliding window as long as a chunk: equal up to one chunk of tokens, and up to twice
    the keys beyond; a note says so.
    """
    hidden = fields.size("hidden_size", 5120)
    num_layers = fields.num_layers(48)
    chunk = fields.optional_size("attention_chunk_size", 8192) or 0
    rotary, chunked = _rotary(fields, num_layers), _chunked(fields, num_layers)
    norm = NormLayer(norm_kind=NormKind.RMS, hidden=hidden)
    ffn_size = fields.size("intermediate_size", 8192)
    num_experts = fields.size("num_local_experts", 16)
    activation = fields.word("hidden_act", "silu")
    moe = MoeLayer(
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k(fields, num_experts, 1),
        expert_ffn_size=ffn_size,
        shared_ffn_size=ffn_size,
        activation=activation,
        aux_loss=aux_loss(fields, 0.001),
    )
    dense = MlpLayer(hidden=hidden, ffn_size=fields.size("intermediate_size_mlp", 16384), activation=activation)
    sparse = _sparse_layers(fields, num_layers)
    kinds = {
        (turns, slides): _attention(fields, hidden, chunk if slides else 0, rotary=turns)
        for turns in (True, False)
        for slides in (True, False)
    }
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", 202048), hidden=hidden),
        layers=tuple(
            (norm, kinds[turns, slides], norm, moe if layer in sparse else dense)
            for layer, (turns, slides) in enumerate(zip(rotary, chunked or rotary, strict=True))
        ),
        final=(norm, head_layer(fields, hidden, 202048, tied=False)),
        max_seq_len=fields.size("max_position_embeddings", 131072),
        notes=(CHUNKED.format(chunk),) if chunk and any(chunked or rotary) else (),
    )


def _rotary(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers rotate queries and keys: all but every fourth, unless the config lists them."""
    listed = fields.items("no_rope_layers", int)  # ones where there is rotation, in spite of its name
    if listed:
        if len(listed) != num_layers:
            raise fields.error("no_rope_layers", f"expected {num_layers} (num_hidden_layers), found {len(listed)}")
        return [bool(turns) for turns in listed]
    interval = fields.size("no_rope_layer_interval", 4)
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


def _chunked(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers attend in chunks by ``layer_types``; empty where that is absent: those that rotate."""
    kinds = fields.items("layer_types", str)
    if kinds is None:
        return []
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "chunked_attention"}:
        expected = f'{num_layers} (num_hidden_layers) times "full_attention" or "chunked_attention"'
        raise fields.error("layer_types", f"expected {expected}, found {len(kinds)}: {shorten(sorted(set(kinds)))}")
    return [kind == "chunked_attention" for kind in kinds]


def _sparse_layers(fields: Fields, num_layers: int) -> set[int]:
    listed = fields.items("moe_layers", int)
    if listed is not None:
        return set(listed)
    step = fields.size("interleave_moe_layer_step", 1)
    return set(range(step - 1, num_layers, step))


def _attention(fields: Fields, hidden: int, window: int, *, rotary: bool) -> AttentionLayer:
    num_heads = fields.size("num_attention_heads", 40)
    num_kv_heads = fields.kv_heads(num_heads, 8)
    head_dim = fields.optional_size("head_dim", 128) or fields.head_dim(hidden, num_heads)
    bias = fields.flag("attention_bias", False)
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
        rotary=rotary,
    )
