"""How the parameters of a split module are stored, and the way between what a rank stores and the whole."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from meshwright.executors.tp_collectives import all_reduce_sum
from meshwright.executors.tp_rules import IntArray
from meshwright.profiler.record import record


@record
class Layout:
    """How one parameter is stored: for each rank, the positions along ``dim`` of the whole that it holds, -1 padding.

    ``copies`` is on how many tp ranks each element is held. ``summed``: each rank's gradient is a part of the sum.
    """

    dim: int | None  # None: replicated
    positions: tuple[IntArray, ...]
    whole_size: int
    copies: int
    summed: bool


class TensorParallel:
    """What was split, and how: to finish gradients, and to go between stored tensors and whole ones.

    Names are the module's parameter names, the same as before splitting.
    """

    def __init__(self, module: nn.Module, tp_mesh: DeviceMesh | None, layouts: dict[str, Layout]) -> None:
        self._module = module
        self._mesh = tp_mesh
        self._layouts = layouts

    @property
    def tp(self) -> int:
        """Ranks that share the module."""
        return 1 if self._mesh is None else self._mesh.size()

    def copies(self, name: str) -> int:
        """How many tp ranks hold each element of a parameter: tp for a replicated one, ``tp / kv_heads`` for copies
        of keys and values, else 1. A norm over parameters divides by it; padding is zero and counts nothing."""
        layout = self._layouts.get(name)  # none: experts, which are not split over tp
        return 1 if layout is None else layout.copies

    def finish_gradients(self) -> None:
        """Add up the partial gradients of replicated and copied parameters over tp; once per step, before they are
        used, after every backward and after data parallelism's reduction (or before it: sums commute).

        One all_reduce for each gradient type. Works on what each parameter's ``grad`` holds locally: a DTensor's local
        tensor, also when sharded further over dp.
        """
        if self._mesh is None:
            return
        group, rank = self._mesh.get_group(), self._mesh.get_local_rank()
        buckets: dict[torch.dtype, list[tuple[Tensor, int, int]]] = {}
        for name, weight in self._module.named_parameters():
            layout = self._layouts.get(name)
            if layout is not None and layout.summed and weight.grad is not None:
                local = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
                num_slots = self.tp // layout.copies
                buckets.setdefault(local.dtype, []).append((local, num_slots, rank // layout.copies))
        for entries in buckets.values():
            parts = []
            for local, num_slots, slot in entries:
                part = local.new_zeros(num_slots, local.numel())
                part[slot] = local.reshape(-1)
                parts.append(part.flatten())
            total = all_reduce_sum(torch.cat(parts), group).split([part.numel() for part in parts])
            for (local, num_slots, slot), summed in zip(entries, total, strict=True):
                local.copy_(summed.view(num_slots, -1)[slot].view_as(local))

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole, unpadded tensor in the model's own layout, from a parameter, its gradient or its optimizer state.

        ``tensor`` has the parameter's stored layout: a DTensor (also sharded further over dp; gathered here, so every
        rank of its mesh must call) or, without tensor parallelism, anything.
        """
        stored = gathered(tensor)
        layout = self._layouts.get(name)
        if layout is None or layout.dim is None:
            return stored
        positions = torch.from_numpy(np.concatenate(layout.positions)).to(stored.device)
        shape = list(stored.shape)
        shape[layout.dim] = layout.whole_size
        result = stored.new_empty(shape)
        real = positions >= 0
        kept = stored.index_select(layout.dim, real.nonzero().flatten())
        return result.index_copy_(layout.dim, positions[real], kept)

    def stored_part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as stored: padded and in the stored layout. No communication."""
        if self._mesh is None or name not in self._layouts:
            return whole
        return take_part(whole, self._layouts[name], self._mesh.get_local_rank())


def no_tensor_parallel(module: nn.Module) -> TensorParallel:
    """The same handle for a module that is not split."""
    return TensorParallel(module, None, {})


def gathered(tensor: Tensor) -> Tensor:
    """The stored tensor, of which ``tensor`` may be a shard over several mesh directions."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    # one at a time: torch warns when it has to do so itself; a dimension cut twice from its last cut on, unless strided
    inner_first = sorted(range(len(placements)), key=lambda dim: (isinstance(placements[dim], _StridedShard), dim))
    for direction in reversed(inner_first):
        placements[direction] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def take_part(whole: Tensor, layout: Layout, rank: int) -> Tensor:
    """The part of a whole tensor that ``rank`` stores; always a tensor of its own."""
    if layout.dim is None:
        return whole.clone()
    positions = torch.from_numpy(layout.positions[rank]).to(whole.device)
    part = whole.index_select(layout.dim, positions.clamp(min=0))
    padding = (layout.positions[rank] < 0).sum().item()
    if padding:
        part.narrow(layout.dim, part.shape[layout.dim] - padding, padding).zero_()
    return part
