"""Modules that hold DTensors and compute on this rank's local tensors.

A split module keeps its class's name, its attributes and its dotted parameter names; its class becomes a subclass in
which ``weight`` and ``bias`` read as this rank's local tensors (differentiably), and, for split matrices and tables,
``forward`` is the local computation with its collective. ``_parameters`` keep the DTensors, so that FSDP2, optimizers
and checkpoints see those. No DTensor operator runs in forward or backward: its dispatch costs more than a small matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from meshwright.executors.recompute import partial_product
from meshwright.profiler.record import record

Collective = Callable[[Tensor], Tensor]


class Entry:
    """The collective at the entry of a region, run once however many column splits are given the same input."""

    def __init__(self, collective: Collective, num_columns: int) -> None:
        self._collective = collective
        self._num_columns = num_columns
        self._given: Tensor | None = None
        self._entered: Tensor | None = None
        self._left = 0

    def __call__(self, x: Tensor) -> Tensor:
        """``x``, entered."""
        if x is not self._given:
            self._given, self._entered, self._left = x, self._collective(x), self._num_columns
        entered = self._entered
        assert entered is not None
        self._left -= 1
        if self._left == 0:
            self._given = self._entered = None
        return entered


@record
class ColumnSplit:
    """Outputs split; ``entry`` is None where the region's container has entered already."""

    transposed: bool
    entry: Collective | None


@record
class RowSplit:
    """Inputs split; ``leave`` adds up the ranks' partial sums, then the bias is added once."""

    transposed: bool
    leave: Collective


@record
class VocabularySplit:
    """Rows ``first_row`` to ``first_row + num_rows`` of the token table; ``leave`` None leaves partial sums."""

    first_row: int
    num_rows: int
    leave: Collective | None


def _column_forward(self: Any, x: Tensor) -> Tensor:
    split: ColumnSplit = self.tensor_parallel
    x = x if split.entry is None else split.entry(x)
    if gradients := vars(self).get("weight_gradients"):
        return gradients.product(self, x, transposed=split.transposed)  # type: ignore[no-any-return]
    weight = self.weight
    return functional.linear(x, weight.t() if split.transposed else weight, self.bias)


def _row_forward(self: Any, x: Tensor) -> Tensor:
    split: RowSplit = self.tensor_parallel
    if gradients := vars(self).get("weight_gradients"):
        x = gradients.product(self, x, transposed=split.transposed, with_bias=False, kept=False)
    else:
        weight = self.weight
        x = partial_product(x, weight.t() if split.transposed else weight)
    x = split.leave(x)
    bias = self.bias
    return x if bias is None else x + bias


def _table_forward(self: Any, tokens: Tensor) -> Tensor:
    split: VocabularySplit = self.tensor_parallel
    rows = tokens - split.first_row
    elsewhere = (rows < 0) | (rows >= split.num_rows)
    padding = None if self.padding_idx is None else self.padding_idx - split.first_row
    if padding is not None and not 0 <= padding < split.num_rows:
        padding = None
    found = functional.embedding(rows.masked_fill(elsewhere, 0), self.weight, padding)
    found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
    return found if split.leave is None else split.leave(found)


_FORWARDS: dict[type | None, Callable[..., Tensor] | None] = {
    ColumnSplit: _column_forward,
    RowSplit: _row_forward,
    VocabularySplit: _table_forward,
    None: None,
}


def compute_locally(module: nn.Module, split: ColumnSplit | RowSplit | VocabularySplit | None = None) -> None:
    """Let ``module``, whose parameters are DTensors, compute on local tensors: as ``split`` says, else as before."""
    names = tuple(name for name, weight in module._parameters.items() if weight is not None)
    if split is not None:
        object.__setattr__(module, "tensor_parallel", split)
    kind: Any = None if split is None else type(split)
    base: Any = type(module)
    module.__class__ = _local_class(base, names, kind)


@cache
def _local_class(base: type[nn.Module], names: tuple[str, ...], split: type | None) -> type[nn.Module]:
    body: dict[str, Any] = {name: _local_property(name) for name in names}
    forward = _FORWARDS[split]
    if forward is not None:
        body["forward"] = forward
    return type(base.__name__, (base,), body)


def _local_property(name: str) -> property:
    def local(self: nn.Module) -> Tensor | None:
        weight = self._parameters[name]
        # sharded further over dp it is not computed with: that is FSDP2 asking for its own parameter
        return weight.to_local() if isinstance(weight, DTensor) and weight.device_mesh.ndim == 1 else weight

    return property(local)
