"""Laws of collectives, over random links with every term, and over the presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import load_cluster
from meshwright.cost_models.collectives import Groups, groups_of, seconds, send_seconds
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.profiler.cluster import ClusterProfile, LinkTier
from meshwright.profiler.cluster_presets import preset_names

LAWS = settings(max_examples=60, deadline=None)
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
NODES, PER_NODE, RACK = 16, 8, 32
BYTES = st.floats(1.0, 1e10)
DEGREES = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def links(draw: Any, toy: Any, name: str, size: int) -> LinkTier:
    rate = draw(st.floats(1e8, 1e12))
    return LinkTier(
        name=name,
        group_size=size,
        latency_s=draw(st.floats(0.0, 1e-4)),
        bytes_per_s=rate,
        contended_bytes_per_s=rate * draw(st.sampled_from([1.0, 0.5, 0.125])),
        launch_s=draw(st.sampled_from([0.0, 5e-6])),
        half_bytes=draw(st.sampled_from([0.0, 1e5, 1e7])),
        copy_hops=draw(st.floats(0.0, 1.0)),
        step_s=draw(st.sampled_from([0.0, 1e-5, 1e-4])),
        congestion=draw(st.sampled_from([0.0, 0.4, 1.0])),
        reduction_bytes_per_s=draw(st.sampled_from([None, rate, 0.7 * rate])),
        source=toy.source,
    )


@st.composite
def clusters(draw: Any, toy: Any) -> ClusterProfile:
    sizes = draw(st.sampled_from([(PER_NODE, RACK, NODES * PER_NODE), (PER_NODE, NODES * PER_NODE)]))
    tiers = tuple(draw(links(toy, f"tier{place}", size)) for place, size in enumerate(sizes))
    return replace(toy.cluster(num_nodes=NODES, devices_per_node=PER_NODE), tiers=tiers)


def groups(cluster: ClusterProfile, slower: int, *degrees: int) -> Groups:
    """Data-parallel groups of each degree, one device in ``slower``: tensor parallelism has the faster places."""
    configs = [ParallelConfig(tp=slower, dp=degree) for degree in degrees]
    return groups_of(ConfigBatch.from_configs(configs), cluster, Placement(), "dp")


@LAWS
@given(data=st.data(), op=st.sampled_from(OPS), stride=DEGREES, degree=DEGREES, small=BYTES, factor=st.floats(1, 1e4))
def test_more_bytes_are_never_faster(
    toy: Any, data: Any, op: str, stride: int, degree: int, small: float, factor: float
) -> None:
    cluster = data.draw(clusters(toy))
    joined = groups(cluster, stride, degree)
    assert seconds(cluster, op, joined, small) <= seconds(cluster, op, joined, small * factor) * (1 + 1e-12)
    sends = send_seconds(cluster, 0, stride * (degree - 1), np.array([small, small * factor]))
    assert sends[0] <= sends[1]


@LAWS
@given(data=st.data(), op=st.sampled_from(OPS), stride=DEGREES, num_bytes=BYTES)
def test_larger_groups_are_never_faster(toy: Any, data: Any, op: str, stride: int, num_bytes: float) -> None:
    cluster = data.draw(clusters(toy))
    times = seconds(cluster, op, groups(cluster, stride, 1, 2, 4, 8), num_bytes)
    assert times[0] == 0.0
    assert (np.diff(times) >= -1e-12 * times[:-1]).all()


@LAWS
@given(
    data=st.data(), op=st.sampled_from(OPS), stride=DEGREES, degree=DEGREES, num_bytes=BYTES, factor=st.floats(1, 99)
)
def test_a_better_link_is_never_slower(
    toy: Any, data: Any, op: str, stride: int, degree: int, num_bytes: float, factor: float
) -> None:
    cluster = data.draw(clusters(toy))
    place = data.draw(st.integers(0, len(cluster.tiers) - 1))
    tier = cluster.tiers[place]
    better = data.draw(
        st.sampled_from(
            [
                replace(tier, latency_s=tier.latency_s / factor, step_s=tier.step_s / factor),
                replace(
                    tier,
                    bytes_per_s=tier.bytes_per_s * factor,
                    contended_bytes_per_s=tier.contended_bytes_per_s * factor,
                ),
                replace(tier, half_bytes=tier.half_bytes / factor, launch_s=tier.launch_s / factor),
                replace(tier, congestion=tier.congestion / factor, copy_hops=tier.copy_hops / factor),
                replace(tier, reduction_bytes_per_s=(tier.reduction_bytes_per_s or tier.bytes_per_s) * factor),
            ]
        )
    )
    after = replace(cluster, tiers=(*cluster.tiers[:place], better, *cluster.tiers[place + 1 :]))
    joined = groups(cluster, stride, degree)
    assert seconds(after, op, joined, num_bytes) <= seconds(cluster, op, joined, num_bytes) * (1 + 1e-12)
    last = stride * max(degree - 1, 0)
    assert send_seconds(after, 0, last, num_bytes) <= send_seconds(cluster, 0, last, num_bytes) * (1 + 1e-12)


@LAWS
@given(data=st.data(), stride=DEGREES, degree=DEGREES, num_bytes=BYTES)
def test_all_reduce_costs_at_most_its_two_halves(
    toy: Any, data: Any, stride: int, degree: int, num_bytes: float
) -> None:
    cluster = data.draw(clusters(toy))
    joined = groups(cluster, stride, degree)
    whole, scatter, gather = (
        seconds(cluster, op, joined, num_bytes) for op in ("all_reduce", "reduce_scatter", "all_gather")
    )
    assert whole <= (scatter + gather) * (1 + 1e-12)


@LAWS
@given(degree=st.sampled_from([2, 4, 8]), num_bytes=BYTES, latency=st.floats(1e-9, 1e-3), rate=st.floats(1e6, 1e12))
def test_on_plain_ring_links_it_costs_exactly_its_two_halves(
    toy: Any, degree: int, num_bytes: float, latency: float, rate: float
) -> None:
    cluster = toy.cluster(num_nodes=1, devices_per_node=8, node=(latency, rate))
    joined = groups(cluster, 1, degree)
    whole, scatter, gather = (
        seconds(cluster, op, joined, num_bytes) for op in ("all_reduce", "reduce_scatter", "all_gather")
    )
    assert whole == pytest.approx(scatter + gather, rel=1e-12)


@pytest.mark.parametrize("name", preset_names())
def test_the_laws_on_every_preset(name: str) -> None:
    cluster = load_cluster(f"{name}:16")
    sizes = np.geomspace(1e2, 1e10, 17)
    for stride in (1, 2, cluster.devices_per_node):
        degrees = [degree for degree in (1, 2, 4, 8, 16, 32, 64) if degree * stride <= cluster.num_devices]
        joined = groups(cluster, stride, *degrees)
        times = {op: np.array([seconds(cluster, op, joined, size) for size in sizes]) for op in OPS}
        for op, found in times.items():
            assert (np.diff(found, axis=0) >= 0).all(), op  # more bytes
            assert (np.diff(found, axis=1) >= -1e-12).all(), op  # larger groups
            assert not found[:, 0].any(), op
        assert (times["all_reduce"] <= times["reduce_scatter"] + times["all_gather"]).all()
