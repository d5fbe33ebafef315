"""The algorithms by which a collective crosses tiers of links, and what each costs.

A message of ``B`` bytes sends ``f_j * B`` bytes of one device over tier ``j``. At that tier's rate ``r_j`` this is
``x = f_j * B / r_j`` seconds of wire, and with the ramp of a protocol that fills its pipeline in ever larger pieces

    t_j = N_j^congestion * (x + sqrt(x * half_bytes / r_j)),

so that ``half_bytes`` on the wire reach half of the rate; ``N_j`` is the number of lower domains (nodes) that the group
joins at this tier, and the slowdown is that of trees and all_to_all: a ring's neighbours keep to themselves. The square
root is what measured tables show between 100 KB and 1 GB (``benchmarks/fit_collectives.py`` prints residuals); a plain
alpha-beta line has ``half_bytes = 0``. Stages of one algorithm are pipelined: the slowest tier counts. A call costs
``launch_s`` besides, and the latency of its hops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.profiler.cluster import ClusterProfile, LinkTier

FloatArray = NDArray[np.float64]

# a large message travels by NCCL's Simple protocol, whose hops take 1.8 (NVLink) to 3.5 times (network) those of LL128
# that ``latency_s`` stands for (src/graph/tuning.cc, hwLat): what a broadcast waits for, all of whose hops follow each
# other, where other collectives pass pieces on all links at once
_SIMPLE = 2.5
PEERS_AT_ONCE = 8  # sends that one point-to-point kernel of NCCL serves together (src/include/device.h)


@dataclass(frozen=True, slots=True)
class Leg:
    """One algorithm's traffic over one tier: arrays of shape ``[num_configs]``.

    ``share`` is the bytes of one device over the tier for each byte of the message, ``bytes_per_s`` the rate they
    have, ``slowdown`` what congestion multiplies, ``half_bytes`` the ramp's.
    """

    share: FloatArray
    slowdown: FloatArray
    bytes_per_s: float
    half_bytes: float

    def seconds(self, num_bytes: FloatArray) -> FloatArray:
        """Seconds that ``num_bytes`` of the whole message need on this tier."""
        wire = self.share * num_bytes / self.bytes_per_s
        return np.asarray(self.slowdown * (wire + np.sqrt(wire * (self.half_bytes / self.bytes_per_s))))

    def seconds_per_byte(self) -> FloatArray:
        """The slope for a huge message, of which the ramp is no part."""
        return np.asarray(self.slowdown * self.share / self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to run a collective: seconds of launch and hops, and its traffic tier by tier."""

    latency_s: FloatArray
    legs: tuple[Leg, ...]

    def seconds(self, num_bytes: FloatArray) -> FloatArray:
        """Seconds of one call on ``num_bytes``."""
        return np.asarray(self.latency_s + np.max([leg.seconds(num_bytes) for leg in self.legs], axis=0))

    def seconds_per_byte(self) -> FloatArray:
        """The slope for a huge message."""
        return np.asarray(np.max([leg.seconds_per_byte() for leg in self.legs], axis=0))


def algorithms(cluster: ClusterProfile, op: str, size: FloatArray, inside: FloatArray) -> tuple[Algorithm, ...]:
    """Every way that ``op`` may run on groups of ``size`` ranks, ``inside[j]`` of them in one domain of tier ``j``.

    ``size`` has shape ``[num_configs]``, ``inside`` ``[num_tiers, num_configs]``.

    * ring (all ops but all_to_all): ``n - 1`` hops, twice for all_reduce, of which ``D_(j-1) - D_j`` cross tier ``j``
      (``D_j`` domains of tier ``j``, ``D_(-1) = n``); but as many steps, in each of which every link passes a chunk on:
      where a port is busy with a chunk for ``step_s``, they cost that each (256 MiB gathered by 64 to 512 ranks of EFA
      take 36 to 45 us a step; over InfiniBand the hops' latencies are all there is). A group with ``m`` ranks in each
      lower domain lays ``m`` rings (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-cross-nic),
      so that each device carries an ``m``-th of ``(n - 1) / n`` of the message; ``copy_hops`` adds the handling of its
      own chunk. Each byte crosses the network with every ring, so an all_gather over nodes has no cheaper,
      hierarchical, way here: NCCL has none.
    * tree (all_reduce alone, NCCL broadcasts along rings): hierarchical, a chain inside the innermost domain and
      ``log2`` levels across those outside, as NCCL prices it (src/graph/tuning.cc); double trees (Sanders, Speck and
      Traeff 2009, doi:10.1016/j.parco.2009.09.001) send twice the message from each device.
    * switch (all_reduce where the innermost tier or the network reduces, NVLink SHARP and SHARP): each device sends
      its buffer once and receives the sum; tiers that don't reduce run the tree, with half of the traffic between two
      domains, each of which sends one direction only. (Plain trees should, too; two nodes of A100 take a ring's time:
      8.2 ms for 403 MB at 96 GB/s, vTrain's runs with tp = 16.) Small messages take the chain's latency inside a
      domain, as measured.
    * direct (all_to_all): every rank to every other, ``PEERS_AT_ONCE`` at a time; what leaves a domain crosses the
      tier at the device's own share.
    """
    if op == "all_to_all":
        return (_direct(cluster, size, inside),)
    ring, tree = _ring(cluster, op, size, inside), _tree(cluster, size, inside, reducing=False)
    if op != "all_reduce":
        return (ring,)
    if any(tier.reduction_bytes_per_s is not None for tier in cluster.tiers):
        return ring, tree, _tree(cluster, size, inside, reducing=True)
    return ring, tree


def _slowdown(tier: LinkTier, domains: FloatArray) -> FloatArray:
    """What congestion makes of a time at this tier, over a group that joins ``domains`` lower domains."""
    return np.asarray(np.maximum(domains, 1.0) ** tier.congestion)


def _crossings(cluster: ClusterProfile, inside: FloatArray) -> list[tuple[LinkTier, FloatArray, FloatArray]]:
    """Each tier with the ranks in one lower domain and the number of lower domains it joins (1: not crossed)."""
    below = np.vstack([np.ones_like(inside[:1]), inside[:-1]])
    return [
        (tier, low, np.maximum(high / low, 1.0)) for tier, low, high in zip(cluster.tiers, below, inside, strict=True)
    ]


def _launch(cluster: ClusterProfile, inside: FloatArray) -> FloatArray:
    crossings = _crossings(cluster, inside)
    return np.asarray(np.max([np.where(joined > 1, tier.launch_s, 0.0) for tier, _, joined in crossings], axis=0))


def _ring(cluster: ClusterProfile, op: str, size: FloatArray, inside: FloatArray) -> Algorithm:
    rounds = 2.0 if op == "all_reduce" else 1.0
    hops, steps, legs = np.zeros_like(size), np.zeros_like(size), []
    for tier, low, joined in _crossings(cluster, inside):
        hop_s = tier.latency_s * (_SIMPLE if op == "broadcast" else 1.0)
        hops = hops + rounds * size / low * (1.0 - 1.0 / joined) * hop_s
        steps = np.maximum(steps, np.where(joined > 1, rounds * (size - 1.0) * tier.step_s, 0.0))
        sent = 1.0 if op == "broadcast" else (rounds * (size - 1.0) + tier.copy_hops) / size
        share = np.where(joined > 1, sent / low, 0.0)
        legs.append(Leg(share, np.ones_like(size), tier.contended_bytes_per_s, tier.half_bytes))
    return Algorithm(_launch(cluster, inside) + np.maximum(hops, steps), tuple(legs))


def _tree(cluster: ClusterProfile, size: FloatArray, inside: FloatArray, *, reducing: bool) -> Algorithm:
    latency, legs = _launch(cluster, inside), []
    for place, (tier, low, joined) in enumerate(_crossings(cluster, inside)):
        slow = _slowdown(tier, joined)
        in_switch = reducing and tier.reduction_bytes_per_s is not None
        levels = joined - 1.0 if place == 0 else np.minimum(np.ceil(np.log2(joined)), 1.0 if in_switch else np.inf)
        latency = latency + 2.0 * levels * tier.latency_s
        if in_switch:
            assert tier.reduction_bytes_per_s is not None
            sent, rate = np.ones_like(size), tier.reduction_bytes_per_s
        else:
            sent, rate = np.where(reducing & (joined <= 2), 1.0, 2.0), tier.contended_bytes_per_s
        legs.append(Leg(np.where(joined > 1, sent / low, 0.0), slow, rate, tier.half_bytes))
    return Algorithm(latency, tuple(legs))


def _direct(cluster: ClusterProfile, size: FloatArray, inside: FloatArray) -> Algorithm:
    latency, legs = _launch(cluster, inside), []
    for tier, low, joined in _crossings(cluster, inside):
        slow = _slowdown(tier, joined)
        peers = low * (joined - 1.0)
        latency = latency + np.ceil(peers / PEERS_AT_ONCE) * tier.latency_s
        leaves = np.where(joined > 1, (size - low + tier.copy_hops) / size, 0.0)
        legs.append(Leg(leaves, slow, tier.contended_bytes_per_s, tier.half_bytes))
    return Algorithm(latency, tuple(legs))
