"""Plan -> device mesh: the rank layout is ``cost_models.placement.rank_grid``, in that one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshwright.cost_models.placement import rank_grid
from meshwright.planner.plan import Plan

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """The mesh ``[pp, dp, cp, tp]`` of a plan, and the directions that executors ask for by name.

    ``shard`` joins dp and cp: the ranks that hold the same weights but for ZeRO, which shards over them.
    """

    root: DeviceMesh
    shard: DeviceMesh
    device: torch.device

    def axis(self, name: str) -> DeviceMesh:
        """The one-dimensional mesh of an axis, of the group that this rank is in."""
        return self.root[name]

    def size(self, name: str) -> int:
        """Ranks along an axis."""
        return self.root[name].size()

    def index(self, name: str) -> int:
        """This rank's place along an axis."""
        return self.root.get_local_rank(name)

    def axis_of_group(self) -> dict[str, str]:
        """Which axis a process group runs along, by the group's name; ``world`` where none of several spans all ranks.

        torch uses the default group for an axis that spans the world, so that what runs over all ranks is then counted
        under that axis. ``shard`` is called ``dp``, as cp is 1.
        """
        world = dist.group.WORLD
        assert world is not None
        names: dict[str, str] = {world.group_name: "world"}
        names |= {self.axis(name).get_group().group_name: name for name in AXES if self.size(name) > 1}
        if self.shard.size() > 1:
            names[self.shard.get_group().group_name] = "dp"
        return names


def build_mesh(plan: Plan, device: torch.device) -> Mesh:
    """Make the plan's mesh over the ranks of the default process group; every rank calls this at the same time."""
    grid = torch.from_numpy(rank_grid(plan.config, plan.placement).copy())
    root = DeviceMesh(device.type, grid, mesh_dim_names=AXES)
    # kept by us: slicing a flattened direction out of the root again is deprecated
    shard = root["dp", "cp"]._flatten("dp_cp") if plan.config.cp > 1 else root["dp"]
    return Mesh(root=root, shard=shard, device=device)
