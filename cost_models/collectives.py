"""Seconds of a collective on a group of ranks: measured where the profile has it, else from latency and bandwidth.

The model is alpha-beta (Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in
MPICH", doi:10.1177/1094342005051521), tier by tier. A group of ``n`` ranks has ``m_j`` of them inside one domain of
tier ``j`` and so ``D_j = n / m_j`` domains; with ``m_{-1} = 1``, ``D_{-1} = n``:

* ring: ``D_{j-1} - D_j`` of its ``n - 1`` hops cross tier ``j`` and cost its latency, and the whole moves at the
  narrowest crossing. A group with ``m_{j-1}`` ranks in each lower domain drives as many devices' share of tier ``j``
  (NCCL lays as many rings, https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-cross-nic);
* tree (all_reduce): up and down, ``2 log2`` latencies a tier, twice the message at the narrowest crossing
  (double binary trees: Sanders, Speck and Traeff 2009, doi:10.1016/j.parco.2009.09.001);
* hierarchical: reduce-scatter inside, all-reduce across with what is left, all-gather inside.

The fastest is taken. Rates are contended ones (``LinkTier.contended_bytes_per_s``): in a step all groups of one axis
communicate at the same time. Left out: protocol changes with size, which measured curves hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ConfigBatch, IntArray
from meshwright.profiler.cluster import ClusterProfile, CollectiveCurve, CollectiveOp

FloatArray = NDArray[np.float64]
OPS: tuple[str, ...] = get_args(CollectiveOp)


@dataclass(frozen=True, slots=True)
class Groups:
    """Where the ranks of one axis's groups are: ``size`` ranks, ``inside[j]`` of them in one domain of tier ``j``.

    Arrays of shape ``[num_configs]``; ``inside`` of shape ``[num_tiers, num_configs]``, the last row equal to ``size``.
    ``per_node`` is the number of ranks on one node.
    """

    size: FloatArray
    inside: FloatArray
    per_node: IntArray


def groups_of(batch: ConfigBatch, cluster: ClusterProfile, placement: Placement, *axes: str) -> Groups:
    """The groups that join ``axes`` under ``placement`` (its order; a permutation is left out), over arrays.

    An axis of degree ``n`` and stride ``s`` (the product of the faster degrees) has ``min(n, max(1, G // s))`` ranks
    in an aligned domain of ``G`` devices; where ``G`` is no multiple of ``s`` some groups have fewer.
    """
    size = np.ones(len(batch), dtype=np.int64)
    sizes = [tier.group_size for tier in cluster.tiers] or [1]
    inside = np.ones((len(sizes), len(batch)), dtype=np.int64)
    per_node = np.ones(len(batch), dtype=np.int64)
    stride = np.ones(len(batch), dtype=np.int64)
    for axis in placement.order:
        degree = getattr(batch, axis)
        if axis in axes:
            size = size * degree
            for row, domain in enumerate(sizes):
                inside[row] *= np.minimum(degree, np.maximum(domain // stride, 1))
            per_node = per_node * np.minimum(degree, np.maximum(cluster.devices_per_node // stride, 1))
        stride = stride * degree
    inside[-1] = size
    return Groups(size.astype(np.float64), np.minimum(inside, size).astype(np.float64), np.minimum(per_node, size))


def seconds(cluster: ClusterProfile, op: str, groups: Groups, message_bytes: Any) -> FloatArray:
    """Seconds of one collective on every config's group; 0 for a group of one rank or an empty message.

    ``message_bytes`` is the whole tensor as ``CollectiveCurve`` defines it; it broadcasts against ``[num_configs]``.
    A measured curve of the very shape is read off (linear between sizes, the whole curve's slope beyond); of the
    nearest shape, its latency and its slope are scaled by the alpha-beta model's own. A profile without curves of the
    op falls back to alpha-beta. On alpha-beta links all_reduce never costs more than reduce_scatter and all_gather in
    a row; measured curves are taken as they are.
    """
    if not cluster.tiers:  # one device
        return np.zeros(groups.size.shape)
    bytes_ = np.broadcast_to(np.asarray(message_bytes, dtype=np.float64), groups.size.shape)
    curves = [curve for curve in cluster.collectives if curve.op == op]
    result = _from_curves(cluster, op, curves, groups, bytes_) if curves else _alpha_beta(cluster, op, groups, bytes_)
    return np.where((groups.size > 1) & (bytes_ > 0), result, 0.0)


def send_seconds(cluster: ClusterProfile, first: Any, second: Any, num_bytes: Any) -> FloatArray:
    """Seconds to send ``num_bytes`` from device ``first`` to device ``second`` while their neighbours do the same."""
    first, second, num_bytes = np.broadcast_arrays(first, second, np.asarray(num_bytes, dtype=np.float64))
    result = np.zeros(first.shape)
    for tier in reversed(cluster.tiers):  # the innermost domain that holds both is written last
        together = first // tier.group_size == second // tier.group_size
        result = np.where(together, tier.latency_s + num_bytes / tier.contended_bytes_per_s, result)
    return np.where((first == second) | (num_bytes == 0), 0.0, result)


def _alpha_beta(cluster: ClusterProfile, op: str, groups: Groups, num_bytes: FloatArray) -> FloatArray:
    latency, per_byte = _terms(cluster, op, groups)
    return np.asarray(np.min(latency + per_byte * num_bytes, axis=0))


def _terms(cluster: ClusterProfile, op: str, groups: Groups) -> tuple[FloatArray, FloatArray]:
    """Latency and seconds per byte of each algorithm: two arrays of shape ``[num_algorithms, num_configs]``."""
    size, below = groups.size, np.vstack([np.ones_like(groups.size), groups.inside[:-1]])
    ring_latency, tree_latency, layered = np.zeros_like(size), np.zeros_like(size), np.zeros_like(size)
    layered_latency, slowest = np.zeros_like(size), np.zeros_like(size)
    for tier, inside, lower in zip(cluster.tiers, groups.inside, below, strict=True):
        crossed = inside > lower
        domains = inside / lower  # lower domains that this tier joins
        ring_latency += np.where(crossed, (size / lower - size / inside) * tier.latency_s, 0.0)
        tree_latency += np.where(crossed, 2.0 * np.ceil(np.log2(domains)) * tier.latency_s, 0.0)
        layered_latency += np.where(crossed, (domains - 1.0) * tier.latency_s, 0.0)
        slowest = np.maximum(slowest, np.where(crossed, 1.0 / (lower * tier.contended_bytes_per_s), 0.0))
        layered += np.where(crossed, (domains - 1.0) / domains / (lower * tier.contended_bytes_per_s), 0.0)
    share = (size - 1.0) / size
    if op == "all_to_all":  # each rank keeps 1/n and exchanges the rest directly with its peers
        return np.stack([ring_latency]), np.stack([_exchange(cluster, groups)])
    if op == "broadcast":  # a pipelined ring, or a tree
        return np.stack([ring_latency, tree_latency / 2.0]), np.stack([slowest, slowest])
    if op == "all_reduce":
        latency = np.stack([2.0 * ring_latency, tree_latency, 2.0 * layered_latency])
        return latency, np.stack([2.0 * share * slowest, 2.0 * slowest, 2.0 * layered])
    return np.stack([ring_latency, layered_latency]), np.stack([share * slowest, layered])


def _exchange(cluster: ClusterProfile, groups: Groups) -> FloatArray:
    """Seconds per byte of a rank's input in all_to_all: the share that leaves each domain, at the tier it crosses."""
    worst, lower = np.zeros_like(groups.size), np.ones_like(groups.size)
    for tier, inside in zip(cluster.tiers, groups.inside, strict=True):
        leaves = np.where(inside > lower, (groups.size - lower) / groups.size, 0.0)
        worst = np.maximum(worst, leaves / tier.contended_bytes_per_s)
        lower = inside
    return worst


def _from_curves(
    cluster: ClusterProfile, op: str, curves: list[CollectiveCurve], groups: Groups, num_bytes: FloatArray
) -> FloatArray:
    shapes = np.array([(curve.num_ranks, curve.ranks_per_node) for curve in curves], dtype=np.float64)
    ranks, per_node = np.maximum(groups.size, 1.0), np.maximum(groups.per_node, 1).astype(np.float64)
    distance = np.abs(np.log2(ranks[:, None] / shapes[:, 0])) + np.abs(np.log2(per_node[:, None] / shapes[:, 1]))
    crosses = (ranks > per_node)[:, None] != (shapes[:, 0] > shapes[:, 1])
    nearest = np.argmin(distance + 100.0 * crosses, axis=1)  # a shape that crosses nodes as this one does, if any
    latency, per_byte = _limits(cluster, op, groups)
    result = np.zeros_like(num_bytes)
    for index in np.unique(nearest):
        curve, rows = curves[index], nearest == index
        of_curve = _limits(cluster, op, _groups_of_curve(cluster, curve))
        smallest = curve.expected_s[0]
        measured = _read(curve, num_bytes[rows])
        scaled = smallest * latency[rows] / of_curve[0] + (measured - smallest) * per_byte[rows] / of_curve[1]
        exact = distance[rows, index] == 0
        result[rows] = np.where(exact, measured, scaled)
    return result


def _limits(cluster: ClusterProfile, op: str, groups: Groups) -> tuple[FloatArray, FloatArray]:
    """Seconds of an almost empty message, and seconds per byte of a huge one, by the alpha-beta model."""
    latency, per_byte = _terms(cluster, op, groups)
    return np.min(latency, axis=0), np.min(per_byte, axis=0)


def _groups_of_curve(cluster: ClusterProfile, curve: CollectiveCurve) -> Groups:
    """The measured shape as groups: its ranks on a node are neighbours, its nodes fill domain after domain."""
    inside = []
    for tier in cluster.tiers:
        nodes = max(tier.group_size // cluster.devices_per_node, 1)
        within = min(curve.ranks_per_node, tier.group_size)
        inside.append([min(float(within * nodes), float(curve.num_ranks))])
    inside[-1] = [float(curve.num_ranks)]
    return Groups(np.array([float(curve.num_ranks)]), np.array(inside), np.array([curve.ranks_per_node]))


def _read(curve: CollectiveCurve, num_bytes: FloatArray) -> FloatArray:
    sizes, times = np.array(curve.message_bytes), np.array(curve.expected_s)
    result = np.interp(num_bytes, sizes, times)
    # from end to end, since one slow sample would tilt the last segment by any factor
    slope = (times[-1] - times[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else times[0] / sizes[0]
    return np.asarray(np.where(num_bytes > sizes[-1], times[-1] + slope * (num_bytes - sizes[-1]), result))
