"""Data parallelism of one stage: gradients summed over the ranks of ``mesh.shard`` (dp times cp), with or without ZeRO.

A stage is made of *units*: each decoder block is one, what stands outside the blocks (embedding, final norm, head) is
another. A unit is what is gathered or reduced by one collective. With ``n`` micro-batches a step, a unit issues

=====  ====================  ===============================  ==============================================
stage  all_gather            reduction                        resident between micro-batches
=====  ====================  ===============================  ==============================================
0      none                  1 all_reduce                     whole weights, whole gradients
1      1                     1 reduce_scatter                 whole weights, whole gradients
2      1                     n reduce_scatter                 whole weights, sharded gradients
3      2n (outer unit: n)    n reduce_scatter                 sharded weights, sharded gradients
=====  ====================  ===============================  ==============================================

The same with and without a pipeline, for every schedule: torch's pipeline runtime would take FSDP's switches over and
keep gradients whole until the last micro-batch, so it is not told that a stage is sharded (``pipeline.Chunk`` stands
between them) and this module sets the switches before each backward. At stage 3 a block is gathered for its forward
and again for its backward; the outer unit is used at both ends of the forward and right at the start of the backward,
so it is freed only after a backward.

Schedules that split backward run with stages 0 and 1: gradients of matrices then come for all units at once, out of
sight of FSDP's hooks, and ``after_weight_gradients`` does what these would; after a backward that is whole the hooks
have done it.

Gradients are sums: the loss is already divided by the global token count (``apply.ParallelModel.step``), so FSDP2,
which would average, is told to divide by 1. Stages 1 to 3 are FSDP2 (``torch.distributed.fsdp.fully_shard``). Stage 0
is ours: after the last backward one all_reduce of each unit's gradients, flattened; no second copy of weights or
gradients remains, unlike with DDP's buckets, and DTensor parameters do not matter (DDP refuses them).

Where the recipe keeps master weights beside those it computes with, the parameters are the master weights, FSDP2 makes
the copies to compute with when it gathers, and gradients are reduced and accumulated in the recipe's own dtype; at
stage 0 FSDP2 then shards over nothing, replicates over dp, and reduces by all_reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from meshwright import InputError
from meshwright.cost_models.workload import DType, DTypeRecipe
from meshwright.executors.mesh import Mesh


class DataParallel:
    """Sums the gradients of ``module`` over ``mesh.shard``; ``blocks`` and the rest of ``module`` are its units.

    ``module`` is changed in place: at ``zero_stage`` 1 to 3 its parameters become DTensors sharded over ``mesh.shard``.
    Call ``before_backward`` ahead of each backward of a step and ``finish`` after the last one.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, zero_stage: int, recipe: DTypeRecipe
    ) -> None:
        self.zero_stage = zero_stage
        self._mesh = mesh.shard
        self._module = module
        inside = {id(weight) for block in blocks for weight in block.parameters()}
        outer = [weight for weight in module.parameters() if id(weight) not in inside]
        self._units = [list(block.parameters()) for block in blocks] + ([outer] if outer else [])
        if recipe.has_master:
            policy = MixedPrecisionPolicy(
                param_dtype=torch_dtype(recipe.compute), reduce_dtype=torch_dtype(recipe.grads)
            )
            # at stage 0: replicated over dp, sharded over an axis of one rank
            self._shard(blocks, mesh.shard if zero_stage else mesh.root["dp", "cp"], policy)
        elif zero_stage:
            self._shard(blocks, mesh.shard, MixedPrecisionPolicy())

    def _shard(self, blocks: Sequence[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        for block in blocks:
            block.register_forward_hook(_without_views)  # ahead of FSDP's own
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self.zero_stage == 3)
        fully_shard(self._module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for unit in self._module.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
        # said outright, since FSDP's own guess (the order of forwards, reversed) is wrong with several in flight
        for previous, block in zip([self._module, *blocks], blocks, strict=False):
            assert isinstance(block, FSDPModule) and isinstance(previous, FSDPModule)
            block.set_modules_to_backward_prefetch([previous])

    def before_backward(self, *, last: bool) -> None:
        """Say whether the coming backward is the step's last one of this stage."""
        if isinstance(self._module, FSDPModule):
            self._module.set_is_last_backward(last)
            self._module.set_requires_gradient_sync(last or self.zero_stage >= 2)
            self._module.set_reshard_after_backward(last or self.zero_stage == 3)

    def after_weight_gradients(self, *, last: bool) -> None:
        """Take up gradients of weights that were worked out on their own: FSDP2's hooks do not run then.

        What FSDP2 does at the end of a backward is done here (as torch's pipeline does, ``pipelining/stage.py:
        perform_reduce_grad``): gradients are added up in the recipe's dtype, and after the ``last`` ones every unit is
        reduced and resharded.
        """
        if not isinstance(self._module, FSDPModule):
            return
        # added up first, also the last ones: of a step's only micro-batch norms' gradients are by now in the recipe's
        # dtype and those of matrices are not, and a unit is reduced in one
        for reduces in (False, True) if last else (False,):
            self.before_backward(last=reduces)
            fully_shard.state(self._module)._root_post_backward_final_callback()  # type: ignore[attr-defined]

    def finish(self) -> None:
        """After the last backward: sum replicated gradients; sharded ones were summed by FSDP2 on the way."""
        if isinstance(self._module, FSDPModule) or self._mesh.size() == 1:
            return
        for unit in self._units:
            for grads in _by_dtype(unit):
                all_reduce_flat(grads, self._mesh.get_group())


def _without_views(block: nn.Module, given: object, output: object) -> object:
    """Copies of those tensors a block returns that are views, which FSDP2 must not hook onto (OPT's blocks do that)."""
    if isinstance(output, tuple):
        return tuple(_without_views(block, given, item) for item in output)
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's object for a dtype. Raises ``InputError`` for one that torch has no arithmetic for."""
    found = getattr(torch, dtype.value, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"dtype {dtype.value} cannot be run by this version")
    return found


def all_reduce_flat(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum ``tensors`` (one dtype) over ``group`` in place, by one collective over a flattened copy."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _by_dtype(weights: Sequence[nn.Parameter]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for weight in weights:
        if weight.grad is not None:
            groups.setdefault(weight.grad.dtype, []).append(local(weight.grad))
    return list(groups.values())
