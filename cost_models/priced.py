"""Seconds of the collectives that a block issues, before any overlap: the group each crosses, the copies it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import context, expert_exchange
from meshwright.cost_models.collectives import Groups, groups_of, seconds
from meshwright.cost_models.expert_traffic import moe_layer
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.issued import PER_MICROBATCH, Collective
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.model import Block, ModelSpec

FloatArray = NDArray[np.float64]

# local copies around an all_reduce of data parallelism after the last backward, in passes over the whole tensor: it
# flattens and copies back
_COPIES_AT_END = 4.0
_ALIKE = {"edp": "dp", "etp": "ep"}  # axes of experts that overlap as another does


@dataclass(frozen=True, slots=True)
class Priced:
    """A block's collectives: seconds by (axis, phase), and calls by phase."""

    spent: dict[tuple[str, str], FloatArray]
    inside: dict[tuple[str, str], FloatArray]  # what the same bytes would take inside a node
    copied: dict[tuple[str, str], FloatArray]  # local copies among the kernels
    calls: dict[str, FloatArray]


def groups_by_axis(
    model: ModelSpec, cluster: ClusterProfile, batch: ConfigBatch, placement: Placement
) -> dict[str, Groups]:
    """The groups that collectives cross, by axis; ``shard`` and ``eshard`` are those that share one copy of weights."""
    groups = {
        "tp": groups_of(batch, cluster, placement, "tp"),
        "dp": groups_of(batch, cluster, placement, "dp", "cp"),
        "shard": groups_of(_one_shard(batch), cluster, placement, "dp", "cp"),
    }
    if (batch.cp > 1).any():
        groups |= {axis: groups_of(batch, cluster, placement, axis) for axis in ("cp_ring", "cp_ulysses")}
    if model.moe is not None:
        groups |= {axis: groups_of(batch, cluster, placement, axis) for axis in ("ep", "etp", "edp")}
        groups["eshard"] = groups_of(_one_shard(batch), cluster, placement, "edp")
    return groups


def price_all(
    traffic: list[Collective],
    block: Block,
    workload: Workload,
    cluster: ClusterProfile,
    groups: dict[str, Groups],
    framework: Framework,
    batch: ConfigBatch,
) -> Priced:
    """Seconds of every collective in ``traffic`` on one rank, all calls of a phase together."""
    zero, found = np.zeros(len(batch)), Priced({}, {}, {}, {})
    for entry in traffic:
        if not entry.calls.any():
            continue
        axis = _ALIKE.get(entry.axis, entry.axis)
        key, factor = (axis, entry.phase), framework.dp_factor if axis == "dp" else 1.0
        once, copies = _price(entry, block, workload, cluster, groups, framework, batch)
        if axis == "dp" and entry.phase != "end" and framework.copies_exposed:
            after = (axis, entry.phase if entry.phase in PER_MICROBATCH else "end")
            found.copied[after] = found.copied.get(after, zero) + cluster.device.memory_factor * copies
        else:
            once = once + copies
        waiting = entry.calls * framework.host.skew_s if entry.axis == "tp" else 0.0
        found.spent[key] = found.spent.get(key, zero) + factor * once + waiting
        found.inside[key] = found.inside.get(key, zero) + np.minimum(_inside(entry, cluster), factor * once)
        found.calls[entry.phase] = found.calls.get(entry.phase, zero) + entry.calls
    return found


def _one_shard(batch: ConfigBatch) -> ConfigBatch:
    """Configs whose data ranks are those of one shard group: neighbours, since a group that fits takes one node."""
    return replace(batch, dp=np.maximum(batch.dp_shard // batch.cp, 1))


def _price(
    entry: Collective,
    block: Block,
    workload: Workload,
    cluster: ClusterProfile,
    groups: dict[str, Groups],
    framework: Framework,
    batch: ConfigBatch,
) -> tuple[FloatArray, FloatArray]:
    """Seconds of the collective and of the local copies around it."""
    axis, message = entry.axis, np.where(entry.calls > 0, entry.message_bytes, 0.0)
    layer = moe_layer(block) if axis in ("ep", "etp") else None
    if layer is not None:
        slower = expert_exchange.rows_of(layer, workload, batch).slower
        one = expert_exchange.exchange_seconds(cluster, entry.op, groups[axis], message, layer, framework.experts)
        return np.asarray(entry.calls * slower * one), np.zeros(len(batch))
    if entry.op == "send":
        return np.asarray(entry.calls * context.hop_seconds(cluster, groups[axis], message)), np.zeros(len(batch))
    shard = {"dp": "shard", "edp": "eshard"}
    once = seconds(cluster, entry.op, groups[shard[axis] if entry.in_shard else axis], message)
    # what is laid out by sequences is no row of shards
    passes = np.where(batch.sequence_parallel & (batch.micro_batch_size > 1), framework.sequence_copies, 0.0)
    if axis in ("dp", "edp"):
        moves = entry.op in ("all_gather", "broadcast")
        each = framework.gather_copies if moves else framework.reduce_copies
        passes = np.full(len(batch), _COPIES_AT_END if entry.phase == "end" else each)
    elif axis in ("cp_ring", "cp_ulysses"):
        passes = np.full(len(batch), framework.context.exchange_copies * (axis == "cp_ulysses"))
    copies = passes * entry.message_bytes / cluster.device.memory_bytes_per_s
    return np.asarray(entry.calls * once), np.asarray(entry.calls * copies)


def _inside(entry: Collective, cluster: ClusterProfile) -> FloatArray:
    """Seconds of the same bytes over the innermost links."""
    if not cluster.tiers:
        return np.zeros_like(entry.calls)
    rounds = 2.0 if entry.op == "all_reduce" else 1.0
    return np.asarray(entry.calls * rounds * entry.message_bytes / cluster.tiers[0].contended_bytes_per_s)
