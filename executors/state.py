"""Whole tensors from the parts that ranks hold: weights and gradients under their original names."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.executors.mesh import Mesh


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights and saved buffers of one stage, whole, on the CPU of each of its ranks."""
    return {name: _whole(value).cpu() for name, value in model.state_dict().items()}


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of one stage, whole, on the CPU of each of its ranks."""
    return {name: _whole(weight.grad).cpu() for name, weight in model.named_parameters() if weight.grad is not None}


def gather_stages(own: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """The tensors of all stages on every rank, from those of each rank's own stages."""
    if mesh.size("pp") == 1:
        return own
    group = mesh.axis("pp").get_group()
    tables: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(tables, {name: (value.shape, value.dtype) for name, value in own.items()}, group=group)
    gathered: dict[str, Tensor] = {}
    for rank, table in enumerate(tables):
        for name, (shape, dtype) in table.items():
            mine = rank == group.rank()
            value = own[name].to(mesh.device) if mine else torch.empty(shape, dtype=dtype, device=mesh.device)
            dist.broadcast(value, group=group, group_src=rank)
            gathered.setdefault(name, value.cpu())
    return gathered


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()
