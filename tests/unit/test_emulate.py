"""Topology files and what ranks are told; nothing here starts a namespace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from meshwright import InputError
from meshwright.profiler import namespaces
from meshwright.profiler.emulate import host_environment, rank_environment
from meshwright.profiler.namespaces import HostNamespaces, emulation_available
from meshwright.profiler.topology_file import EmulatedHost, EmulatedPair, EmulatedTopology, load_topology

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_hosts.json"


def uneven() -> EmulatedTopology:
    return EmulatedTopology(
        hosts=(
            EmulatedHost(name="a", devices=1, device="virtual:h100/1000"),
            EmulatedHost(name="b", devices=2, uplink_bytes_per_s=3e6),
            EmulatedHost(name="c", devices=1),
        ),
        bytes_per_s=1e6,
        pairs=(EmulatedPair(hosts=("c", "a"), bytes_per_s=4e6),),
    )


def test_the_example_reads() -> None:
    topology = load_topology(EXAMPLE)
    assert (topology.num_ranks, topology.pair_bytes_per_s(0, 1)) == (8, 25e6)


def test_ranks_go_through_the_hosts_in_order() -> None:
    topology = uneven()
    assert [topology.host_of(rank) for rank in range(4)] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert topology.pair_bytes_per_s(0, 2) == topology.pair_bytes_per_s(2, 0) == 4e6
    assert topology.pair_bytes_per_s(0, 1) == 1e6


def test_a_rank_is_told_who_it_is() -> None:
    last_of_b = rank_environment(uneven(), 2)
    expected = {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    assert expected.items() <= last_of_b.items()
    assert last_of_b["MESHWRIGHT_HOST"] == "b"
    assert last_of_b["MASTER_ADDR"] == "10.77.0.1"
    assert "MESHWRIGHT_DEVICE" not in last_of_b
    assert rank_environment(uneven(), 0)["MESHWRIGHT_DEVICE"] == "virtual:h100/1000"
    assert {"PET_NNODES": "3", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "2"}.items() <= host_environment(
        uneven(), 1
    ).items()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hosts": []}, "1 to 250 hosts, found 0"),
        ({"bytes_per_s": 10.0}, "at least 1000 bytes a second, found 10"),
        ({"bytes_per_s": "25MB/s"}, "bytes_per_s: input should be a valid number"),
        ({"hosts": [{"name": "a", "devices": 1}, {"name": "a", "devices": 1}]}, "host 'a' is named twice"),
        ({"hosts": [{"name": "a b", "devices": 1}]}, "letters, digits, dots and dashes, found 'a b'"),
        ({"hosts": [{"name": "a", "devices": 0}]}, "host a must have at least 1 device, found 0"),
        ({"hosts": [{"name": "a", "devices": 1, "device": "h100"}]}, "cannot read 'h100' as a virtual device"),
        ({"pairs": [{"hosts": ["host-a", "x"], "bytes_per_s": 1e6}]}, "names host 'x', hosts are host-a, host-b"),
        ({"pairs": [{"hosts": ["host-a", "host-a"], "bytes_per_s": 1e6}]}, "found 'host-a' twice"),
        (
            {"pairs": 2 * [{"hosts": ["host-a", "host-b"], "bytes_per_s": 1e6}]},
            "the pair host-a and host-b is given twice",
        ),
        ({"latency_s": 1.0}, "latency_s: "),
        ({"schema_version": 2}, "schema_version is 2"),
    ],
)
def test_bad_topologies(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(json.loads(EXAMPLE.read_text()) | change))
    with pytest.raises(InputError, match=words):
        load_topology(path)


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation_available.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "tc" else f"/sbin/{program}")
    try:
        assert emulation_available() == "the program 'tc' is missing: install iproute2"
        with pytest.raises(InputError, match="cannot emulate hosts on this machine: the program 'tc'"):
            HostNamespaces(uneven()).__enter__()
    finally:
        emulation_available.cache_clear()


def test_a_refused_namespace_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise PermissionError(1, "Operation not permitted")

    emulation_available.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda program: f"/sbin/{program}")
    monkeypatch.setattr(namespaces, "_new_namespace", refuse)
    try:
        assert "needs root" in (emulation_available() or "")
    finally:
        emulation_available.cache_clear()
