"""Lead a model's attentions through context parallelism: Hugging Face's by their interface, others' by torch's call.

Every module inside a block is given ``context_parallel``, through which Hugging Face's attention finds the ranks of its
own model. Of other models ``functional.scaled_dot_product_attention`` is caught while a block runs, within what
recompute runs again. A block that attends in another way is found out when it first runs, and refused, as is all that
could not be exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from meshwright import InputError
from meshwright.executors.context_parallel import ContextParallel
from meshwright.executors.spec_model import SpecModel

_INTERFACE = "meshwright_context_parallel"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def apply_context_parallel(model: nn.Module, blocks: Mapping[int, nn.Module], context: ContextParallel) -> None:
    """Make the attentions of ``blocks``, decoder blocks of ``model``, see all cp ranks' tokens; in place.

    Apply before recompute. Raises ``InputError`` for a model that takes no ``position_ids``, or attends in a way that
    context parallelism does not know.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"{type(model).__name__}.forward takes no position_ids: with cp above 1 a model must be told where in the "
            "sequence its tokens stand"
        )
    by_interface = _enter_interface(model)
    for part in model.modules():
        found = getattr(part, "rope_type", None)
        kinds = found.values() if isinstance(found, dict) else [found]
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            part.forward = partial(_rotary_of_the_whole, part.forward, context)
    for index, block in blocks.items():
        for part in block.modules():
            object.__setattr__(part, "context_parallel", context)
        block.forward = partial(_run_block, block.forward, f"decoder block {index}", context, by_interface)


def _rotary_of_the_whole(
    forward: Callable[..., tuple[Tensor, Tensor]],
    context: ContextParallel,
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of this rank's positions, of frequencies that follow from the length of the whole sequence.

    transformers takes that length from the last position given to it, which differs from rank to rank.
    """
    last = position_ids.new_full((position_ids.shape[0], 1), context.sequence - 1)
    cos, sin = forward(x, torch.cat((position_ids, last), dim=1), *args, **kwargs)
    return cos[:, :-1], sin[:, :-1]


def _enter_interface(model: nn.Module) -> bool:
    """Whether ``model`` attends through ``context_parallel`` by itself: Hugging Face's by ``_interface_attention``."""
    if isinstance(model, SpecModel):
        return True
    if not hasattr(model, "set_attn_implementation"):
        return False
    from transformers import AttentionInterface

    config: Any = model.config
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown or not model._can_set_attn_implementation():  # type: ignore[operator]
        how = f"has layers of {', '.join(sorted(unknown))}" if unknown else "does not use transformers' interface"
        raise InputError(f"cp above 1 cannot run {type(model).__name__}: its attention {how}")
    # no mask is registered under this name, so that transformers makes none and does not take the order of positions
    # for packed sequences
    AttentionInterface.register(_INTERFACE, _interface_attention)
    model.set_attn_implementation(_INTERFACE)  # type: ignore[operator]
    return True


def _run_block(
    forward: Callable[..., Any], name: str, context: ContextParallel, by_interface: bool, *args: Any, **kwargs: Any
) -> Any:
    seen = context.num_calls
    if by_interface:
        output = forward(*args, **kwargs)
    else:
        with _CatchAttention(context):
            output = forward(*args, **kwargs)
    if context.num_calls == seen:
        raise InputError(
            f"{name} made no attention that context parallelism knows: with cp above 1 a block attends through "
            "functional.scaled_dot_product_attention, or transformers' attention interface"
        )
    return output


class _CatchAttention(TorchFunctionMode):
    def __init__(self, context: ContextParallel) -> None:
        super().__init__()
        self._context = context

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _torch_attention(self._context, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _torch_attention(
    context: ContextParallel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` over all cp ranks."""
    _refuse(mask=attn_mask, dropout=dropout_p)
    return context.attend(query, key, value, causal=is_causal, scale=scale)


def _interface_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: heads second, in and out ``[batch, sequence, heads, width]``."""
    _refuse(mask=attention_mask, dropout=dropout, softcap=softcap, bias=position_bias)
    context: Any = getattr(module, "context_parallel", None)
    if context is None:
        raise InputError(f"{type(module).__name__} attends outside the decoder blocks, where cp above 1 does not reach")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = context.attend(
        query, key, value, causal=causal, scale=scaling, window=sliding_window or 0, sinks=s_aux
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _refuse(*, mask: Tensor | None, dropout: float, softcap: float | None = None, bias: Tensor | None = None) -> None:
    """What attention in parts is not exact for."""
    refused = {
        "an attention mask (padded or packed sequences)": mask is not None,
        f"dropout of {dropout:g} on attention": dropout > 0,
        "softcapped logits": softcap is not None,
        "a bias on positions": bias is not None,
    }
    for what, found in refused.items():
        if found:
            raise InputError(f"cp above 1 cannot compute attention with {what}: use cp=1, or a model without it")
