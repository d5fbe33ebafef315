"""Seconds of a collective on a group of ranks: measured where the profile has it, else from latency and bandwidth.

The model is alpha-beta (Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in
MPICH", doi:10.1177/1094342005051521), tier by tier, with what a real library adds: the cost of a call, a ramp over
message sizes, reduction in the switch and congestion over many nodes, each a figure of the tier (``LinkTier``) and
zero unless stated. A group of ``n`` ranks has ``m_j`` of them inside one domain of tier ``j``; ``links.py`` holds the
algorithms (ring, tree, switch, direct), the fastest of which is taken.

What contends with what: all groups of one axis communicate at the same time, and every device of a node is in one of
them, so that a device has its share of the node's network ports (``LinkTier.contended_bytes_per_s``) and a group with
``m`` ranks on a node ``m`` of those shares, all ports when it owns the node. Collectives of different axes don't slow
each other: a step runs them one after the other, or hides one behind compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.links import algorithms
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ConfigBatch, IntArray
from meshwright.profiler.cluster import ClusterProfile, CollectiveCurve, CollectiveOp, LinkTier

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
    in an aligned domain of ``G`` devices; where ``G`` is no multiple of ``s`` some groups have fewer. ``cp_ulysses``
    and ``cp_ring`` are the two axes of ``cp``, Ulysses groups being neighbours there. ``edp``, ``ep`` and ``etp`` fold
    the ranks of ``[dp, cp, tp]`` anew, ``etp`` fastest (``executors/mesh.py``): each is the axes it spans there, with
    the strides these have.
    """
    size = np.ones(len(batch), dtype=np.int64)
    sizes = [tier.group_size for tier in cluster.tiers] or [1]
    inside = np.ones((len(sizes), len(batch)), dtype=np.int64)
    per_node = np.ones(len(batch), dtype=np.int64)
    for degree, stride in _spans(batch, placement, axes):
        size = size * degree
        for row, domain in enumerate(sizes):
            inside[row] *= np.minimum(degree, np.maximum(domain // stride, 1))
        per_node = per_node * np.minimum(degree, np.maximum(cluster.devices_per_node // stride, 1))
    inside[-1] = size
    return Groups(size.astype(np.float64), np.minimum(inside, size).astype(np.float64), np.minimum(per_node, size))


def _spans(batch: ConfigBatch, placement: Placement, axes: tuple[str, ...]) -> list[tuple[IntArray, IntArray]]:
    """Degrees that make up the groups, and the devices between neighbours along each."""
    strides, stride = {}, np.ones(len(batch), dtype=np.int64)
    for axis in placement.order:
        strides[axis] = stride
        stride = stride * getattr(batch, axis)
    strides |= {"cp_ulysses": strides["cp"], "cp_ring": strides["cp"] * batch.cp_ulysses}
    found = [
        (getattr(batch, axis), strides[axis]) for axis in (*placement.order, "cp_ulysses", "cp_ring") if axis in axes
    ]
    below = np.ones(len(batch), dtype=np.int64)  # ranks of the stage between neighbours along the expert axis
    for folded in ("etp", "ep", "edp"):
        degree = np.maximum(getattr(batch, folded), 1)
        if folded in axes:
            first = np.ones(len(batch), dtype=np.int64)
            for axis in ("tp", "cp", "dp"):
                low, high = np.maximum(below, first), np.minimum(below * degree, first * getattr(batch, axis))
                found.append((np.maximum(high // low, 1), strides[axis] * np.maximum(low // first, 1)))
                first = first * getattr(batch, axis)
        below = below * degree
    return found


def seconds(cluster: ClusterProfile, op: str, groups: Groups, message_bytes: Any) -> FloatArray:
    """Seconds of one collective on every config's group; 0 for a group of one rank or an empty message.

    ``message_bytes`` is the whole tensor as ``CollectiveCurve`` defines it; it broadcasts against ``[num_configs]``.
    A measured curve of the very shape is read off (linear between sizes, the whole curve's slope beyond); of the
    nearest shape, its latency and its slope are scaled by the alpha-beta model's own. A profile without curves of the
    op falls back to the model of the tiers, in which all_reduce never costs more than reduce_scatter and all_gather in
    a row; measured curves are taken as they are.
    """
    if not cluster.tiers:  # one device
        return np.zeros(groups.size.shape)
    bytes_ = np.broadcast_to(np.asarray(message_bytes, dtype=np.float64), groups.size.shape)
    curves = [curve for curve in cluster.collectives if curve.op == op]
    result = _from_curves(cluster, op, curves, groups, bytes_) if curves else _modelled(cluster, op, groups, bytes_)
    return np.where((groups.size > 1) & (bytes_ > 0), result, 0.0)


def send_seconds(cluster: ClusterProfile, first: Any, second: Any, num_bytes: Any) -> FloatArray:
    """Seconds to send ``num_bytes`` from device ``first`` to device ``second`` while their neighbours do the same.

    Ranks ``s = |second - first|`` apart are peers of the same place in neighbouring stages, and the ``s`` devices from
    ``first`` on all send at once: where they are fewer than a lower domain (node) has, each has more than its share of
    the ports, up to what one pair reaches alone.
    """
    first, second, num_bytes = np.broadcast_arrays(first, second, np.asarray(num_bytes, dtype=np.float64))
    senders = np.maximum(np.abs(second - first), 1)
    result, lower = np.zeros(first.shape), [1, *(tier.group_size for tier in cluster.tiers[:-1])]
    for tier, low in reversed(list(zip(cluster.tiers, lower, strict=True))):  # the innermost that holds both is last
        together = first // tier.group_size == second // tier.group_size
        result = np.where(together, sent_seconds(tier, low / np.minimum(senders, low), num_bytes), result)
    return np.where((first == second) | (num_bytes == 0), 0.0, result)


def sent_seconds(tier: LinkTier, shares: Any, num_bytes: Any) -> FloatArray:
    """Seconds of a message over one tier, by a sender that has ``shares`` devices' parts of the ports there."""
    rate = np.minimum(tier.contended_bytes_per_s * shares, max(tier.bytes_per_s, tier.contended_bytes_per_s))
    wire = num_bytes / rate
    ramp = np.sqrt(wire * tier.half_bytes / rate)
    return np.asarray(tier.launch_s + np.maximum(tier.latency_s, tier.step_s) + wire + ramp)


def _modelled(cluster: ClusterProfile, op: str, groups: Groups, num_bytes: FloatArray) -> FloatArray:
    ways = algorithms(cluster, op, groups.size, groups.inside)
    return np.asarray(np.min([way.seconds(num_bytes) for way in ways], axis=0))


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
    """Seconds of an almost empty message, and seconds per byte of a huge one, by the model of the tiers."""
    ways = algorithms(cluster, op, groups.size, groups.inside)
    latency, per_byte = ([way.latency_s for way in ways], [way.seconds_per_byte() for way in ways])
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
