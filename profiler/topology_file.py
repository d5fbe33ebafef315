"""A rehearsed cluster as a file: hosts, the devices each one pretends to have, and the rate between each two.

Rates are what a message sees (payload), in each direction at once; ``emulate`` makes them so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from meshwright import InputError
from meshwright.profiler import artifact
from meshwright.profiler.record import record
from meshwright.profiler.virtual_name import split_virtual_name

TOPOLOGY_SCHEMA_VERSION = 1
MAX_HOSTS = 250

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@record
class EmulatedHost:
    """One host: a network namespace with ``devices`` ranks.

    ``device`` is the virtual device of each rank (``virtual:h100/1000``), or None for this machine's real processor.
    ``cores`` are the processors its ranks may run on, empty for all. ``uplink_bytes_per_s`` limits what all its ranks
    send to other hosts together, and what they receive; ``intra_bytes_per_s`` what they send each other, all together.
    None is no limit.
    """

    name: str
    devices: int
    device: str | None = None
    cores: tuple[int, ...] = ()
    uplink_bytes_per_s: float | None = None
    intra_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if not _HOST_NAME.fullmatch(self.name):
            raise InputError(f"a host's name is letters, digits, dots and dashes, found {self.name!r}")
        if self.devices < 1:
            raise InputError(f"host {self.name} must have at least 1 device, found {self.devices}")
        if self.device is not None:
            split_virtual_name(self.device)
        _check_rate(f"uplink_bytes_per_s of host {self.name}", self.uplink_bytes_per_s)
        _check_rate(f"intra_bytes_per_s of host {self.name}", self.intra_bytes_per_s)


@record
class EmulatedPair:
    """The rate between two hosts, in each direction, where it differs from the topology's own."""

    hosts: tuple[str, str]
    bytes_per_s: float

    def __post_init__(self) -> None:
        if self.hosts[0] == self.hosts[1]:
            raise InputError(
                f"a pair joins two hosts, found {self.hosts[0]!r} twice; set its intra_bytes_per_s instead"
            )
        _check_rate(f"bytes_per_s between {self.hosts[0]} and {self.hosts[1]}", self.bytes_per_s)


@record
class EmulatedTopology:
    """Hosts, ranks numbered through them in order, joined at ``bytes_per_s`` but for the ``pairs`` named.

    Raises ``InputError`` for a host named twice, a pair that names an unknown host or comes twice, or a rate below
    1 kB/s, under which no message would end.
    """

    artifact: Literal["topology"] = "topology"
    schema_version: int = TOPOLOGY_SCHEMA_VERSION
    hosts: tuple[EmulatedHost, ...]
    bytes_per_s: float
    pairs: tuple[EmulatedPair, ...] = ()

    def __post_init__(self) -> None:
        names = [host.name for host in self.hosts]
        if not 1 <= len(names) <= MAX_HOSTS:
            raise InputError(f"a topology has 1 to {MAX_HOSTS} hosts, found {len(names)}")
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"host {name!r} is named twice")
        _check_rate("bytes_per_s", self.bytes_per_s)
        seen: set[frozenset[str]] = set()
        for pair in self.pairs:
            for name in pair.hosts:
                if name not in names:
                    raise InputError(f"a pair names host {name!r}, hosts are {', '.join(names)}")
            if frozenset(pair.hosts) in seen:
                raise InputError(f"the pair {pair.hosts[0]} and {pair.hosts[1]} is given twice")
            seen.add(frozenset(pair.hosts))

    @property
    def num_ranks(self) -> int:
        """Ranks on all hosts together: the world size."""
        return sum(host.devices for host in self.hosts)

    def host_of(self, rank: int) -> tuple[int, int]:
        """The host that holds a rank, by index, and the rank's place on it (its local rank)."""
        for index, host in enumerate(self.hosts):
            if rank < host.devices:
                return index, rank
            rank -= host.devices
        raise AssertionError("rank beyond the topology")

    def pair_bytes_per_s(self, first: int, second: int) -> float:
        """The rate between two hosts, by index."""
        names = {self.hosts[first].name, self.hosts[second].name}
        return next((pair.bytes_per_s for pair in self.pairs if set(pair.hosts) == names), self.bytes_per_s)


def load_topology(path: str | Path) -> EmulatedTopology:
    """Read a topology file; raises ``InputError`` as ``artifact.load`` does."""
    return artifact.load(EmulatedTopology, path, artifact="topology", schema_version=TOPOLOGY_SCHEMA_VERSION)


def _check_rate(field: str, bytes_per_s: float | None) -> None:
    if bytes_per_s is not None and bytes_per_s < 1e3:
        raise InputError(f"{field} must be at least 1000 bytes a second, found {bytes_per_s:g}")
