"""Whole tensors from the parts that ranks hold, and back: weights and gradients under their original names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from meshwright import InputError
from meshwright.executors.data_parallel import local
from meshwright.executors.expert_parallel import ExpertParallel, ExpertStatistics
from meshwright.executors.mesh import Mesh
from meshwright.executors.pipeline import Chunk
from meshwright.executors.tensor_parallel import TensorParallel


def whole_weights(chunk: Chunk) -> dict[str, Tensor]:
    """Weights and saved buffers of one stage, whole and unpadded, on the CPU of each of its ranks."""
    stored = chunk.module.model.state_dict()
    return {name: _apart(_split_by(chunk, name).whole(name, value)) for name, value in stored.items()}


def _split_by(chunk: Chunk, name: str) -> TensorParallel | ExpertParallel:
    """Which of the two splits cut a tensor of a stage."""
    if chunk.experts is not None and name in chunk.experts.names:
        return chunk.experts
    return chunk.tensor_parallel


def _apart(value: Tensor) -> Tensor:
    """A copy on the CPU: what a rank holds whole would else change with the next step."""
    return value.detach().to("cpu", copy=True)


def whole_gradients(chunk: Chunk) -> dict[str, Tensor]:
    """Gradients of one stage, whole and unpadded, on the CPU of each of its ranks."""
    weights = chunk.module.model.named_parameters()
    grads = {name: weight.grad for name, weight in weights if weight.grad is not None}
    return {name: _split_by(chunk, name).whole(name, grad).cpu() for name, grad in grads.items()}


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


def load_whole(chunk: Chunk, weights: Mapping[str, Tensor]) -> None:
    """Copy this rank's part of whole weights into a stage, in place; no communication.

    Raises ``InputError`` naming weights that are missing or have another shape.
    """
    for name, stored in chunk.module.model.state_dict().items():
        if name not in weights:
            raise InputError(f"state_dict has no {name!r}")
        part = _split_by(chunk, name).stored_part(name, weights[name])
        if isinstance(stored, DTensor) and stored.to_local().shape != part.shape:
            part = _shard_of(part, stored)
        target = local(stored)
        if part.shape != target.shape:
            raise InputError(f"{name} has the shape {list(weights[name].shape)} in state_dict, the model another")
        target.copy_(part)


def load_parts(chunk: Chunk, parts: Mapping[str, Tensor]) -> None:
    """Copy parts, as ``state_dict(full=False)`` gave them on this rank under the same plan, into a stage, in place.

    Raises ``InputError`` naming parts that are missing or have another shape.
    """
    for name, stored in chunk.module.model.state_dict().items():
        found = local(parts[name]) if name in parts else None
        if found is None or found.shape != local(stored).shape:
            raise InputError(f"{name} is missing in state_dict or was split otherwise: load a full state_dict instead")
        local(stored).copy_(found)


def _shard_of(part: Tensor, stored: DTensor) -> Tensor:
    """What FSDP2 holds of a tensor: its chunk along the dimension it cuts; later chunks may be short or empty."""
    mesh, placement = stored.device_mesh, stored.placements[0]
    assert mesh.mesh_dim_names is not None and isinstance(placement, Shard | _StridedShard)
    size, index, dim = mesh.size(0), mesh.get_local_rank(0), placement.dim
    rows = -(-part.shape[dim] // size)
    start = min(index * rows, part.shape[dim])
    return part.narrow(dim, start, min(rows, part.shape[dim] - start))


def gather_statistics(own: Sequence[ExpertStatistics], mesh: Mesh) -> ExpertStatistics:
    """The statistics of all stages on every rank, layers in the order of the model, from those of each rank's own."""
    fields = ("load", "dropped", "auxiliary_loss")
    rows = {
        f"{layer} {field}": getattr(statistics, field)[row]
        for statistics in own
        for row, layer in enumerate(statistics.layers)
        for field in fields
    }
    found = gather_stages(rows, mesh)
    layers = sorted({name.split()[0] for name in found}, key=_in_order)
    stacked = {field: torch.stack([found[f"{layer} {field}"].cpu() for layer in layers]) for field in fields}
    return ExpertStatistics(layers=tuple(layers), **stacked)


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Sorts dotted names with numbers by number."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
