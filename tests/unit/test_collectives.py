"""Seconds of collectives, recomputed by hand.

The toy cluster is two nodes of four devices: 1 us and 10 GB/s inside a node, 10 us and 1 GB/s a device across.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meshwright.cost_models.collectives import groups_of, seconds, send_seconds
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.profiler.cluster import CollectiveCurve, LinkTier


def price(cluster: Any, op: str, num_bytes: float, axes: tuple[str, ...], order: Any = None, **degrees: Any) -> float:
    batch = ConfigBatch.from_configs([ParallelConfig(**degrees)])
    placement = Placement(order=order) if order else Placement()
    return float(seconds(cluster, op, groups_of(batch, cluster, placement, *axes), num_bytes)[0])


def test_groups_of_the_default_order(toy: Any) -> None:
    batch = ConfigBatch.from_configs(
        [ParallelConfig(tp=2, dp=4), ParallelConfig(tp=4, dp=2), ParallelConfig(dp=8), ParallelConfig(tp=2, pp=2, dp=2)]
    )
    cluster = toy.cluster()  # two nodes of four
    tp, dp = (groups_of(batch, cluster, Placement(), axis) for axis in ("tp", "dp"))
    assert tp.inside.tolist() == [[2, 4, 1, 2], [2, 4, 1, 2]]
    assert dp.inside.tolist() == [[2, 1, 4, 2], [4, 2, 8, 2]]  # tp 2: every other device, two of them on a node
    assert dp.per_node.tolist() == [2, 1, 4, 2]


def test_groups_of_another_order(toy: Any) -> None:
    batch = ConfigBatch.from_configs([ParallelConfig(tp=2, dp=4)])
    groups = groups_of(batch, toy.cluster(), Placement(order=("dp", "cp", "tp", "pp")), "tp")
    assert groups.inside.tolist() == [[1], [2]]  # dp is next to each other, tp peers are on two nodes


def test_joined_axes_make_one_group(toy: Any) -> None:
    batch = ConfigBatch.from_configs([ParallelConfig(tp=2, cp=2, cp_ring=2, dp=2)])
    groups = groups_of(batch, toy.cluster(), Placement(), "dp", "cp")
    assert (groups.size.tolist(), groups.inside[0].tolist()) == ([4], [2])


def test_a_group_of_one_and_an_empty_message_cost_nothing(toy: Any) -> None:
    assert price(toy.cluster(), "all_reduce", 1e9, ("tp",), dp=8) == 0.0
    assert price(toy.cluster(), "all_reduce", 0.0, ("dp",), dp=8) == 0.0


def test_ring_inside_a_node(toy: Any) -> None:
    # all_gather of 4 ranks: 3 hops and 3/4 of the tensor over one device's link
    assert price(toy.cluster(), "all_gather", 4e6, ("tp",), tp=4) == pytest.approx(3 * 1e-6 + 0.75 * 4e6 / 1e10)
    assert price(toy.cluster(), "reduce_scatter", 4e6, ("tp",), tp=4) == pytest.approx(3 * 1e-6 + 0.75 * 4e6 / 1e10)
    # all_reduce, large: a ring does both
    assert price(toy.cluster(), "all_reduce", 4e6, ("tp",), tp=4) == pytest.approx(6 * 1e-6 + 1.5 * 4e6 / 1e10)


def test_a_broadcast_passes_whole_messages_along_a_ring(toy: Any) -> None:
    # 3 hops, each 2.5 times as slow as those of short messages, and all of the tensor over one device's link
    assert price(toy.cluster(), "broadcast", 4e6, ("tp",), tp=4) == pytest.approx(3 * 2.5e-6 + 4e6 / 1e10)


def test_a_tree_for_a_small_all_reduce_across_nodes(toy: Any) -> None:
    # one rank on each of 8 nodes: 2 log2(8) latencies up and down instead of 14, and twice the message
    cluster = toy.cluster(num_nodes=8)
    assert price(cluster, "all_reduce", 8.0, ("dp",), tp=4, dp=8) == pytest.approx(6 * 1e-5 + 16 / 1e9)
    # between two nodes the ring is as quick, with half of the bytes
    assert price(cluster, "all_reduce", 8.0, ("dp",), tp=4, dp=2) == pytest.approx(2 * 1e-5 + 8 / 1e9)
    # inside a node a chain, up and down: 2 * 3 hops and twice the message, which the ring beats
    assert price(cluster, "all_reduce", 8.0, ("tp",), tp=4) == pytest.approx(6 * 1e-6 + 1.5 * 8 / 1e10)
    # whole nodes: the chain of 4 inside, the tree across, four devices' share of the network
    assert price(cluster, "all_reduce", 8.0, ("dp",), dp=32) == pytest.approx(6 * 1e-6 + 6 * 1e-5 + 16 / 4e9)


def test_one_rank_a_node_has_its_share_of_the_network(toy: Any) -> None:
    # two ranks on two nodes; contended rate, since four such groups cross at once
    assert price(toy.cluster(), "all_gather", 1e6, ("dp",), tp=4, dp=2) == pytest.approx(1e-5 + 0.5 * 1e6 / 1e9)


def test_a_group_that_owns_its_nodes_uses_all_their_links(toy: Any) -> None:
    # 8 ranks, 4 on each of 2 nodes: a ring crosses nodes once (1 of 7 hops), 4 GB/s there, 10 GB/s inside
    assert price(toy.cluster(), "all_gather", 1e9, ("dp",), dp=8) == pytest.approx(1e-5 + 6 * 1e-6 + 7 / 8 * 1e9 / 4e9)
    # two of the four devices of each node: half of the ports
    assert price(toy.cluster(), "all_gather", 1e9, ("dp",), tp=2, dp=4) == pytest.approx(1e-5 + 2e-6 + 0.75 * 1e9 / 2e9)


def test_fewer_ports_than_devices(toy: Any) -> None:
    # one port of 1 GB/s for four devices: a group that owns the nodes has it whole, four groups divide it
    cluster = toy.cluster()
    network = replace(cluster.tiers[1], contended_bytes_per_s=0.25e9)
    cluster = replace(cluster, tiers=(cluster.tiers[0], network))
    assert price(cluster, "all_gather", 1e9, ("dp",), dp=8) == pytest.approx(1.6e-5 + 7 / 8 * 1e9 / 1e9)
    assert price(cluster, "all_gather", 1e9, ("dp",), tp=4, dp=2) == pytest.approx(1e-5 + 0.5 * 1e9 / 0.25e9)
    # all four send to the next stage, or the last of four stages alone
    assert send_seconds(cluster, 0, 4, 1e9) == pytest.approx(1e-5 + 4.0)
    assert send_seconds(cluster, 3, 4, 1e9) == pytest.approx(1e-5 + 1.0)
    assert send_seconds(cluster, 2, 4, 1e9) == pytest.approx(1e-5 + 2.0)


def test_all_to_all_sends_most_of_it_across(toy: Any) -> None:
    # 8 ranks on 2 nodes: half of each rank's input leaves the node at its own share of the network; one latency a tier
    expected = 1e-5 + 1e-6 + 0.5 * 1e8 / 1e9
    assert price(toy.cluster(), "all_to_all", 1e8, ("dp",), dp=8) == pytest.approx(expected)
    # 12 of 15 peers are on other nodes: two rounds of eight
    wide = toy.cluster(num_nodes=4)
    assert price(wide, "all_to_all", 1e8, ("dp",), dp=16) == pytest.approx(2e-5 + 1e-6 + 0.75 * 1e8 / 1e9)


def test_what_a_call_costs_and_how_it_ramps(toy: Any) -> None:
    cluster = toy.cluster()
    node = replace(cluster.tiers[0], launch_s=5e-6, half_bytes=1e6, copy_hops=1.0)
    cluster = replace(cluster, tiers=(node, cluster.tiers[1]))
    # 3 hops and its own chunk: the whole 4 MB over the wire; sqrt(4 MB * 1 MB) = 2 MB of ramp
    assert price(cluster, "all_gather", 4e6, ("tp",), tp=4) == pytest.approx(5e-6 + 3e-6 + 6e6 / 1e10)
    # half of the rate at half_bytes on the wire
    assert price(cluster, "all_gather", 1e6, ("tp",), tp=4) == pytest.approx(5e-6 + 3e-6 + 2e6 / 1e10)
    assert send_seconds(cluster, 0, 1, 1e6) == pytest.approx(5e-6 + 1e-6 + 2e6 / 1e10)
    # a group that doesn't cross this tier knows nothing of it
    assert price(cluster, "all_gather", 1e6, ("dp",), tp=4, dp=2) == pytest.approx(1e-5 + 0.5 * 1e6 / 1e9)


def test_a_switch_that_reduces(toy: Any) -> None:
    cluster = toy.cluster()
    node = replace(cluster.tiers[0], reduction_bytes_per_s=1e10)
    inside = replace(cluster, tiers=(node, cluster.tiers[1]))
    # the buffer once instead of 1.5 times; a ring still for what doesn't reduce
    assert price(inside, "all_reduce", 1e9, ("tp",), tp=4) == pytest.approx(6e-6 + 0.1)
    assert price(inside, "reduce_scatter", 1e9, ("tp",), tp=4) == pytest.approx(3e-6 + 0.075)
    network = replace(cluster.tiers[1], reduction_bytes_per_s=1e9)
    across = replace(toy.cluster(num_nodes=8), tiers=(node, replace(network, group_size=32)))
    # one rank a node: up to the switch and down again
    assert price(across, "all_reduce", 1e9, ("dp",), tp=4, dp=8) == pytest.approx(2e-5 + 1.0)
    # whole nodes: a quarter of the sum from each device
    assert price(across, "all_reduce", 1e9, ("dp",), dp=32) == pytest.approx(6e-6 + 2e-5 + 0.25)


def test_two_nodes_that_reduce_in_their_switches_send_once_each(toy: Any) -> None:
    cluster = toy.cluster()
    node = replace(cluster.tiers[0], reduction_bytes_per_s=1e10)
    inside = replace(cluster, tiers=(node, cluster.tiers[1]))
    # 8 ranks: 0.1 s inside, 0.25 s across at four devices' rate, one after the other in a pipeline; a ring has 1.75 / 4
    assert price(inside, "all_reduce", 1e9, ("dp",), dp=8) == pytest.approx(6e-6 + 2e-5 + 0.25)
    assert price(cluster, "all_reduce", 1e9, ("dp",), dp=8) == pytest.approx(2 * (1e-5 + 6e-6) + 1.75 / 4)


def test_congestion_grows_with_the_nodes_that_a_tree_or_an_exchange_joins(toy: Any) -> None:
    cluster = toy.cluster(num_nodes=16)
    network = replace(cluster.tiers[1], congestion=0.5)
    cluster = replace(cluster, tiers=(cluster.tiers[0], network))
    # a small all_reduce: 2 log2(16) levels, twice the message at a quarter of the rate
    assert price(cluster, "all_reduce", 64.0, ("dp",), tp=4, dp=16) == pytest.approx(8e-5 + 4 * 128 / 1e9)
    # a large one runs on the ring, whose neighbours keep to themselves
    assert price(cluster, "all_reduce", 1e8, ("dp",), tp=4, dp=16) == pytest.approx(30e-5 + 1.875 * 0.1)
    assert price(cluster, "all_gather", 1e6, ("dp",), tp=4, dp=16) == pytest.approx(15e-5 + 15 / 16 * 1e-3)
    # 15 peers in two rounds
    assert price(cluster, "all_to_all", 1e6, ("dp",), tp=4, dp=16) == pytest.approx(2e-5 + 4 * 15 / 16 * 1e-3)
    assert send_seconds(cluster, 0, 4, 1e6) == pytest.approx(1e-5 + 1e-3)


def test_a_port_that_is_busy_with_each_chunk(toy: Any) -> None:
    cluster = toy.cluster()
    network = replace(cluster.tiers[1], step_s=5e-5)
    cluster = replace(cluster, tiers=(cluster.tiers[0], network))
    # 8 ranks on 2 nodes: 7 steps, in each of which a chunk crosses
    assert price(cluster, "all_gather", 1e3, ("dp",), dp=8) == pytest.approx(7 * 5e-5 + 7 / 8 * 1e3 / 4e9)
    assert price(cluster, "all_gather", 1e3, ("dp",), tp=4, dp=2) == pytest.approx(5e-5 + 0.5 * 1e3 / 1e9)
    # an all_reduce takes the tree: 2 * 3 hops inside, 2 across
    assert price(cluster, "all_reduce", 1e3, ("dp",), dp=8) == pytest.approx(6e-6 + 2e-5 + 2e3 / 4e9)
    # inside a node nothing waits for the network
    assert price(cluster, "all_gather", 1e3, ("tp",), tp=4) == pytest.approx(3e-6 + 0.75 * 1e3 / 1e10)
    assert send_seconds(cluster, 0, 4, 1e6) == pytest.approx(5e-5 + 1e-3)


def test_a_middle_tier(toy: Any) -> None:
    # nodes of 2 in racks of 4 in a cluster of 8; one rank on each of 4 nodes: 2 hops in a rack, 1 across
    def tier(name: str, size: int, latency: float, rate: float) -> LinkTier:
        return LinkTier(
            name=name,
            group_size=size,
            latency_s=latency,
            bytes_per_s=rate,
            contended_bytes_per_s=rate,
            source=toy.source,
        )

    tiers = (tier("node", 2, 1e-6, 1e10), tier("rack", 4, 1e-5, 1e9), tier("cluster", 8, 1e-4, 1e8))
    cluster = replace(toy.cluster(num_nodes=4, devices_per_node=2), tiers=tiers)
    ring = 2 * 1e-5 + 1e-4 + 0.75 * 1e6 / 2e8  # the rack's two ranks lay two rings across: 2 * 1e8
    assert price(cluster, "all_gather", 1e6, ("dp",), tp=2, dp=4) == pytest.approx(ring)


def curve(toy: Any, num_ranks: int, ranks_per_node: int, times: tuple[float, ...], op: Any = "all_gather") -> Any:
    return CollectiveCurve(
        op=op,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        message_bytes=(1e3, 1e5, 1e6),
        seconds=times,
        spread=(0.0, 0.0, 0.0),
        source=toy.source,
    )


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (10.0, 1e-3),  # below the smallest: its time
        (1e3, 1e-3),
        (50_500.0, 1.5e-3),  # half way between two sizes
        (1e6, 5e-3),
        (2e6, 5e-3 + 1e6 * 4e-3 / 9.99e5),  # beyond the largest: the slope from end to end
    ],
)
def test_a_measured_shape_is_read_off(toy: Any, num_bytes: float, expected: float) -> None:
    cluster = toy.cluster(collectives=[curve(toy, 4, 4, (1e-3, 2e-3, 5e-3))])
    assert price(cluster, "all_gather", num_bytes, ("tp",), tp=4) == pytest.approx(expected)
    assert price(cluster, "all_reduce", 8.0, ("tp",), tp=4) == pytest.approx(6e-6 + 1.2e-9)  # no curve of it


def test_a_step_pays_the_mean_where_it_was_measured(toy: Any) -> None:
    unsteady = replace(curve(toy, 4, 4, (1e-3, 2e-3, 5e-3)), mean_s=(2e-3, 4e-3, 6e-3))
    assert price(toy.cluster(collectives=[unsteady]), "all_gather", 1e5, ("tp",), tp=4) == pytest.approx(4e-3)


def test_one_device_has_nobody_to_talk_to(toy: Any) -> None:
    alone = replace(toy.cluster(num_nodes=1, devices_per_node=1), tiers=())
    assert price(alone, "all_reduce", 1e6, ("dp",)) == 0.0


def test_the_nearest_shape_is_scaled_by_latency_and_by_slope(toy: Any) -> None:
    # 2 ranks in a node from 4: a third of the latency (1 hop of 3), two thirds of the slope (1/2 of 3/4)
    cluster = toy.cluster(collectives=[curve(toy, 4, 4, (3e-3, 6e-3, 9e-3)), curve(toy, 8, 4, (1.0, 1.0, 1.0))])
    assert price(cluster, "all_gather", 1e5, ("tp",), tp=2) == pytest.approx(1e-3 + 3e-3 * 2 / 3)


def test_a_group_across_nodes_prefers_a_curve_measured_across(toy: Any) -> None:
    cluster = toy.cluster(collectives=[curve(toy, 2, 2, (1e-6, 2e-6, 3e-6)), curve(toy, 8, 4, (1e-2, 2e-2, 3e-2))])
    assert price(cluster, "all_gather", 1e5, ("dp",), tp=4, dp=2) > 1e-3


def test_sends_cross_the_innermost_tier_that_holds_both(toy: Any) -> None:
    got = send_seconds(toy.cluster(), np.array([0, 3, 2]), np.array([3, 4, 2]), 1e6)
    assert got == pytest.approx([1e-6 + 1e-4, 1e-5 + 1e-3, 0.0])
    assert send_seconds(toy.cluster(), 0, 4, 0.0) == 0.0
