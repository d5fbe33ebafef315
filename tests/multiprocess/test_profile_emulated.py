"""Measured rates are right: emulated hosts joined at 200 Mbit/s, one rank and four ranks on each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch

from meshwright.profiler.clock import DeviceClock
from meshwright.profiler.cluster import LinkMatrix, Provenance, Source
from meshwright.profiler.emulate import emulate_ranks
from meshwright.profiler.findings import link_tiers
from meshwright.profiler.launch import Rank
from meshwright.profiler.links import LinkOptions, measure_links
from meshwright.profiler.namespaces import emulation_available
from meshwright.profiler.topology_file import EmulatedHost, EmulatedTopology

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(emulation_available() is not None, reason=f"no emulated hosts here: {emulation_available()}"),
]

RATE = 200e6 / 8
SOURCE = Source(provenance=Provenance.MEASURED, reference="a test")


def links_of(rank: Rank, nodes: list[list[int]], options: LinkOptions) -> LinkMatrix:
    torch.set_num_threads(1)
    return measure_links(nodes, DeviceClock(torch.device("cpu")), options, lambda done: None)[0]


def emulated(devices: int, options: LinkOptions) -> tuple[LinkMatrix, list[list[int]]]:
    hosts = tuple(EmulatedHost(name=f"host{place}", devices=devices) for place in range(2))
    topology = EmulatedTopology(hosts=hosts, bytes_per_s=RATE)
    nodes = [list(range(devices)), list(range(devices, 2 * devices))]
    matrices = emulate_ranks(topology, links_of, nodes, options, timeout_s=200)
    assert matrices[0] == matrices[-1]  # every rank knows all
    return matrices[0], nodes


def undisturbed(check: Callable[[], None]) -> None:
    """``check`` holds in one of three measurements: others on this machine disturb some, but cannot set one right."""
    for _ in range(2):
        with suppress(AssertionError):
            check()
            return
    check()


def test_bandwidth_of_a_pair_alone_is_within_5_percent() -> None:
    undisturbed(check_pair_alone)


def check_pair_alone() -> None:
    matrix, nodes = emulated(1, LinkOptions(message_s=0.2))
    for source, target in ((0, 1), (1, 0)):
        assert matrix.bytes_per_s[source][target] == pytest.approx(RATE, rel=0.05)
    (tier,) = link_tiers(matrix, nodes, SOURCE)
    assert (tier.name, tier.group_size) == ("cluster", 2)
    assert tier.bytes_per_s == pytest.approx(RATE, rel=0.05)


def test_shares_of_four_ranks_a_host_are_within_10_percent() -> None:
    undisturbed(check_shares)


def check_shares() -> None:
    matrix, nodes = emulated(4, LinkOptions(message_s=0.02, repeats=3))
    across = np.array(matrix.contended_bytes_per_s)[:4, 4:], np.array(matrix.contended_bytes_per_s)[4:, :4]
    for shares in across:
        assert shares == pytest.approx(np.full((4, 4), RATE / 4), rel=0.10)
    node, cluster = link_tiers(matrix, nodes, SOURCE)
    assert (node.group_size, cluster.group_size) == (4, 8)
    assert cluster.bytes_per_s == pytest.approx(RATE, rel=0.10)
    assert cluster.contended_bytes_per_s == pytest.approx(RATE / 4, rel=0.10)
    assert node.bytes_per_s > 4 * RATE  # messages inside a host do not pass the shaped link
