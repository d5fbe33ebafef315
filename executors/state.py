"""Whole tensors from the parts that ranks hold: weights and gradients under their original names."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.executors.mesh import Mesh
from meshwright.executors.pipeline import Chunk


def whole_weights(chunk: Chunk) -> dict[str, Tensor]:
    """Weights and saved buffers of one stage, whole and unpadded, on the CPU of each of its ranks."""
    stored = chunk.module.model.state_dict()
    return {name: chunk.tensor_parallel.whole(name, value).detach().cpu() for name, value in stored.items()}


def whole_gradients(chunk: Chunk) -> dict[str, Tensor]:
    """Gradients of one stage, whole and unpadded, on the CPU of each of its ranks."""
    weights = chunk.module.model.named_parameters()
    grads = {name: weight.grad for name, weight in weights if weight.grad is not None}
    return {name: chunk.tensor_parallel.whole(name, grad).cpu() for name, grad in grads.items()}


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
