"""Data parallelism of one stage: gradients summed over the ranks that hold the same weights, with or without ZeRO.

A stage is made of *units*: each decoder block is one, the experts of a block are another, and what stands outside the
blocks (embedding, final norm, head) is one more. A unit is what is gathered or reduced by one collective: dense weights
over ``mesh.shard`` (dp times cp), experts over ``mesh.experts["edp"]``, which may span what tp and cp use (parallel
folding). Where these are the same ranks (tp, ep and etp all 1) experts belong to their block's unit. With ``n``
micro-batches a step, a unit issues

=====  ====================  ===============================  ==============================================
stage  all_gather            reduction                        resident between micro-batches
=====  ====================  ===============================  ==============================================
0      none                  1 all_reduce                     whole weights, whole gradients
1      1                     1 reduce_scatter                 whole weights, whole gradients
2      1                     n reduce_scatter                 whole weights, sharded gradients
3      2n (outer unit: n)    n reduce_scatter                 sharded weights, sharded gradients
=====  ====================  ===============================  ==============================================

over its own ranks, and none where these are one alone: with edp = 1 a rank's experts are nobody else's, and are not
sharded at any stage. The same with and without a pipeline, for every schedule: torch's pipeline runtime would take
FSDP's switches over and keep gradients whole until the last micro-batch, so it is not told that a stage is sharded
(``pipeline.Chunk`` stands between them) and this module sets the switches before each backward. At stage 3 a block is
gathered for its forward and again for its backward, its experts with it (two units of one ``fully_shard``, whose hooks
are outside of what recompute runs again); the outer unit is used at both ends of
the forward and right at the start of the backward, so it is freed only after a backward.

Schedules that split backward run with stages 0 and 1: gradients of matrices then come for all units at once, out of
sight of FSDP's hooks, and ``after_weight_gradients`` does what these would; after a backward that is whole the hooks
have done it.

Gradients are sums: the loss is already divided by the global token count (``ParallelModel.step``), so FSDP2,
which would average, is told to divide by 1, experts too: each has seen all tokens of its ep group. Stages 1 to 3 are
FSDP2 (``torch.distributed.fsdp.fully_shard``). Stage 0 is ours: after the last backward one all_reduce of each unit's
gradients, flattened; no second copy of weights or gradients remains, unlike with DDP's buckets, and DTensor parameters
do not matter (DDP refuses them).

FSDP2 cuts a weight along its first dimension and pads what does not divide: 8 experts over 64 ranks would become 64.
So an expert weight ``[num_experts / ep, ..., ...]`` as a rank holds it is cut along the first dimension that edp
divides, the second mostly where a rank has fewer experts than edp (torchtitan's rule too), and padded along the first
only where edp divides none.

Where the recipe keeps master weights beside those it computes with, the parameters are the master weights, FSDP2 makes
the copies to compute with when it gathers, and gradients are reduced and accumulated in the recipe's own dtype; at
stage 0 FSDP2 then shards over nothing, replicates over the unit's ranks, and reduces by all_reduce; experts with
edp = 1 are sharded over one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from meshwright import InputError
from meshwright.cost_models.workload import DType, DTypeRecipe
from meshwright.executors.mesh import Mesh


class DataParallel:
    """Sums the gradients of ``module`` over the ranks that share them; its units are ``blocks``, the ``experts`` inside
    them, and the rest of ``module``.

    ``module`` is changed in place: at ``zero_stage`` 1 to 3 its parameters become DTensors sharded over the ranks of
    their unit. Call ``before_backward`` ahead of each backward of a step and ``finish`` after the last one.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        mesh: Mesh,
        zero_stage: int,
        recipe: DTypeRecipe,
        *,
        experts: Sequence[nn.Module] = (),
    ) -> None:
        self.zero_stage = zero_stage
        self._module = module
        self._stacked = {id(weight): weight for unit in experts for weight in unit.parameters()}
        with_block = mesh.size("tp") * mesh.size("ep") * mesh.size("etp") == 1
        routed = {} if with_block else self._stacked
        self._units = _units(module, blocks, routed, mesh)
        self._policy = MixedPrecisionPolicy()
        if recipe.has_master:
            self._policy = MixedPrecisionPolicy(
                param_dtype=torch_dtype(recipe.compute), reduce_dtype=torch_dtype(recipe.grads)
            )
        if recipe.has_master and zero_stage == 0:
            assert mesh.replicas is not None
            self._shard(blocks, mesh.replicas, routed, mesh.expert_replicas)
        elif recipe.has_master or zero_stage:
            alone = mesh.size("edp") == 1 and not recipe.has_master
            self._shard(blocks, mesh.shard, routed, mesh.axis("edp") if routed and not alone else None)

    def _shard(
        self,
        blocks: Sequence[nn.Module],
        mesh: DeviceMesh,
        routed: Mapping[int, nn.Parameter],
        expert_mesh: DeviceMesh | None,
    ) -> None:
        """``routed`` weights over ``expert_mesh``, or not at all where there is none; all others over ``mesh``."""
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": self._policy}
        if expert_mesh is None:
            options["ignored_params"] = set(routed.values())
        elif routed:
            options["shard_placement_fn"] = _placement(routed, expert_mesh)
        if self._stacked and not routed:  # experts over the ranks of their block
            options["shard_placement_fn"] = partial(_cut, self._stacked, mesh.size(-1))
        for block in blocks:
            block.register_forward_hook(_without_views)  # ahead of FSDP's own
            fully_shard(block, reshard_after_forward=self.zero_stage == 3, **options)
        fully_shard(self._module, reshard_after_forward=False, **options)
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
        if isinstance(self._module, FSDPModule):
            return
        for unit, group in self._units:
            for grads in _by_dtype(unit) if group.size() > 1 else ():
                all_reduce_flat(grads, group)


def _units(
    module: nn.Module, blocks: Sequence[nn.Module], routed: Mapping[int, nn.Parameter], mesh: Mesh
) -> list[tuple[list[nn.Parameter], dist.ProcessGroup]]:
    """The parameters of each unit, and the ranks that hold the same."""
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    dense, units = mesh.shard.get_group(), []
    for block in blocks:
        weights = list(block.parameters())
        units.append(([weight for weight in weights if id(weight) not in routed], dense))
        if routed:
            units.append(([weight for weight in weights if id(weight) in routed], mesh.axis("edp").get_group()))
    units.append(([weight for weight in module.parameters() if id(weight) not in inside], dense))
    return [(unit, group) for unit, group in units if unit]


def _cut(stacked: Mapping[int, nn.Parameter], num_shards: int, weight: nn.Parameter) -> Shard | None:
    """Along which dimension a weight among ``stacked`` experts is cut, as the module says; None for any other."""
    if id(weight) not in stacked:
        return None
    dims = [dim for dim, size in enumerate(local(weight).shape) if size % num_shards == 0]
    return Shard(dims[0] if dims else 0)


def _placement(routed: Mapping[int, nn.Parameter], mesh: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """Tells FSDP2 where and how the ``routed`` weights are cut: over ``mesh``, as the module says."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        raise InputError(
            f"torch {torch.__version__} shards all weights of a block over the same ranks: experts over ep, etp or tp "
            "with ZeRO or master weights need torch 2.13"
        ) from None
    place: FSDPMeshInfo = (
        FSDPMeshInfo(mesh, shard_mesh_dim=0)
        if mesh.ndim == 1
        else HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    )

    def placed(weight: nn.Parameter) -> ShardPlacementResult | None:
        cut = _cut(routed, place.shard_mesh_size, weight)
        return None if cut is None else ShardPlacementResult(placement=cut, mesh_info=place)

    return placed


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
