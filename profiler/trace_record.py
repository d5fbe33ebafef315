"""Watching one forward pass: which parameters meet which activations, and where attention mixes positions.

Every torch function of the pass is seen by a ``TorchFunctionMode``. Each activation carries *origins*: the matrices it
was last multiplied by on its way (a matrix multiplication starts a new life), or ``ATTENTION`` when it comes out of
attention. That is enough to tell queries from keys and values, and the way into a feed-forward from the way out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ATTENTION = "@attention"
TOKENS = "@tokens"
SCORES = "@scores"

_MATMULS = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "bmm", "baddbmm", "einsum")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu": "relu", "relu_": "relu"}


@dataclass(frozen=True, slots=True)
class Product:
    """An activation times a matrix of parameters; sizes are per token."""

    order: int
    block: int | None
    weight: str
    bias: str | None
    inputs: int
    outputs: int
    origins: frozenset[str]  # of the activation that went in


@dataclass(frozen=True, slots=True)
class Use:
    """A parameter that met an activation in another way (a norm's weight, a bias added, a learned position)."""

    order: int
    block: int | None
    parameter: str
    function: str
    origins: frozenset[str]


@dataclass(frozen=True, slots=True)
class Mixing:
    """One attention: sizes per head, and where its queries, keys and values come from."""

    order: int
    block: int | None
    num_heads: int
    head_dim: int
    value_head_dim: int
    causal: bool | None  # None where it cannot be seen
    queries: frozenset[str]
    keys: frozenset[str]
    values: frozenset[str]


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Stacked experts called with the ``top_k`` choices of each token."""

    order: int
    block: int | None
    experts: str
    top_k: int


@dataclass(slots=True)
class Recording:
    """What was seen, in order."""

    products: list[Product] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    mixings: list[Mixing] = field(default_factory=list)
    dispatches: list[Dispatch] = field(default_factory=list)
    activations: dict[str, str] = field(default_factory=dict)  # matrix -> the function applied to what it made


class Recorder(TorchFunctionMode):
    """Records while it is entered; ``block`` is set by hooks on the decoder blocks.

    ``parameters`` maps names to the tensors that the pass runs with; the pass is one sequence of ``num_tokens``.
    """

    def __init__(self, parameters: Mapping[str, Tensor], num_tokens: int) -> None:
        super().__init__()
        self.recording = Recording()
        self.block: int | None = None
        self._num_tokens = num_tokens
        self._order = 0
        self._outputs: dict[int, Any] = {}
        self._pending: tuple[int, int, frozenset[str], frozenset[str]] | None = None
        # by id, with the tensor kept alive so that no id is used twice
        self._origins: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._parameters = {id(tensor): (tensor, name) for name, tensor in parameters.items()}

    def entering(self, block: int) -> Callable[..., None]:
        """A hook that says which block runs from here on."""

        def hook(*_: Any) -> None:
            self.block = block

        return hook

    def leaving(self, block: int) -> Callable[..., None]:
        """A hook that says that a block has ended, and keeps what it returned."""

        def hook(_module: Any, _args: Any, output: Any) -> None:
            self.block = None
            self._outputs[block] = output

        return hook

    def output_of(self, block: int) -> Callable[..., Any]:
        """A function that returns what an earlier block returned."""
        return lambda *_args, **_kwargs: self._outputs[block]

    def in_place_of_experts(self, name: str) -> Callable[..., Tensor]:
        """A function that answers for stacked experts, which cannot run: it notes the choices of each token."""

        def answer(x: Tensor, *given: Any, **named: Any) -> Tensor:
            choices = [one for one in _tensors((given, tuple(named.values()))) if not one.is_floating_point()]
            if len(choices) != 1 or choices[0].shape[:-1] != x.shape[:-1]:
                raise ValueError(f"{name} is not called with tokens [tokens, hidden], choices [tokens, k] and weights")
            self.recording.dispatches.append(Dispatch(self._order, self.block, name, choices[0].shape[-1]))
            return x.clone()

        return answer

    def mark_tokens(self, tokens: Tensor) -> None:
        """What the pass begins with."""
        self._origins[id(tokens)] = (tokens, frozenset({TOKENS}))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function and note what it did."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        if made:
            self._order += 1
            self._note(getattr(func, "__name__", ""), args, kwargs, made)
        return result

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> None:
        given = list(_tensors((args, tuple(kwargs.values()))))
        parameters = [tensor for tensor in given if id(tensor) in self._parameters]
        activations = [tensor for tensor in given if id(tensor) not in self._parameters]
        origins = frozenset[str]().union(*(self._of(tensor) for tensor in activations))
        if parameters and not origins:  # with constants at most: still that parameter (a view, 1 + weight)
            for tensor in made:
                self._parameters[id(tensor)] = (tensor, self._name(parameters[0]))
            return
        matrices = [tensor for tensor in parameters if tensor.dim() > 1]
        if name == "multi_head_attention_forward":
            origins = self._whole_attention(args, kwargs, origins)
        elif name == "scaled_dot_product_attention":
            origins = self._attention(args, kwargs, made[0])
        elif name in _MATMULS and len(matrices) == 1 and origins:
            origins = self._product(matrices[0], parameters, activations, made[0], origins)
        elif name in _MATMULS and not parameters and len(activations) > 1 and origins:
            origins = self._eager(activations[-2], activations[-1], made[0], origins)
        else:
            for tensor in parameters:
                use = Use(self._order, self.block, self._name(tensor), name, origins)
                self.recording.uses.append(use)
            if name in _ACTIVATIONS:
                tanh = kwargs.get("approximate") == "tanh"
                word = "gelu_pytorch_tanh" if tanh else _ACTIVATIONS[name]
                self.recording.activations.update(dict.fromkeys(origins, word))
        for tensor in made:
            self._origins[id(tensor)] = (tensor, origins)

    def _product(
        self,
        matrix: Tensor,
        parameters: list[Tensor],
        activations: list[Tensor],
        result: Tensor,
        origins: frozenset[str],
    ) -> frozenset[str]:
        biases = [self._name(tensor) for tensor in parameters if tensor is not matrix]
        widest = max(activations, key=lambda tensor: tensor.numel())
        product = Product(
            order=self._order,
            block=self.block,
            weight=self._name(matrix),
            bias=biases[0] if biases else None,
            inputs=widest.numel() // self._num_tokens,
            outputs=result.numel() // self._num_tokens,
            origins=origins,
        )
        self.recording.products.append(product)
        return frozenset({product.weight})

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> frozenset[str]:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = given["query"], given["key"], given["value"]
        mask = given.get("attn_mask")
        self._mix(
            num_heads=query.numel() // (self._num_tokens * query.shape[-1]),
            head_dim=query.shape[-1],
            value_head_dim=value.shape[-1],
            causal=bool(given.get("is_causal")) if mask is None else None,
            origins=(self._of(query), self._of(key), self._of(value)),
        )
        return frozenset({ATTENTION})

    def _whole_attention(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], origins: frozenset[str]
    ) -> frozenset[str]:
        """``nn.MultiheadAttention``: one function from the residual stream back to it, projections and all."""
        given = inspect.signature(functional.multi_head_attention_forward).bind(*args, **kwargs).arguments
        way_in, way_out, num_heads = given["in_proj_weight"], given["out_proj_weight"], given["num_heads"]
        if way_in is None or any(given.get(name) is not None for name in ("bias_k", "bias_v", "q_proj_weight")):
            return frozenset()
        hidden = way_out.shape[0]
        projection, projection_bias = self._name(way_in), given["in_proj_bias"]
        output, output_bias = self._name(way_out), given["out_proj_bias"]
        biases = [None if bias is None else self._name(bias) for bias in (projection_bias, output_bias)]
        made = frozenset({projection})
        products = self.recording.products
        products.append(Product(self._order, self.block, projection, biases[0], hidden, 3 * hidden, origins))
        self._mix(
            num_heads=num_heads,
            head_dim=hidden // num_heads,
            value_head_dim=hidden // num_heads,
            causal=bool(given.get("is_causal")) or given.get("attn_mask") is not None,
            origins=(made, made, made),
        )
        products.append(Product(self._order, self.block, output, biases[1], hidden, hidden, frozenset({ATTENTION})))
        return frozenset({output})

    def _eager(self, left: Tensor, right: Tensor, result: Tensor, origins: frozenset[str]) -> frozenset[str]:
        """Attention written out: queries times keys is [..., tokens, tokens], and that times values ends it."""
        tokens = self._num_tokens
        if SCORES in self._of(left) and self._pending is not None:
            num_heads, head_dim, queries, keys = self._pending
            self._pending = None
            value_head_dim = result.numel() // (num_heads * tokens)
            self._mix(
                num_heads=num_heads,
                head_dim=head_dim,
                value_head_dim=value_head_dim,
                causal=None,
                origins=(queries, keys, self._of(right)),
            )
            return frozenset({ATTENTION})
        if result.shape[-2:] == (tokens, tokens):
            num_heads = result.numel() // tokens**2
            self._pending = num_heads, left.numel() // (num_heads * tokens), self._of(left), self._of(right)
            return frozenset({SCORES})
        return origins

    def _mix(
        self, *, num_heads: int, head_dim: int, value_head_dim: int, causal: bool | None, origins: tuple[Any, Any, Any]
    ) -> None:
        queries, keys, values = origins
        mixing = Mixing(self._order, self.block, num_heads, head_dim, value_head_dim, causal, queries, keys, values)
        self.recording.mixings.append(mixing)

    def _name(self, parameter: Tensor) -> str:
        return self._parameters[id(parameter)][1]

    def _of(self, tensor: Tensor) -> frozenset[str]:
        return self._origins[id(tensor)][1] if id(tensor) in self._origins else frozenset()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
