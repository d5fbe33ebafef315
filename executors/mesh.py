"""Plan -> device mesh: the rank layout is ``cost_models.placement.rank_grid``, in that one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshwright.cost_models.placement import rank_grid
from meshwright.planner.plan import Plan

AXES = ("pp", "dp", "cp", "tp")
CONTEXT_AXES = ("cp_ring", "cp_ulysses")
EXPERT_AXES = ("edp", "ep", "etp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """The mesh ``[pp, dp, cp, tp]`` of a plan, and the directions that executors ask for by name.

    ``shard`` joins dp and cp: the ranks that hold the same weights but for ZeRO, which shards over them. ``context``
    ``[cp_ring, cp_ulysses]`` is this rank's cp group in two directions, where cp is above 1. ``experts``
    ``[edp, ep, etp]`` are the ranks of this stage as its experts are laid out over them (parallel folding), where the
    model has experts. ``replicas`` and ``expert_replicas`` are ``shard`` and edp with an axis of one rank beside them,
    where weights are whole and FSDP2 is to shard over nothing.
    """

    root: DeviceMesh
    shard: DeviceMesh
    context: DeviceMesh | None
    experts: DeviceMesh | None
    replicas: DeviceMesh | None
    expert_replicas: DeviceMesh | None
    device: torch.device

    def axis(self, name: str) -> DeviceMesh:
        """The one-dimensional mesh of an axis, of the group that this rank is in."""
        return self._holder(name)[name]

    def size(self, name: str) -> int:
        """Ranks along an axis; 1 for an axis that this plan has no mesh for."""
        return self.axis(name).size() if self._has(name) else 1

    def index(self, name: str) -> int:
        """This rank's place along an axis."""
        return self._holder(name).get_local_rank(name) if self._has(name) else 0

    def _has(self, name: str) -> bool:
        return name in AXES or (self.context if name in CONTEXT_AXES else self.experts) is not None

    def _holder(self, name: str) -> DeviceMesh:
        holder = self.root if name in AXES else self.context if name in CONTEXT_AXES else self.experts
        assert holder is not None, name
        return holder

    def axis_of_group(self) -> dict[str, str]:
        """Which axis a process group runs along, by the group's name; ``world`` where none of several spans all ranks.

        torch uses the default group for an axis that spans the world, so that what runs over all ranks is then counted
        under that axis. ``shard`` is called ``dp``. Axes of experts are named last: a group is new for each of them.
        """
        world = dist.group.WORLD
        assert world is not None
        names: dict[str, str] = {world.group_name: "world"}
        names |= {
            self.axis(name).get_group().group_name: name
            for name in (*AXES, *CONTEXT_AXES, *EXPERT_AXES)
            if self.size(name) > 1
        }
        if self.shard.size() > 1:
            names[self.shard.get_group().group_name] = "dp"
        return names


def build_mesh(plan: Plan, device: torch.device) -> Mesh:
    """Make the plan's mesh over the ranks of the default process group; every rank calls this at the same time."""
    config = plan.config
    grid = torch.from_numpy(rank_grid(config, plan.placement).copy())
    root = DeviceMesh(device.type, grid, mesh_dim_names=AXES)
    # kept by us: slicing a flattened direction out of the root again is deprecated
    shard = root["dp", "cp"]._flatten("dp_cp") if config.cp > 1 else root["dp"]
    context = experts = None
    if config.cp > 1:
        apart = grid.reshape(config.pp, config.dp, config.cp_ring, config.cp_ulysses, config.tp)
        context = DeviceMesh(device.type, apart, mesh_dim_names=("pp", "dp", *CONTEXT_AXES, "tp"))[CONTEXT_AXES]
    if plan.model.moe is not None:
        folded = grid.reshape(config.pp, config.edp, config.ep, config.etp)
        experts = DeviceMesh(device.type, folded, mesh_dim_names=("pp", *EXPERT_AXES))[EXPERT_AXES]
    replicas = expert_replicas = None
    if plan.workload.recipe.has_master and config.zero_stage == 0:
        replicas = _beside_one(shard, "dp_replicas")
        expert_replicas = _beside_one(experts["edp"], "edp_replicas") if experts else None
    return Mesh(
        root=root,
        shard=shard,
        context=context,
        experts=experts,
        replicas=replicas,
        expert_replicas=expert_replicas,
        device=device,
    )


def _beside_one(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """A one-dimensional mesh as ``[name, one rank]``."""
    return mesh._unflatten(0, (mesh.size(), 1), (name, f"{name}_one"))
