"""Where a model keeps its experts, how their parameters are cut over ep and etp, and modules that hold the cuts.

Experts are one module with stacked parameters (transformers 5 and ``examples/moe.py``), called with the tokens
``[tokens, h]``, the experts that each chose ``[tokens, k]``, and their weights ``[tokens, k]``; a choice equal to
``num_experts`` is one that was dropped:

=====================  ==========================  =================================  ===================
parameter              shape                       transposed (gpt-oss)               over etp
=====================  ==========================  =================================  ===================
``gate_up_proj``       ``[E, 2 f, h]``             ``[E, h, 2 f]``                    ``f`` of each half
``up_proj`` (no gate)  ``[E, f, h]``               ``[E, h, f]``                      ``f``
``gate_up_proj_bias``  ``[E, 2 f]``                the same                           ``f`` of each half
``down_proj``          ``[E, h, f]``               ``[E, f, h]``                      ``f``
``down_proj_bias``     ``[E, h]``                  the same                           whole on each rank
=====================  ==========================  =================================  ===================

Gate and up are two halves, or interleaved column by column where the module says ``is_concatenated = False``. The
router is the module beside it (same parent) with a ``weight`` ``[E, h]``; it returns logits ``[tokens, E]``, weights
and choices ``[tokens, k]``, as those of transformers 5 do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from meshwright import InputError
from meshwright.executors.tp_layout import Layout, take_part
from meshwright.profiler.record import record

SLICE_AXES = ("ep", "etp")


@record
class ExpertShape:
    """What one module of experts holds. ``up`` is the name of the first matrix; ``ffn_size`` the width of an expert."""

    num_experts: int
    hidden: int
    ffn_size: int
    up: str
    gated: bool
    interleaved: bool
    transposed: bool
    biased: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names in the module."""
        matrices = (self.up, "down_proj")
        return (*matrices, *(f"{name}_bias" for name in matrices)) if self.biased else matrices

    def layout(self, name: str, etp: int) -> Layout:
        """How one parameter's width is cut over etp."""
        first = name.startswith(self.up)
        if name == "down_proj_bias":
            return Layout(dim=None, positions=(), whole_size=0, copies=etp, summed=False)
        dim = 1 if name.endswith("_bias") else (2 if self.transposed else 1) if first else 1 if self.transposed else 2
        halves = 2 if first and self.gated else 1
        columns = np.arange(halves * self.ffn_size)
        by_unit = columns.reshape(-1, halves) if self.interleaved else columns.reshape(halves, -1).T
        cuts = np.split(by_unit, etp)
        positions = tuple((cut if self.interleaved else cut.T).reshape(-1) for cut in cuts)
        return Layout(dim=dim, positions=positions, whole_size=len(columns), copies=1, summed=False)


@record
class ExpertPlace:
    """Experts of one layer and their router, by their names in the model."""

    name: str
    router: str
    shape: ExpertShape


def find_experts(model: nn.Module) -> tuple[ExpertPlace, ...]:
    """All layers of experts, in the model's order. Raises ``InputError`` naming one that is built otherwise."""
    places = []
    for name, module in model.named_modules():
        weights = dict(module.named_parameters(recurse=False))
        if not any(weight.dim() == 3 for weight in weights.values()):
            continue
        shape = _shape(name, module, {key: tuple(weight.shape) for key, weight in weights.items()})
        places.append(ExpertPlace(name=name, router=_router(model, name, shape), shape=shape))
    return tuple(places)


def _shape(name: str, module: nn.Module, sizes: dict[str, tuple[int, ...]]) -> ExpertShape:
    up = "gate_up_proj" if "gate_up_proj" in sizes else "up_proj"
    known = {up, "down_proj", f"{up}_bias", "down_proj_bias"}
    if up not in sizes or "down_proj" not in sizes or not set(sizes) <= known or len(sizes) == 3:
        raise _unknown(name, module, f"it holds {', '.join(sizes)}")
    if len(inspect.signature(module.forward).parameters) != 3:
        raise _unknown(name, module, "it is not called with tokens, choices and weights")
    if getattr(module, "has_post_expert_norm", False):
        raise _unknown(name, module, "it has a norm behind each expert")
    transposed = bool(getattr(module, "is_transposed", False))
    (num_experts, rows, columns), (down_experts, *down) = sizes[up], sizes["down_proj"]
    hidden, width = (rows, columns) if transposed else (columns, rows)
    ffn_size, out = down if transposed else reversed(down)
    if (down_experts, out) != (num_experts, hidden) or width not in (ffn_size, 2 * ffn_size):
        raise _unknown(name, module, f"its matrices {list(sizes[up])} and {list(sizes['down_proj'])} do not fit")
    return ExpertShape(
        num_experts=num_experts,
        hidden=hidden,
        ffn_size=ffn_size,
        up=up,
        gated=width == 2 * ffn_size,
        interleaved=not getattr(module, "is_concatenated", True),
        transposed=transposed,
        biased="down_proj_bias" in sizes,
    )


def _router(model: nn.Module, name: str, shape: ExpertShape) -> str:
    parent = name.rpartition(".")[0]
    wanted = (shape.num_experts, shape.hidden)
    found = [
        key
        for key, child in model.get_submodule(parent).named_children()
        if tuple(getattr(child, "weight", np.empty(0)).shape) == wanted
    ]
    if len(found) != 1:
        raise InputError(
            f"beside {name} there should be one router with a weight of shape {list(wanted)}, found {len(found)}"
        )
    return f"{parent}.{found[0]}" if parent else found[0]


def _unknown(name: str, module: nn.Module, why: str) -> InputError:
    return InputError(f"{name} ({type(module).__name__}) has stacked matrices but is not built as known experts: {why}")


def hold_slice(module: nn.Module, shape: ExpertShape, mesh: DeviceMesh) -> None:
    """Let ``module`` hold this rank's part of its experts as DTensors over ``mesh`` ``[ep, etp]``; in place."""
    for name in shape.names:
        weight = module._parameters[name]
        assert weight is not None
        layout = shape.layout(name, mesh.size(1))
        part = own_part(weight.detach(), layout, mesh)
        placements = [Shard(0), Replicate() if layout.dim is None else Shard(layout.dim)]
        held = DTensor.from_local(part, mesh, placements, run_check=False)
        module._parameters[name] = nn.Parameter(held, weight.requires_grad)


def compute_with(module: nn.Module, shape: ExpertShape, forward: Callable[..., Tensor]) -> None:
    """Let ``module`` run ``forward(module, x, choices, weights)``, in which its parameters read as local tensors."""
    base: Any = type(module)
    module.__class__ = _local_class(base, shape.names, forward)


def own_part(whole: Tensor, layout: Layout, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a whole parameter: its experts, its share of their width; a tensor of its own."""
    ep, place = mesh.size(0), mesh.get_local_rank(0)
    local = whole.shape[0] // ep
    return take_part(whole.narrow(0, place * local, local), layout, mesh.get_local_rank(1)).contiguous()


@cache
def _local_class(base: type[nn.Module], names: tuple[str, ...], forward: Callable[..., Tensor]) -> type[nn.Module]:
    body: dict[str, Any] = {name: _local_property(name) for name in names}
    return type(base.__name__, (base,), {**body, "forward": forward})


def _local_property(name: str) -> property:
    def local(self: nn.Module) -> Tensor | None:
        weight = self._parameters[name]
        # sharded further over edp it is not computed with: that is FSDP2 asking for its own parameter
        whole = isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names == SLICE_AXES
        return weight.to_local() if whole else weight  # type: ignore[union-attr]

    return property(local)
