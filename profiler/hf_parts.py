"""What every builder of a Hugging Face architecture returns, and the pieces they share."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.profiler.hf_fields import Fields, shorten
from meshwright.profiler.layers import EmbeddingLayer, HeadLayer, LayerSpec
from meshwright.profiler.record import record

Layers = tuple[LayerSpec, ...]


@record
class Parts:
    """What a builder finds: the two ends and, layer by layer, what is between."""

    embedding: EmbeddingLayer
    layers: tuple[Layers, ...]
    final: Layers  # the final norm, if any, and the head
    max_seq_len: int
    after_embedding: Layers = ()  # norms on embeddings
    notes: tuple[str, ...] = ()


def head_layer(fields: Fields, hidden: int, vocab_size: int, *, tied: bool, bias: bool = False) -> HeadLayer:
    """The head; ``tied`` and ``vocab_size`` are the model type's defaults."""
    return HeadLayer(
        hidden=hidden,
        vocab_size=fields.size("vocab_size", vocab_size),
        tied=fields.flag("tie_word_embeddings", tied),
        bias=bias,
    )


def top_k(fields: Fields, num_experts: int, default: int | None) -> int:
    """``num_experts_per_tok``, at most ``num_experts``."""
    chosen = fields.size("num_experts_per_tok", default)
    if chosen > num_experts:
        raise fields.error("num_experts_per_tok", f"{chosen} is more than the {num_experts} experts")
    return chosen


def aux_loss(fields: Fields, coefficient: float) -> float:
    """``router_aux_loss_coef`` where the config trains with it, as transformers does: 0 without router logits."""
    found = fields.number("router_aux_loss_coef", coefficient)
    return found if fields.flag("output_router_logits", False) else 0.0


def layer_windows(fields: Fields, num_layers: int, window: int, slides: Sequence[bool]) -> list[int]:
    """The window of each layer by ``layer_types``, or where that is absent by ``slides``; 0 reaches to the start."""
    kinds = fields.items("layer_types", str)
    if kinds is None:
        return [window if slide else 0 for slide in slides]
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        expected = f'{num_layers} (num_hidden_layers) times "full_attention" or "sliding_attention"'
        raise fields.error("layer_types", f"expected {expected}, found {len(kinds)}: {shorten(sorted(set(kinds)))}")
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def check_divides(fields: Fields, hidden: int, num_heads: int) -> None:
    """Refuse heads that do not divide the hidden size, as the config class or the module does."""
    if hidden % num_heads:
        raise fields.error("num_attention_heads", f"{num_heads} does not divide hidden_size={hidden}")
