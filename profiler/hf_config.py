"""A Hugging Face ``config.json`` -> ``ModelSpec``, without transformers.

Each ``model_type`` has one builder here. Its defaults for absent fields are those of transformers' own config class, and
its layers hold exactly the parameters of transformers' own module (files ``configuration_*.py`` and ``modeling_*.py``
under ``transformers/models``, version 5.23); a test builds every one of them on the meta device and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from meshwright import InputError
from meshwright.profiler.hf_fields import Fields
from meshwright.profiler.model import (
    AttentionKind,
    AttentionLayer,
    Block,
    BlockKind,
    EmbeddingLayer,
    HeadLayer,
    LayerSpec,
    MlpLayer,
    ModelSpec,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.record import record

Layers = tuple[LayerSpec, ...]


@record
class Parts:
    """What a builder finds: the two ends and, layer by layer, what is between."""

    embedding: EmbeddingLayer
    layers: tuple[Layers, ...]
    final: Layers  # the final norm, if any, and the head
    max_seq_len: int
    notes: tuple[str, ...] = ()


def spec_from_config(config: Mapping[str, Any], *, name: str, where: str, notes: Sequence[str] = ()) -> ModelSpec:
    """The ``ModelSpec`` of a config's fields; ``where`` names their origin in messages, ``name`` becomes the spec's.

    Fields without influence on sizes (dropout, initialisers, token ids, rope, quantisation) are not looked at.
    Raises ``InputError`` for a ``model_type`` that is missing or not supported, or a field that is missing or wrong.
    """
    if "model_type" not in config:
        raise InputError(f'{where}: model_type: missing; a Hugging Face config names it, for example "llama"')
    model_type = config["model_type"]
    if not isinstance(model_type, str) or model_type not in BUILDERS:
        raise InputError(f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(BUILDERS)}")
    build, aliases = BUILDERS[model_type]
    parts = build(Fields(config, where=where, aliases=aliases), model_type)
    return assemble(parts, name=name, architecture=model_type, notes=notes)


def assemble(parts: Parts, *, name: str, architecture: str, notes: Sequence[str] = ()) -> ModelSpec:
    """Blocks from parts, equal neighbours folded."""
    decoder = (
        Block(kind=BlockKind.DECODER, layers=layers, repeat=sum(1 for _ in run))
        for layers, run in groupby(parts.layers)
    )
    return ModelSpec(
        name=name,
        architecture=architecture,
        max_seq_len=parts.max_seq_len,
        blocks=(
            Block(kind=BlockKind.EMBEDDING, layers=(parts.embedding,)),
            *decoder,
            Block(kind=BlockKind.HEAD, layers=parts.final),
        ),
        notes=(*notes, *parts.notes),
    )


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
    hidden_must_divide: bool = False  # the config class refuses hidden sizes that the heads do not divide
    qk_norm: bool = False


LLAMA_LIKE = {
    "llama": LlamaLike(
        vocab_size=32000, hidden=4096, ffn_size=11008, num_layers=32, num_heads=32, max_seq_len=2048,
        hidden_must_divide=True,
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
        qk_norm=True,
    ),
    "qwen2_moe": LlamaLike(
        vocab_size=151936, hidden=2048, ffn_size=5632, num_layers=24, num_heads=16, num_kv_heads=16,
        kv_heads_nullable=False, qkv_bias=True,
    ),
    "qwen3_moe": LlamaLike(
        vocab_size=151936, hidden=2048, ffn_size=6144, num_layers=24, num_heads=32, num_kv_heads=4,
        kv_heads_nullable=False, qk_norm=True,
    ),
}  # fmt: skip


def _llama_like(fields: Fields, model_type: str) -> Parts:
    family = LLAMA_LIKE[model_type]
    hidden = fields.size("hidden_size", family.hidden)
    num_layers = fields.num_layers(family.num_layers)
    attention = _llama_attention(fields, model_type, family, hidden)
    norm = NormLayer(norm_kind=NormKind.RMS, hidden=hidden)
    feed_forward = FEED_FORWARD.get(model_type, _dense)(fields, family, hidden, num_layers)
    windows = _windows(fields, model_type, num_layers)
    layers = tuple((norm, attention(window), norm, mlp) for window, mlp in zip(windows, feed_forward, strict=True))
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", family.vocab_size), hidden=hidden),
        layers=layers,
        final=(norm, _head(fields, hidden, family.vocab_size, tied=False)),
        max_seq_len=fields.size("max_position_embeddings", family.max_seq_len),
    )


def _llama_attention(
    fields: Fields, model_type: str, family: LlamaLike, hidden: int
) -> Callable[[int], AttentionLayer]:
    num_heads = fields.size("num_attention_heads", family.num_heads)
    num_kv_heads = fields.kv_heads(num_heads, family.num_kv_heads, nullable=family.kv_heads_nullable)
    if family.hidden_must_divide:
        _check_divides(fields, hidden, num_heads)
    head_dim = fields.head_dim(hidden, num_heads, family.head_dim)
    has_flag = model_type in ("llama", "qwen3", "qwen3_moe")
    out_bias = has_flag and fields.flag("attention_bias", False)
    qkv_bias = out_bias if has_flag else family.qkv_bias
    if model_type == "qwen2_moe":
        qkv_bias = fields.flag("qkv_bias", True)
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
                out_bias=out_bias,
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
    kinds = fields.items("layer_types", str)
    if kinds is None:
        from_layer = fields.size("max_window_layers", 28, least=0)
        if model_type == "qwen2_moe":
            return [window if layer % 2 == 0 and layer < from_layer else 0 for layer in range(num_layers)]
        return [window if layer >= from_layer else 0 for layer in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        expected = f'{num_layers} (num_hidden_layers) times "full_attention" or "sliding_attention"'
        raise fields.error("layer_types", f"expected {expected}, found {len(kinds)}: {', '.join(sorted(set(kinds)))}")
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _dense(fields: Fields, family: LlamaLike, hidden: int, num_layers: int) -> list[LayerSpec]:
    mlp = MlpLayer(
        hidden=hidden,
        ffn_size=fields.size("intermediate_size", family.ffn_size),
        bias=family is LLAMA_LIKE["llama"] and fields.flag("mlp_bias", False),
        activation=fields.word("hidden_act", "silu"),
    )
    return [mlp] * num_layers


def _mixtral(fields: Fields, family: LlamaLike, hidden: int, num_layers: int) -> list[LayerSpec]:
    num_experts = fields.size("num_local_experts", 8)
    moe = MoeLayer(
        hidden=hidden,
        num_experts=num_experts,
        top_k=_top_k(fields, num_experts, 2),
        expert_ffn_size=fields.size("intermediate_size", family.ffn_size),
        activation=fields.word("hidden_act", "silu"),
    )
    return [moe] * num_layers


def _qwen_moe(fields: Fields, family: LlamaLike, hidden: int, num_layers: int) -> list[LayerSpec]:
    """Experts in every ``decoder_sparse_step``-th layer but those in ``mlp_only_layers``; qwen2_moe shares one, gated."""
    dense = _dense(fields, family, hidden, num_layers)[0]
    is_qwen2 = family is LLAMA_LIKE["qwen2_moe"]
    num_experts = fields.size("num_experts", 60 if is_qwen2 else 128, least=0)
    step = fields.size("decoder_sparse_step", 1)
    only_dense = set(fields.items("mlp_only_layers", int) or ())
    if num_experts == 0:
        return [dense] * num_layers
    shared = fields.size("shared_expert_intermediate_size", 5632, least=0) if is_qwen2 else 0
    moe = MoeLayer(
        hidden=hidden,
        num_experts=num_experts,
        top_k=_top_k(fields, num_experts, 4 if is_qwen2 else 8),
        expert_ffn_size=fields.size("moe_intermediate_size", 1408 if is_qwen2 else 768),
        shared_ffn_size=shared,
        extra_params=hidden if is_qwen2 else 0,  # the gate on the shared expert
        activation=fields.word("hidden_act", "silu"),
    )
    return [moe if layer not in only_dense and (layer + 1) % step == 0 else dense for layer in range(num_layers)]


FEED_FORWARD: dict[str, Callable[[Fields, LlamaLike, int, int], list[LayerSpec]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
}


def _deepseek(fields: Fields, model_type: str) -> Parts:
    """DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, shared experts, first layers dense."""
    is_v3 = model_type == "deepseek_v3"
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
        top_k=_top_k(fields, num_experts, 8 if is_v3 else None),
        expert_ffn_size=expert_ffn,
        shared_ffn_size=shared,
        extra_params=2 * shared + hidden if bias else 0,
        activation=activation,
    )
    num_dense = fields.size("first_k_dense_replace", 3 if is_v3 else 0, least=0)
    mtp = fields.size("num_nextn_predict_layers", 0, least=0) if is_v3 else 0
    left_out = f"{mtp} multi-token prediction layer(s) are not counted: transformers' causal LM module holds none"
    vocab_size = 129280 if is_v3 else 102400
    return Parts(
        embedding=EmbeddingLayer(vocab_size=fields.size("vocab_size", vocab_size), hidden=hidden),
        layers=tuple((norm, attention, norm, dense if layer < num_dense else moe) for layer in range(num_layers)),
        final=(norm, _head(fields, hidden, vocab_size, tied=False)),
        max_seq_len=fields.size("max_position_embeddings", 4096 if is_v3 else 2048),
        notes=(left_out,) if mtp else (),
    )


def _latent_attention(fields: Fields, is_v3: bool, hidden: int) -> AttentionLayer:
    num_heads = fields.size("num_attention_heads", 128 if is_v3 else 32)
    fields.kv_heads(num_heads, num_heads)  # read by transformers, without effect on sizes; must still divide
    if not is_v3:
        _check_divides(fields, hidden, num_heads)
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


def _gpt2(fields: Fields, model_type: str) -> Parts:
    hidden = fields.size("hidden_size", 768)
    num_heads = fields.size("num_attention_heads", 12)
    _check_divides(fields, hidden, num_heads)
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
        final=(norm, _head(fields, hidden, 50257, tied=True)),
        max_seq_len=positions,
    )


def _opt(fields: Fields, model_type: str) -> Parts:
    """OPT (arXiv 2205.01068); its position table has two rows more than positions."""
    hidden = fields.size("hidden_size", 768)
    num_heads = fields.size("num_attention_heads", 12)
    _check_divides(fields, hidden, num_heads)
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
    head = _head(fields, hidden, 50272, tied=True)
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


def _gpt_neox(fields: Fields, model_type: str) -> Parts:
    hidden = fields.size("hidden_size", 6144)
    num_heads = fields.size("num_attention_heads", 64)
    _check_divides(fields, hidden, num_heads)
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
        final=(norm, _head(fields, hidden, 50432, tied=False)),
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


def _head(fields: Fields, hidden: int, vocab_size: int, *, tied: bool) -> HeadLayer:
    return HeadLayer(
        hidden=hidden,
        vocab_size=fields.size("vocab_size", vocab_size),
        tied=fields.flag("tie_word_embeddings", tied),
    )


def _top_k(fields: Fields, num_experts: int, default: int | None) -> int:
    top_k = fields.size("num_experts_per_tok", default)
    if top_k > num_experts:
        raise fields.error("num_experts_per_tok", f"{top_k} is more than the {num_experts} experts")
    return top_k


def _check_divides(fields: Fields, hidden: int, num_heads: int) -> None:
    if hidden % num_heads:
        raise fields.error("num_attention_heads", f"{num_heads} does not divide hidden_size={hidden}")


GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# model_type -> its builder, and the other names its fields go by (transformers' attribute_map)
BUILDERS: dict[str, tuple[Callable[[Fields, str], Parts], dict[str, str]]] = {
    "llama": (_llama_like, {}),
    "mistral": (_llama_like, {}),
    "mixtral": (_llama_like, {"num_local_experts": "num_experts"}),
    "qwen2": (_llama_like, {}),
    "qwen3": (_llama_like, {}),
    "qwen2_moe": (_llama_like, {"num_experts": "num_local_experts"}),
    "qwen3_moe": (_llama_like, {"num_experts": "num_local_experts"}),
    "deepseek_v2": (_deepseek, {"n_routed_experts": "num_experts"}),
    "deepseek_v3": (
        _deepseek,
        {"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    ),
    "opt": (_opt, {}),
    "gpt_neox": (_gpt_neox, {}),
    "gpt2": (_gpt2, GPT2_ALIASES),
}
