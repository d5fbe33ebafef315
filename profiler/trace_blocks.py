"""A watched forward pass -> the layers of each decoder block; whatever has no place in a layer is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from meshwright import InputError
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.trace_experts import Stack
from meshwright.profiler.trace_record import ATTENTION, Dispatch, Mixing, Product, Recording, Use

Shapes = Mapping[str, tuple[int, ...]]

_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


def own_parameters(module: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The parameters that a module holds itself, by full name."""
    prefix = f"{module}." if module else ""
    return {key: shape for key, shape in shapes.items() if key.startswith(prefix) and "." not in key[len(prefix) :]}


def read_norm(module: str, shapes: Shapes, hidden: int, model: str) -> NormLayer:
    """A norm over the residual stream. Raises ``InputError`` for a module that is no such norm."""
    own = own_parameters(module, shapes)
    if own and len(own) <= 2 and all(shape == (hidden,) for shape in own.values()):
        return NormLayer(norm_kind=NormKind.LAYER if len(own) == 2 else NormKind.RMS, hidden=hidden)
    raise InputError(f"{model}: {_listed(own)}: not understood: outside the blocks only norms over {hidden} are")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReader:
    """Reads one model's blocks; ``shapes`` holds every parameter's shape, ``hidden`` is the residual stream's width.

    ``stacks`` are the model's stacked experts by name.
    """

    model: str
    recording: Recording
    shapes: Shapes
    hidden: int
    stacks: Mapping[str, Stack]

    @property
    def matrices(self) -> frozenset[str]:
        """Every parameter that multiplied an activation."""
        return frozenset(product.weight for product in self.recording.products)

    def read(self, index: int, prefix: str) -> tuple[LayerSpec, ...]:
        """The layers of block ``index``, whose parameters' names begin with ``prefix``, in the order they run.

        Raises ``InputError`` naming the parameters, or the part of the block, that were not understood.
        """
        products = {product.weight: product for product in self.recording.products if product.block == index}
        if len(products) < sum(product.block == index for product in self.recording.products):
            raise self._error(index, "one of its matrices is used twice in a pass")
        mixings = [mixing for mixing in self.recording.mixings if mixing.block == index]
        if len(mixings) != 1:
            raise self._error(index, f"expected one attention in it, saw {len(mixings)}")
        mixing = mixings[0]
        biases = self._biases(index, products)
        qkv = self._sources(index, mixing, products)
        way_out = [product for product in products.values() if product.origins == {ATTENTION}]
        if len(way_out) != 1 or way_out[0].inputs != mixing.num_heads * mixing.value_head_dim:
            raise self._error(index, "no single projection takes what attention gives")
        rest = [product for product in products.values() if product not in (*qkv, way_out[0])]
        attention_weights = {product.weight for product in qkv}
        norms: dict[str, Use] = {}
        qk_norm_params = 0
        for use in self._vector_uses(index, prefix, biases):
            if use.origins and use.origins <= attention_weights:
                qk_norm_params += prod(self.shapes[use.parameter])
            else:
                norms.setdefault(use.parameter.rpartition(".")[0], use)
        attention = self._attention(index, mixing, qkv, way_out[0], biases, qk_norm_params)
        placed: list[tuple[int, LayerSpec]] = [(mixing.order, attention)]
        placed += [(use.order, read_norm(name, self.shapes, self.hidden, self.model)) for name, use in norms.items()]
        dispatches = [dispatch for dispatch in self.recording.dispatches if dispatch.block == index]
        if dispatches:
            placed.append(self._moe(index, dispatches, rest, biases))
        elif rest:
            placed.append(self._mlp(index, rest, biases))
        layers = tuple(layer for _, layer in sorted(placed, key=lambda item: item[0]))
        self._check_complete(index, prefix, sum(layer.params for layer in layers))
        return layers

    def _sources(self, index: int, mixing: Mixing, products: Mapping[str, Product]) -> list[Product]:
        """The matrices that make queries, keys and values: one (fused), two or three."""
        parts = {"queries": mixing.queries, "keys": mixing.keys, "values": mixing.values}
        for part, origins in parts.items():
            if len(origins) != 1 or not origins <= products.keys():
                found = ", ".join(sorted(origins)) or "no matrix"
                raise self._error(index, f"its {part} come from {found}: expected one matrix of the block")
        names = dict.fromkeys(next(iter(origins)) for origins in parts.values())
        return [products[name] for name in names]

    def _attention(
        self,
        index: int,
        mixing: Mixing,
        qkv: list[Product],
        way_out: Product,
        biases: Mapping[str, str],
        qk_norm_params: int,
    ) -> AttentionLayer:
        heads, head_dim, value_dim = mixing.num_heads, mixing.head_dim, mixing.value_head_dim
        kv_width = sum(product.outputs for product in qkv) - heads * head_dim
        kv_heads, left = divmod(kv_width, head_dim + value_dim)
        if left or kv_heads < 1 or heads % kv_heads or any(product.inputs != self.hidden for product in qkv):
            raise self._error(index, f"its projections do not make {heads} heads of {head_dim} and whole key heads")
        biased = [product for product in qkv if product.weight in biases]
        all_biased = len(biased) == len(qkv)
        return AttentionLayer(
            attention_kind=AttentionKind.MHA if kv_heads == heads else AttentionKind.GQA,
            hidden=self.hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_head_dim=value_dim,
            qkv_bias=all_biased,
            out_bias=way_out.weight in biases,
            qk_norm_params=qk_norm_params,
            extra_params=0 if all_biased else sum(product.outputs for product in biased),
            causal=mixing.causal is not False,
        )

    def _mlp(self, index: int, rest: list[Product], biases: Mapping[str, str]) -> tuple[int, MlpLayer]:
        """Gated: two ways in, or one of twice the width; the way out is the matrix fed by the ways in alone."""
        names = {product.weight for product in rest}
        ways_out = [product for product in rest if product.origins <= names]
        ways_in = [product for product in rest if product not in ways_out]
        listed = ", ".join(sorted(names))
        if len(ways_out) != 1 or ways_out[0].origins != {product.weight for product in ways_in}:
            raise self._error(index, f"no feed-forward of one or two ways in and one way out in {listed}")
        ffn_size = ways_out[0].inputs
        gated = sum(product.outputs for product in ways_in) == 2 * ffn_size
        wrong_width = sum(product.outputs for product in ways_in) != (2 if gated else 1) * ffn_size
        wrong_ends = any(product.inputs != self.hidden for product in ways_in) or ways_out[0].outputs != self.hidden
        num_biased = sum(product.weight in biases for product in rest)
        if wrong_width or wrong_ends or len(ways_in) > 2 or num_biased not in (0, len(rest)):
            raise self._error(index, f"the widths or biases of {listed} make no feed-forward")
        activation = next(
            (self.recording.activations[way.weight] for way in ways_in if way.weight in self.recording.activations),
            "unknown",
        )
        layer = MlpLayer(hidden=self.hidden, ffn_size=ffn_size, gated=gated, bias=num_biased > 0, activation=activation)
        return ways_out[0].order, layer

    def _moe(
        self, index: int, dispatches: list[Dispatch], rest: list[Product], biases: Mapping[str, str]
    ) -> tuple[int, MoeLayer]:
        """Stacked experts with their router; what else is multiplied is a shared expert, and a gate of one column."""
        if len(dispatches) > 1:
            raise self._error(index, f"expected one layer of experts in it, saw {len(dispatches)}")
        dispatch = dispatches[0]
        stack = self.stacks[dispatch.experts]
        routers = [product for product in rest if product.weight == stack.router]
        gates = [product for product in rest if product.outputs == 1]
        if len(routers) != 1 or len(gates) > 1:
            raise self._error(index, f"no router of {stack.name} and one gate at most among its matrices")
        shared = [product for product in rest if product not in (*routers, *gates)]
        beside = self._mlp(index, shared, biases)[1] if shared else None
        if gates and beside is None:
            raise self._error(index, f"{gates[0].weight} gates no shared expert")
        if beside is not None and beside.gated != stack.gated:
            raise self._error(index, "its shared expert is not gated as the routed ones are")
        extra = sum(product.inputs for product in gates) + sum(
            prod(self.shapes[biases[product.weight]]) for product in (*routers, *gates) if product.weight in biases
        )
        if beside is not None and beside.bias:
            extra += beside.params - (3 if beside.gated else 2) * self.hidden * beside.ffn_size
        layer = stack.layer(dispatch.top_k, shared_ffn_size=beside.ffn_size if beside else 0, extra_params=extra)
        return dispatch.order, layer

    def _biases(self, index: int, products: Mapping[str, Product]) -> dict[str, str]:
        """Matrix -> its bias, given with the product or added right after it."""
        biases = {product.weight: product.bias for product in products.values() if product.bias}
        for use in self.recording.uses:
            if use.block != index or use.function not in _ADDITIONS or len(use.origins) != 1:
                continue
            (origin,) = use.origins
            owner = own_parameters(use.parameter.rpartition(".")[0], self.shapes)
            is_norms = any(key != use.parameter and len(shape) == 1 for key, shape in owner.items())
            if origin in products and self.shapes[use.parameter] == (products[origin].outputs,) and not is_norms:
                biases.setdefault(origin, use.parameter)
        return biases

    def _vector_uses(self, index: int, prefix: str, biases: Mapping[str, str]) -> list[Use]:
        """Uses of the block's vectors that are no bias: norms."""
        seen: dict[str, Use] = {}
        for use in self.recording.uses:
            if use.block == index and use.parameter.startswith(prefix) and use.parameter not in biases.values():
                seen.setdefault(use.parameter, use)
        return list(seen.values())

    def _check_complete(self, index: int, prefix: str, params: int) -> None:
        own = {key: shape for key, shape in self.shapes.items() if key.startswith(prefix)}
        total = sum(prod(shape) for shape in own.values())
        if params != total:
            used = {use.parameter for use in self.recording.uses} | self.matrices
            used |= {product.bias for product in self.recording.products if product.bias}
            unused = {key: shape for key, shape in own.items() if key not in used}
            problem = (
                f"parameters that the pass did not use: {_listed(unused)}" if unused else "its layers share weights"
            )
            raise self._error(index, f"{params:,} of its {total:,} parameters were understood; {problem}")

    def _error(self, index: int, problem: str) -> InputError:
        return InputError(
            f"{self.model}, block {index}: {problem}; give a Hugging Face config or a saved model instead"
        )


def _listed(parameters: Shapes) -> str:
    shown = [f"{key} {list(shape)}" for key, shape in list(parameters.items())[:3]]
    return ", ".join(shown) + (f" and {len(parameters) - 3} more" if len(parameters) > 3 else "")
