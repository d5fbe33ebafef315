"""The layers of a model, each with the sizes from which its parameters follow exactly.

Counts and sizes only: FLOPs, seconds and saved bytes are predictions and live in ``cost_models``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from meshwright import InputError
from meshwright.profiler.record import check_numbers, record


class AttentionKind(StrEnum):
    """How queries, keys and values are made."""

    MHA = "mha"  # as many key/value heads as query heads
    GQA = "gqa"  # fewer key/value heads than query heads (one: multi-query)
    MLA = "mla"  # keys and values from a shared low-rank latent (DeepSeek-V2, arXiv 2405.04434)


class NormKind(StrEnum):
    """Normalisations: RMSNorm has a weight, LayerNorm a weight and a bias."""

    RMS = "rms"
    LAYER = "layer"


MAX_SIZE = 10**9  # no dimension of a real model comes near; products then stay far inside 64 bits per layer


def _check_sizes(layer: LayerSpec, *, positive: tuple[str, ...], not_negative: tuple[str, ...] = ()) -> None:
    for names, least in ((positive, 1), (not_negative, 0)):
        for name in names:
            value = getattr(layer, name)
            if not least <= value <= MAX_SIZE:
                raise InputError(f"{layer.kind} layer: {name} must be {least} to {MAX_SIZE}, found {value}")


@record
class EmbeddingLayer:
    """Token table ``[vocab_size, hidden]`` and, where positions are learned, ``[num_positions, hidden]``."""

    kind: Literal["embedding"] = "embedding"
    vocab_size: int
    hidden: int
    num_positions: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self, positive=("vocab_size", "hidden"), not_negative=("num_positions",))

    @property
    def params(self) -> int:
        """Parameters: ``(vocab_size + num_positions) * hidden``."""
        return (self.vocab_size + self.num_positions) * self.hidden


@record
class AttentionLayer:
    """Self-attention with its projections; ``window`` above 0 is a sliding window, in tokens.

    MLA sizes: queries through ``q_lora_rank`` (0: straight from hidden), keys and values through ``kv_lora_rank``, plus
    ``rope_head_dim`` rotary dimensions (a shared key of that width); ``head_dim`` is then the part without rotation.
    ``qk_norm_params`` counts the weights of per-head or whole-width norms on queries and keys; ``extra_params`` what
    else the layer holds (attention sinks, latent norms).
    """

    kind: Literal["attention"] = "attention"
    attention_kind: AttentionKind
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope_head_dim: int = 0
    window: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_params: int = 0
    extra_params: int = 0
    rotary: bool = True
    causal: bool = True

    def __post_init__(self) -> None:
        ranks = ("q_lora_rank", "kv_lora_rank", "rope_head_dim", "window", "qk_norm_params", "extra_params")
        positive = ("hidden", "num_heads", "num_kv_heads", "head_dim", "value_head_dim")
        _check_sizes(self, positive=positive, not_negative=ranks)
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        is_mla = self.attention_kind is AttentionKind.MLA
        if is_mla != (self.kv_lora_rank > 0) or (not is_mla and (self.q_lora_rank or self.rope_head_dim)):
            raise InputError(
                f"attention_kind={self.attention_kind.value} and kv_lora_rank={self.kv_lora_rank} disagree"
            )

    @property
    def matmuls(self) -> tuple[tuple[int, int], ...]:
        """``(inputs, outputs)`` of each projection's weight, in the order they run."""
        query_width = self.num_heads * (self.head_dim + self.rope_head_dim)
        value_width = self.num_heads * self.value_head_dim
        if self.attention_kind is not AttentionKind.MLA:
            kv_width = self.num_kv_heads * (self.head_dim + self.value_head_dim)
            return ((self.hidden, query_width + kv_width), (value_width, self.hidden))
        queries: tuple[tuple[int, int], ...] = ((self.hidden, query_width),)
        if self.q_lora_rank:
            queries = ((self.hidden, self.q_lora_rank), (self.q_lora_rank, query_width))
        latent = (self.hidden, self.kv_lora_rank + self.rope_head_dim)
        expand = (self.kv_lora_rank, self.num_heads * (self.head_dim + self.value_head_dim))
        return (*queries, latent, expand, (value_width, self.hidden))

    @property
    def params(self) -> int:
        """Parameters: the projections, their biases, the norms on queries and keys, and the rest.

        With MLA the bias belongs to the two projections down to a latent: ``q_lora_rank + kv_lora_rank +
        rope_head_dim`` (file ``modeling_deepseek_v3.py`` of transformers).
        """
        weights = sum(inputs * outputs for inputs, outputs in self.matmuls)
        latent = self.q_lora_rank + self.kv_lora_rank + self.rope_head_dim
        qkv_width = latent if self.attention_kind is AttentionKind.MLA else self.matmuls[0][1]
        biases = (qkv_width if self.qkv_bias else 0) + (self.hidden if self.out_bias else 0)
        return weights + biases + self.qk_norm_params + self.extra_params


@record
class MlpLayer:
    """A dense feed-forward layer: gated has three matrices (gate, up, down), else two (up, down)."""

    kind: Literal["mlp"] = "mlp"
    hidden: int
    ffn_size: int
    gated: bool = True
    bias: bool = False
    activation: str = "silu"  # the word of Hugging Face's ``hidden_act``

    def __post_init__(self) -> None:
        _check_sizes(self, positive=("hidden", "ffn_size"))

    @property
    def params(self) -> int:
        """Parameters: ``(3 if gated else 2) * hidden * ffn_size`` and the biases."""
        ways_in = 2 if self.gated else 1
        biases = ways_in * self.ffn_size + self.hidden if self.bias else 0
        return (ways_in + 1) * self.hidden * self.ffn_size + biases


@record
class MoeLayer:
    """Routed experts, of which each token takes ``top_k``, and shared experts that every token takes.

    ``shared_ffn_size`` is the total width of the shared experts (0: none). ``extra_params`` counts router biases,
    expert biases and the gate on the shared expert.

    With a ``capacity_factor`` above 0 an expert takes at most ``ceil(capacity_factor * group_tokens * top_k /
    num_experts)`` tokens of each group and drops the rest; a group is ``group_tokens`` neighbouring tokens of one
    sequence. Without one (0) nothing is dropped and there are no groups. ``aux_loss`` is the coefficient of the loss
    that spreads tokens over experts.

    A ``float32_router`` casts tokens and its weight to float32; with ``narrow_weights`` the weights that a router gives
    tokens come in the dtype of the activations, not in float32.
    """

    kind: Literal["moe"] = "moe"
    hidden: int
    num_experts: int
    top_k: int
    expert_ffn_size: int
    shared_ffn_size: int = 0
    gated: bool = True
    extra_params: int = 0
    activation: str = "silu"
    capacity_factor: float = 0.0
    group_tokens: int = 0
    aux_loss: float = 0.0
    float32_router: bool = False
    narrow_weights: bool = False

    def __post_init__(self) -> None:
        positive = ("hidden", "num_experts", "top_k", "expert_ffn_size")
        _check_sizes(self, positive=positive, not_negative=("shared_ffn_size", "extra_params", "group_tokens"))
        check_numbers(self, not_negative=("capacity_factor", "aux_loss"))
        if bool(self.capacity_factor) != bool(self.group_tokens):
            raise InputError(
                f"a capacity is one of a group of tokens: capacity_factor={self.capacity_factor} and "
                f"group_tokens={self.group_tokens} go together"
            )
        if self.top_k > self.num_experts:
            raise InputError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")

    @property
    def expert_params(self) -> int:
        """Parameters of all routed experts' matrices (biases are in ``extra_params``)."""
        return self.num_experts * (3 if self.gated else 2) * self.hidden * self.expert_ffn_size

    @property
    def params(self) -> int:
        """Parameters: routed experts, router, shared experts and the rest."""
        shared = (3 if self.gated else 2) * self.hidden * self.shared_ffn_size
        return self.expert_params + self.num_experts * self.hidden + shared + self.extra_params


@record
class NormLayer:
    """RMSNorm (a weight) or LayerNorm (a weight and a bias, or ``affine`` false: neither) over ``hidden``."""

    kind: Literal["norm"] = "norm"
    norm_kind: NormKind
    hidden: int
    affine: bool = True

    def __post_init__(self) -> None:
        _check_sizes(self, positive=("hidden",))

    @property
    def params(self) -> int:
        """Parameters: ``hidden`` for RMSNorm, twice that for LayerNorm."""
        return self.hidden * (1 if self.norm_kind is NormKind.RMS else 2) * self.affine


@record
class HeadLayer:
    """The projection to the vocabulary; ``tied`` shares the embedding's weight and holds no parameters but a bias."""

    kind: Literal["head"] = "head"
    hidden: int
    vocab_size: int
    tied: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, positive=("hidden", "vocab_size"))

    @property
    def params(self) -> int:
        """Parameters of its own: ``vocab_size * hidden`` unless tied, and the bias."""
        return (0 if self.tied else self.vocab_size * self.hidden) + (self.vocab_size if self.bias else 0)


class _ToldByKind:
    """Read from JSON by the word in ``kind``, so that a wrong field is answered for that layer alone."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import Discriminator

        return handler.generate_schema(Annotated[source, Discriminator("kind")])


LayerSpec = Annotated[
    EmbeddingLayer | AttentionLayer | MlpLayer | MoeLayer | NormLayer | HeadLayer,
    _ToldByKind(),
]
