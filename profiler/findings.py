"""What a profile has found so far, and the cluster profile made of it; the part that is kept when a rank dies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Literal

import numpy as np

from meshwright import InputError, RunError
from meshwright.profiler.cluster import (
    ClusterProfile,
    CollectiveCurve,
    Device,
    Efficiency,
    KernelSample,
    LinkMatrix,
    LinkTier,
    NodeGroup,
    Provenance,
    Source,
)
from meshwright.profiler.cluster_presets import datasheet_peak
from meshwright.profiler.environment import Environment
from meshwright.profiler.fit import MIN_SAMPLES, best_rate, fit_efficiency, predicted_seconds
from meshwright.profiler.record import record
from meshwright.profiler.virtual_name import parse_virtual_device

COMMAND = "meshwright profile"
FITTED = ("matmul", "attention_forward", "attention_backward", "grouped_matmul")
LARGE_RESIDUAL = 0.2


@record
class RankFacts:
    """Where a rank is and what it has."""

    rank: int
    host: str
    node: str  # equal for ranks of one node
    kind: str
    memory_bytes: int
    reserved_bytes: int


@record
class DeviceFacts:
    """Figures of one kind of device that are not fits; None where a described (virtual) device has its own."""

    kind: str
    memory_bytes_per_s: float
    launch_s: float
    communication_slowdown: float
    num_multiprocessors: int | None = None  # of a GPU
    loaded_bytes: int = 0  # of the device's memory that kernels took when they were first used
    communicator_bytes: int = 0


@record
class PartialProfile:
    """What was measured before a rank died. Not a cluster: ``load_cluster`` refuses it, people may read it."""

    artifact: Literal["partial-cluster"] = "partial-cluster"
    schema_version: int = 1
    name: str
    failure: str
    ranks: tuple[RankFacts, ...]
    devices: tuple[DeviceFacts, ...]
    link_matrix: LinkMatrix | None
    collectives: tuple[CollectiveCurve, ...]
    samples: tuple[KernelSample, ...]
    environment: Environment | None
    measured_at: str
    notes: tuple[str, ...]


@dataclass
class Findings:
    """Filled section by section while ranks measure."""

    name: str
    ranks: tuple[RankFacts, ...] = ()
    devices: list[DeviceFacts] = field(default_factory=list)
    link_matrix: LinkMatrix | None = None
    collectives: list[CollectiveCurve] = field(default_factory=list)
    samples: list[tuple[str, KernelSample]] = field(default_factory=list)  # with the device kind
    environment: Environment | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, section: str, value: Any) -> None:
        """Take what a rank reports: a section's name as in this class, singular where it comes piece by piece."""
        if section == "ranks":
            self.ranks = value
        elif section == "environment":
            self.environment = value
        elif section == "link_matrix":
            self.link_matrix = value
            self.notes += slow_links(value, self.nodes)
        elif section == "device":
            self.devices.append(value)
        elif section == "collective":
            self.collectives.append(value)
        elif section == "samples":
            self.samples += value
        elif section == "note":
            self.notes.append(value)
        else:
            assert section == "progress", section

    @property
    def nodes(self) -> list[list[int]]:
        """Ranks of each node."""
        return nodes_of(self.ranks)

    def partial(self, failure: str) -> PartialProfile:
        """What there is, with why there is no more."""
        return PartialProfile(
            name=self.name,
            failure=failure,
            ranks=self.ranks,
            devices=tuple(self.devices),
            link_matrix=self.link_matrix,
            collectives=tuple(self.collectives),
            samples=tuple(sample for _, sample in self.samples),
            environment=self.environment,
            measured_at=_now(),
            notes=tuple(self.notes),
        )

    def profile(self) -> ClusterProfile:
        """The cluster profile of a complete measurement. Raises ``RunError`` when a section is missing."""
        if not self.ranks or not self.devices or (len(self.ranks) > 1 and self.link_matrix is None):
            raise RunError("the measurement ended without its devices or links")
        notes = list(self.notes)
        devices = tuple(self._device(facts, notes) for facts in self.devices)
        return ClusterProfile(
            name=self.name,
            devices=devices,
            node_groups=_node_groups(self.ranks),
            tiers=link_tiers(self.link_matrix, self.nodes, self._source()) if self.link_matrix else (),
            collectives=tuple(self.collectives),
            link_matrix=self.link_matrix,
            environment=self.environment,
            measured_at=_now(),
            notes=tuple(notes),
        )

    def _source(self) -> Source:
        return Source(provenance=Provenance.MEASURED, reference=f"{COMMAND}, medians over {len(self.ranks)} ranks")

    def _device(self, facts: DeviceFacts, notes: list[str]) -> Device:
        mine = [rank for rank in self.ranks if rank.kind == facts.kind]
        samples = [sample for kind, sample in self.samples if kind == facts.kind]
        return Device(
            kind=facts.kind,
            memory_bytes=min(rank.memory_bytes for rank in mine),
            reserved_bytes=max(rank.reserved_bytes for rank in mine) + facts.loaded_bytes,
            memory_bytes_per_s=facts.memory_bytes_per_s,
            launch_s=facts.launch_s,
            communication_slowdown=facts.communication_slowdown,
            num_multiprocessors=facts.num_multiprocessors,
            communicator_bytes=facts.communicator_bytes,
            efficiencies=_efficiencies(facts, samples, self._source(), notes),
            samples=tuple(samples),
            source=self._source(),
        )


def nodes_of(ranks: Sequence[RankFacts]) -> list[list[int]]:
    """Ranks of each node, in order. Raises ``InputError`` when a node's ranks are not neighbours."""
    nodes = [[facts.rank for facts in group] for _, group in groupby(ranks, key=lambda facts: facts.node)]
    if len(nodes) != len({facts.node for facts in ranks}):
        raise InputError(
            "ranks of one host must be neighbours, found hosts "
            + ", ".join(facts.host for facts in ranks[:8])
            + ("..." if len(ranks) > 8 else "")
            + "; with Slurm start them with --distribution=block"
        )
    return nodes


def link_tiers(matrix: LinkMatrix, nodes: Sequence[Sequence[int]], source: Source) -> tuple[LinkTier, ...]:
    """Tiers out of measured pairs: medians over the pairs of a node, and over those on different nodes.

    The contended rate of a tier is the median share of a device when all of a node talk across it.
    """
    place = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    world = len(place)
    same = np.array([[place[a] == place[b] and a != b for b in range(world)] for a in range(world)])
    other = np.array([[place[a] != place[b] for b in range(world)] for a in range(world)])
    tiers = []
    for name, pairs, size in (("node", same, max(len(node) for node in nodes)), ("cluster", other, world)):
        if not pairs.any():
            continue
        latency, alone, crowded = (
            float(np.median(np.asarray(values)[pairs]))
            for values in (matrix.latency_s, matrix.bytes_per_s, matrix.contended_bytes_per_s)
        )
        tiers.append(
            LinkTier(
                name=name,
                group_size=size,
                latency_s=latency,
                bytes_per_s=alone,
                contended_bytes_per_s=min(crowded, alone),
                source=source,
            )
        )
    return tuple(tiers)


def slow_links(matrix: LinkMatrix, nodes: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """A sentence for each tier in which some pairs reach less than 70 % of the tier's median."""
    place = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    sentences = []
    for name, inside in (("within nodes", True), ("between nodes", False)):
        rates = {
            (a, b): rate
            for a, row in enumerate(matrix.bytes_per_s)
            for b, rate in enumerate(row)
            if a != b and (place[a] == place[b]) is inside
        }
        if not rates:
            continue
        middle = float(np.median(list(rates.values())))
        slow = sorted((rate, pair) for pair, rate in rates.items() if rate < 0.7 * middle)
        if slow:
            rate, (a, b) = slow[0]
            sentences.append(
                f"{len(slow)} of {len(rates)} ordered pairs {name} are below 70 % of the median rate; "
                f"slowest: rank {a} to {b} with {100 * rate / middle:.0f} %"
            )
    return tuple(sentences)


def _efficiencies(
    facts: DeviceFacts, samples: Sequence[KernelSample], source: Source, notes: list[str]
) -> tuple[Efficiency, ...]:
    curves = []
    for dtype in dict.fromkeys(sample.dtype for sample in samples):
        matmuls = [sample for sample in samples if sample.op == "matmul" and sample.dtype == dtype]
        for op in FITTED:
            mine = [sample for sample in samples if sample.op == op and sample.dtype == dtype]
            if len(mine) < MIN_SAMPLES or not matmuls:
                notes.append(f"{op} in {dtype}: {len(mine)} samples, too few for a curve")
                continue
            if facts.kind.startswith("virtual:"):
                curve = _described_curve(facts, mine)
            else:
                curve = fit_efficiency(
                    mine,
                    peak_flops_per_s=datasheet_peak(facts.kind, dtype) or best_rate(matmuls),
                    memory_bytes_per_s=facts.memory_bytes_per_s,
                    source=source,
                    num_multiprocessors=facts.num_multiprocessors,
                )
            if curve.residual > LARGE_RESIDUAL:
                notes.append(f"{op} in {dtype}: the curve misses half of its samples by {curve.residual:.0%} or more")
            curves.append(curve)
    return tuple(curves)


def _described_curve(facts: DeviceFacts, samples: Sequence[KernelSample]) -> Efficiency:
    """A virtual device's stated curve, which needs no fit, with the residual of what was really slept for it."""
    curve = parse_virtual_device(facts.kind).efficiency(samples[0].op, samples[0].dtype)
    predicted = predicted_seconds(curve, samples, facts.memory_bytes_per_s)
    measured = np.array([sample.seconds for sample in samples])
    return replace(curve, residual=float(np.median(np.abs(predicted / measured - 1))))


def _node_groups(ranks: Sequence[RankFacts]) -> tuple[NodeGroup, ...]:
    by_rank = {facts.rank: facts for facts in ranks}
    shapes = []
    for node in nodes_of(ranks):
        kinds = {by_rank[rank].kind for rank in node}
        if len(kinds) > 1:
            raise InputError(f"host {by_rank[node[0]].host} has devices of several kinds: {', '.join(sorted(kinds))}")
        shapes.append((kinds.pop(), len(node), by_rank[node[0]].host))
    return tuple(
        NodeGroup(device=kind, num_nodes=len(same), devices_per_node=size, hosts=tuple(host for _, _, host in same))
        for (kind, size), group in groupby(shapes, key=lambda shape: shape[:2])
        if (same := list(group))
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
