"""Layers of experts in a watched forward pass: what is beside stacked experts, and what its config says of capacity.

Experts are a module of stacked parameters ``[num_experts, ...]``, called with tokens ``[tokens, hidden]``, choices
``[tokens, k]`` and their weights, beside a router with a weight ``[num_experts, hidden]`` (transformers 5 and
``examples/moe.py``). The pass does not run them: which rows an expert gets depends on values, and fake tensors have
none. Capacity and the auxiliary loss leave no trace in shapes: ``capacity_factor``, ``group_tokens`` and
``router_aux_loss_coef`` are read from the module around the experts, its config or the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm, prod
from typing import Any

from torch import nn

from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.record import record
from meshwright.profiler.skeleton import find_experts

Shapes = Mapping[str, tuple[int, ...]]

ACTIVATIONS = ("silu", "gelu", "relu")


@record
class Stack:
    """Stacked experts of one layer, by their module's name; ``router`` is the name of its weight.

    ``ffn_size`` and ``gated`` follow from the matrices' sizes, whichever way round they lie.
    """

    name: str
    router: str
    num_experts: int
    hidden: int
    ffn_size: int
    gated: bool
    activation: str
    bias_params: int
    capacity_factor: float
    group_tokens: int
    aux_loss: float

    def layer(self, top_k: int, *, shared_ffn_size: int, extra_params: int) -> MoeLayer:
        """The layer of a spec; ``extra_params`` without the experts' biases."""
        return MoeLayer(
            hidden=self.hidden,
            num_experts=self.num_experts,
            top_k=top_k,
            expert_ffn_size=self.ffn_size,
            shared_ffn_size=shared_ffn_size,
            gated=self.gated,
            extra_params=self.bias_params + extra_params,
            activation=self.activation,
            capacity_factor=self.capacity_factor,
            group_tokens=self.group_tokens,
            aux_loss=self.aux_loss,
        )


def find_stacks(model: nn.Module, hidden: int) -> dict[str, Stack]:
    """Every module of stacked experts with a router beside it, by name."""
    found = {}
    for name, num_experts in find_experts(model).items():
        module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        router = _router(name, parent, num_experts, hidden)
        sizes = _sizes(module, num_experts, hidden)
        if router is None or sizes is None:
            continue
        said = (parent, getattr(parent, "config", None), getattr(model, "config", None))
        trained = _said(said, "output_router_logits", default=True)  # Hugging Face adds the loss with them alone
        found[name] = Stack(
            name=name,
            router=router,
            num_experts=num_experts,
            hidden=hidden,
            ffn_size=sizes[0],
            gated=sizes[1],
            activation=_activation(module),
            bias_params=sum(weight.numel() for weight in module.parameters() if weight.dim() == 2),
            capacity_factor=float(_said(said, "capacity_factor")),
            group_tokens=int(_said(said, "group_tokens")),
            aux_loss=float(_said(said, "router_aux_loss_coef")) if trained else 0.0,
        )
    return found


def whole_groups(stacks: Mapping[str, Stack], length: int) -> int:
    """The length of a sequence of whole groups of every layer: ``length`` times their least common multiple."""
    return length * lcm(*(stack.group_tokens or 1 for stack in stacks.values()))


def _router(name: str, parent: nn.Module, num_experts: int, hidden: int) -> str | None:
    prefix = name.rpartition(".")[0]
    for child, module in parent.named_children():
        weight = getattr(module, "weight", None)
        if weight is not None and tuple(weight.shape) == (num_experts, hidden):
            return f"{prefix}.{child}.weight" if prefix else f"{child}.weight"
    return None


def _sizes(module: nn.Module, num_experts: int, hidden: int) -> tuple[int, bool] | None:
    """Width and whether there is a gate: two equal matrices, or one of twice the other's size, or three equal ones."""
    matrices = [weight for weight in module.parameters() if weight.dim() == 3]
    if any(hidden not in weight.shape[1:] for weight in matrices):
        return None
    widths = sorted(prod(weight.shape) // (num_experts * hidden) for weight in matrices)
    if len(widths) == 2 and widths[1] in (widths[0], 2 * widths[0]):
        return widths[0], widths[1] != widths[0]
    return (widths[0], True) if len(widths) == 3 and widths[0] == widths[2] else None


def _activation(module: nn.Module) -> str:
    """The word of ``act_fn``, the name that transformers gives it."""
    function: Any = getattr(module, "act_fn", None)
    word = str(getattr(function, "__name__", type(function).__name__)).lower()
    return next((known for known in ACTIVATIONS if word.startswith(known)), "unknown")


def _said(places: tuple[Any, ...], name: str, *, default: Any = 0) -> Any:
    """The first number of that name; none or null is ``default``."""
    for place in places:
        value = getattr(place, name, None)
        if isinstance(value, int | float):
            return value
    return default
