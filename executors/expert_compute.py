"""The experts' own work on rows sorted by expert: two grouped matrix products around the model's activation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

from meshwright.executors.expert_dispatch import Arrived
from meshwright.executors.expert_modules import ExpertShape
from meshwright.executors.recompute import SELECTIVE_PASSES

_ALIGNED_BYTES = 16  # what the grouped kernel asks of a matrix's rows
_GROUPED_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_product(rows: Tensor, matrices: Tensor, arrived: Arrived) -> Tensor:
    """``rows[of e] @ matrices[e]`` for each expert: ``[rows, in]``, ``[experts, in, out]`` to ``[rows, out]``.

    ``arrived`` says which rows are whose. One grouped kernel (``torch.nn.functional.grouped_mm``) where it takes the
    type and the widths (multiples of 16 bytes) and there are rows, else one product an expert: also for those without
    rows, whose gradient is zero, not missing.
    """
    if rows.shape[0] and _has_kernel(rows, matrices):
        return functional.grouped_mm(rows, matrices, offs=arrived.ends)
    pieces = rows.split(arrived.num_rows)
    return torch.cat([piece @ matrix for piece, matrix in zip(pieces, matrices.unbind(0), strict=True)])


def last_product(rows: Tensor, matrices: Tensor, arrived: Arrived) -> Tensor:
    """``grouped_product`` of which only what a collective makes of it is used.

    Selective recompute keeps what the collective returned, not this; in the recomputation it is memory without values.
    """
    if not isinstance(_get_current_dispatch_mode(), SELECTIVE_PASSES):
        return grouped_product(rows, matrices, arrived)
    product: Tensor = _LastProduct.apply(rows, matrices, arrived)
    return product


class _LastProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, arrived: Arrived) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        ctx.arrived = replace(arrived, places=None)
        # torch matches the operators of both passes by their order: those of one pass alone must go unseen
        with _pop_mode_temporarily() as mode:
            if isinstance(mode, SELECTIVE_PASSES[1]):
                return rows.new_empty(rows.shape[0], matrices.shape[-1])
            return grouped_product(rows, matrices, arrived)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, matrices = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_rows = grouped_product(grad, matrices.transpose(-2, -1), ctx.arrived)
        if matrices.stride(-2) == 1:  # as the parameter lies, whose transpose this is
            return to_rows, _outer_products(grad, rows, ctx.arrived).transpose(-2, -1), None
        return to_rows, _outer_products(rows, grad, ctx.arrived), None


def _outer_products(first: Tensor, second: Tensor, arrived: Arrived) -> Tensor:
    """``first[of e].T @ second[of e]`` for each expert: ``[rows, m]``, ``[rows, n]`` to ``[experts, m, n]``."""
    if first.shape[0] and _is_aligned(first) and _is_aligned(second):
        return functional.grouped_mm(first.transpose(0, 1), second, offs=arrived.ends)
    pieces = zip(first.split(arrived.num_rows), second.split(arrived.num_rows), strict=True)
    return torch.stack([one.transpose(0, 1) @ other for one, other in pieces])


def _has_kernel(rows: Tensor, matrices: Tensor) -> bool:
    return matrices.dtype is rows.dtype and _is_aligned(rows, *matrices.shape[1:])


def _is_aligned(rows: Tensor, *widths: int) -> bool:
    """Whether the grouped kernel takes the type, and these widths, or that of ``rows``."""
    if rows.dtype not in _GROUPED_TYPES or (rows.is_cuda and torch.cuda.get_device_capability(rows.device) < (8, 0)):
        return False
    return all(width * rows.element_size() % _ALIGNED_BYTES == 0 for width in widths or rows.shape[1:])


def run_experts(
    module: nn.Module, shape: ExpertShape, rows: Tensor, arrived: Arrived, *, adds_bias: bool, leaves: bool
) -> Tensor:
    """``[rows, h]`` through this rank's part of its experts, to ``[rows, h]``: partial sums where the width is split.

    ``adds_bias``: whether this rank is the one of its etp group that adds the bias after the second matrix; the bias'
    gradient is whole on each of them. ``leaves``: a collective takes the result, and nothing else.
    """
    weights: Any = module
    expert = _expert_of_row(arrived, rows) if shape.biased else None
    x = grouped_product(rows, _inputs_first(getattr(weights, shape.up), shape), arrived)
    if expert is not None:
        x = x + getattr(weights, f"{shape.up}_bias")[expert]
    x = _activate(weights, shape, x)
    product = last_product if leaves else grouped_product
    x = product(x, _inputs_first(weights.down_proj, shape), arrived)
    if expert is not None:
        bias = weights.down_proj_bias
        x = x + (bias if adds_bias else bias - bias.detach())[expert]
    return x


def _inputs_first(matrices: Tensor, shape: ExpertShape) -> Tensor:
    return matrices if shape.transposed else matrices.transpose(-2, -1)


def _expert_of_row(arrived: Arrived, rows: Tensor) -> Tensor:
    places = torch.arange(rows.shape[0], dtype=arrived.ends.dtype, device=rows.device)
    return torch.searchsorted(arrived.ends, places, right=True)


def _activate(module: Any, shape: ExpertShape, x: Tensor) -> Tensor:
    """The module's own activation, by its own method where it has one."""
    if not shape.gated:
        return module.act_fn(x)  # type: ignore[no-any-return]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(x)  # type: ignore[no-any-return]
    gate, up = x.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[no-any-return]
