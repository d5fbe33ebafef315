"""The experts' own work on rows sorted by expert: two grouped matrix products around the model's activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.executors.expert_dispatch import Arrived
from meshwright.executors.expert_modules import ExpertShape

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


def _has_kernel(rows: Tensor, matrices: Tensor) -> bool:
    if rows.dtype not in _GROUPED_TYPES or matrices.dtype is not rows.dtype:
        return False
    if rows.is_cuda and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    return all(size * rows.element_size() % _ALIGNED_BYTES == 0 for size in matrices.shape[1:])


def run_experts(module: nn.Module, shape: ExpertShape, rows: Tensor, arrived: Arrived, *, adds_bias: bool) -> Tensor:
    """``[rows, h]`` through this rank's part of its experts, to ``[rows, h]``: partial sums where the width is split.

    ``adds_bias``: whether this rank is the one of its etp group that adds the bias after the second matrix; the bias'
    gradient is whole on each of them.
    """
    weights: Any = module
    expert = _expert_of_row(arrived, rows) if shape.biased else None
    x = grouped_product(rows, _inputs_first(getattr(weights, shape.up), shape), arrived)
    if expert is not None:
        x = x + getattr(weights, f"{shape.up}_bias")[expert]
    x = _activate(weights, shape, x)
    x = grouped_product(x, _inputs_first(weights.down_proj, shape), arrived)
    if expert is not None:
        bias = weights.down_proj_bias
        x = x + (bias if adds_bias else bias - bias.detach())[expert]
    return x


def _inputs_first(matrices: Tensor, shape: ExpertShape) -> Tensor:
    return matrices if shape.transposed else matrices.transpose(-2, -1)


def _expert_of_row(arrived: Arrived, rows: Tensor) -> Tensor:
    return torch.searchsorted(arrived.ends, torch.arange(rows.shape[0], device=rows.device), right=True)


def _activate(module: Any, shape: ExpertShape, x: Tensor) -> Tensor:
    """The module's own activation, by its own method where it has one."""
    if not shape.gated:
        return module.act_fn(x)  # type: ignore[no-any-return]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(x)  # type: ignore[no-any-return]
    gate, up = x.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[no-any-return]
