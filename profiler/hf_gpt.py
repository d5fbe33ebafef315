"""Hugging Face's gpt2, opt and gpt_neox: LayerNorm, a feed-forward of two matrices, biases."""

from __future__ import annotations

from meshwright.profiler.hf_fields import Fields
from meshwright.profiler.hf_parts import Layers, Parts, check_divides, head_layer
from meshwright.profiler.layers import AttentionKind, AttentionLayer, EmbeddingLayer, MlpLayer, NormKind, NormLayer


def gpt2(fields: Fields, model_type: str) -> Parts:
    """The parts of a gpt2 config: learned positions, norms before, tied unless it says otherwise."""
    hidden = fields.size("hidden_size", 768)
    num_heads = fields.size("num_attention_heads", 12)
    check_divides(fields, hidden, num_heads)
    if fields.flag("add_cross_attention", False):
        raise fields.error("add_cross_attention", "not supported: expected a decoder without an encoder")
    norm = NormLayer(norm_kind=NormKind.LAYER, hidden=hidden)
    mlp = MlpLayer(
        hidden=hidden,
        ffn_size=fields.optional_size("n_inner", None) or 4 * hidden,
        gated=False,
        bias=True,
        activation=fields.word("activation_function", "gelu_new"),
    )
    positions = fields.size("max_position_embeddings", 1024)
    attention = _plain_attention(hidden, num_heads, bias=True, rotary=False)
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", 50257), hidden=hidden, num_positions=positions),
        layers=((norm, attention, norm, mlp),) * fields.num_layers(12),
        final=(norm, head_layer(fields, hidden, 50257, tied=True)),
        max_seq_len=positions,
    )


def opt(fields: Fields, model_type: str) -> Parts:
    """OPT (arXiv 2205.01068); its position table has two rows more than positions."""
    hidden = fields.size("hidden_size", 768)
    num_heads = fields.size("num_attention_heads", 12)
    check_divides(fields, hidden, num_heads)
    width = fields.optional_size("word_embed_proj_dim", hidden)
    if width not in (None, hidden):
        raise fields.error(
            "word_embed_proj_dim",
            f"{width} differs from hidden_size={hidden}: projected embeddings (as in opt-350m) are not supported",
        )
    bias = fields.flag("enable_bias", True)
    affine = fields.flag("layer_norm_elementwise_affine", True)
    norm = NormLayer(norm_kind=NormKind.LAYER, hidden=hidden, affine=affine)
    attention = _plain_attention(hidden, num_heads, bias=bias, rotary=False)
    mlp = MlpLayer(
        hidden=hidden,
        ffn_size=fields.size("ffn_dim", 3072),
        gated=False,
        bias=bias,
        activation=fields.word("activation_function", "relu"),
    )
    before = fields.flag("do_layer_norm_before", True)
    has_final_norm = before and not fields.flag("_remove_final_layer_norm", False)
    head = head_layer(fields, hidden, 50272, tied=True)
    positions = fields.size("max_position_embeddings", 2048)
    layers: Layers = (norm, attention, norm, mlp) if before else (attention, norm, mlp, norm)
    return Parts(
        embedding=EmbeddingLayer(
            vocab_size=fields.size("vocab_size", 50272), hidden=hidden, num_positions=positions + 2
        ),
        layers=(layers,) * fields.num_layers(12),
        final=(norm, head) if has_final_norm else (head,),
        max_seq_len=positions,
    )


def gpt_neox(fields: Fields, model_type: str) -> Parts:
    """The parts of a gpt_neox config (arXiv 2204.06745): rotary positions, attention and feed-forward side by side.

    Side by side or one after the other (``use_parallel_residual``), the layers have the same sizes.
    """
    hidden = fields.size("hidden_size", 6144)
    num_heads = fields.size("num_attention_heads", 64)
    check_divides(fields, hidden, num_heads)
    norm = NormLayer(norm_kind=NormKind.LAYER, hidden=hidden)
    mlp = MlpLayer(
        hidden=hidden,
        ffn_size=fields.size("intermediate_size", 24576),
        gated=False,
        bias=True,
        activation=fields.word("hidden_act", "gelu"),
    )
    attention = _plain_attention(hidden, num_heads, bias=fields.flag("attention_bias", True), rotary=True)
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", 50432), hidden=hidden),
        layers=((norm, attention, norm, mlp),) * fields.num_layers(44),
        final=(norm, head_layer(fields, hidden, 50432, tied=False)),
        max_seq_len=fields.size("max_position_embeddings", 2048),
    )


def _plain_attention(hidden: int, num_heads: int, *, bias: bool, rotary: bool) -> AttentionLayer:
    head_dim = hidden // num_heads
    return AttentionLayer(
        attention_kind=AttentionKind.MHA,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        rotary=rotary,
    )
