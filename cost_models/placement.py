"""The rank layout, in one line: which coordinate of the mesh each rank has, and which ranks a group joins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.strategy import ParallelConfig
from meshwright.profiler.record import record

AXES = ("tp", "cp", "dp", "pp")


@record
class Placement:
    """Axis order, fastest first, and optionally which physical rank takes each place.

    ``order``: with the default ``(tp, cp, dp, pp)`` neighbouring ranks are tensor-parallel peers, and pipeline stages
    are furthest apart. ``permutation[i]`` is the physical rank at logical position ``i``; empty means the identity.
    Raises ``InputError`` when the order is not a permutation of the four axes.
    """

    order: tuple[str, ...] = AXES
    permutation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(AXES):
            raise InputError(f"placement order must name {', '.join(AXES)} once each, found {', '.join(self.order)}")
        if sorted(self.permutation) != list(range(len(self.permutation))):
            raise InputError(f"placement permutation must hold each of 0..{len(self.permutation) - 1} once")


def rank_grid(config: ParallelConfig, placement: Placement) -> NDArray[np.int64]:
    """Physical ranks as an array of shape ``[pp, dp, cp, tp]``, whatever the axis order."""
    world = np.asarray(placement.permutation or range(config.world_size), dtype=np.int64)
    if len(world) != config.world_size:
        raise InputError(f"placement permutes {len(world)} ranks, the config has {config.world_size}")
    slowest_first = placement.order[::-1]
    grid = world.reshape([getattr(config, axis) for axis in slowest_first])
    return grid.transpose([slowest_first.index(axis) for axis in ("pp", "dp", "cp", "tp")])


def groups(config: ParallelConfig, placement: Placement, *axes: str) -> NDArray[np.int64]:
    """Ranks of every group that joins ``axes``: shape ``[num_groups, group_size]``; ``groups(c, p, "dp", "cp")``."""
    grid = rank_grid(config, placement)
    names = ["pp", "dp", "cp", "tp"]
    kept = [names.index(name) for name in names if name not in axes]
    joined = [names.index(name) for name in names if name in axes]
    size = int(np.prod([grid.shape[axis] for axis in joined])) if joined else 1
    return grid.transpose(kept + joined).reshape(-1, size)
