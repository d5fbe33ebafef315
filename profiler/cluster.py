"""What the machines are: devices, links, collectives and kernels, measured or from datasheets.

A ``ClusterProfile`` is homogeneous in its rules and not in its figures: every rate says where it comes from
(``Source``), raw samples stand beside fits, and a profile without a measurement has none instead of a guess.
"""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Literal

from meshwright import InputError
from meshwright.profiler import artifact
from meshwright.profiler.cluster_presets import find_preset, profile_tree
from meshwright.profiler.environment import Environment
from meshwright.profiler.record import check_numbers, record

CLUSTER_SCHEMA_VERSION = 1


class Provenance(StrEnum):
    """How a figure is known."""

    MEASURED = "measured"
    DATASHEET = "datasheet"
    ASSUMED = "assumed"


@record
class Source:
    """Where a figure comes from: ``reference`` is a document, a table, or the command that measured it."""

    provenance: Provenance
    reference: str


@record
class FigureSource:
    """The source of a single field, where it differs from that of the record it stands in."""

    field: str
    source: Source


@record
class Efficiency:
    """The share of a device's peak that an operator reaches, as a curve over its shape.

    ``profiler/efficiency.py`` derives the form: saturating in each size, 1/2 of the limit at the half size; a matmul
    with ``tile_exponent`` runs in tiles and waves over the device's multiprocessors; attention with ``half_waves``
    idles as much at the end of a kernel, and heads narrower than 128 lower its share by ``head_exponent``. Seconds are
    ``overhead_s + FLOPs / (share * peak_flops_per_s)``. For attention ``m`` is query tokens, ``n`` heads times
    sequences, ``k`` key tokens; of a grouped matmul, tokens an expert. FLOPs of causal attention are those of the pairs
    that the mask keeps; backward counts 2.5 times forward. ``attention_forward`` and ``attention_backward`` are
    what torch runs (flash attention 2 on a GPU), with ``_fa3`` behind them the kernels written for Hopper
    (FlashAttention-3, cuDNN). ``residual`` is the median absolute relative error of the fit over its samples (0 for
    a datasheet figure).
    """

    op: Literal[
        "matmul",
        "attention_forward",
        "attention_backward",
        "attention_forward_fa3",
        "attention_backward_fa3",
        "grouped_matmul",
    ]
    dtype: str
    peak_flops_per_s: float
    max_share: float
    half_m: float = 0.0
    half_n: float = 0.0
    half_k: float = 0.0
    tile_exponent: float | None = None  # None: not in tiles over multiprocessors
    half_waves: float = 0.0
    head_exponent: float = 0.0
    overhead_s: float = 0.0
    residual: float = 0.0
    source: Source

    def __post_init__(self) -> None:
        sizes = ("half_m", "half_n", "half_k", "tile_exponent", "half_waves", "head_exponent", "overhead_s", "residual")
        check_numbers(self, positive=("peak_flops_per_s", "max_share"), not_negative=sizes)


@record
class KernelSample:
    """One timed operator: sizes as ``Efficiency`` names them, median seconds, spread (p90 - p10) / median."""

    op: str
    dtype: str
    m: int
    n: int
    k: int
    batch: int = 1  # matmuls or sequences times heads done by one call
    flops: float
    num_bytes: float
    seconds: float
    spread: float


@record
class Device:
    """One kind of device. ``memory_bytes`` is what it has, ``reserved_bytes`` what context, loaded kernels and others
    hold of it, ``communicator_bytes`` what each group of ranks that communicates takes besides.

    ``launch_s`` is the host's cost of one eager operator when the device waits for the host.
    ``communication_slowdown`` is time of compute while a collective runs over its time alone, minus 1.
    ``num_multiprocessors`` is what a GPU cuts its kernels over; None on others. Raises ``InputError`` when a curve
    needs it and it is None.
    """

    kind: str
    memory_bytes: int
    reserved_bytes: int
    memory_bytes_per_s: float
    launch_s: float
    communication_slowdown: float
    efficiencies: tuple[Efficiency, ...]
    samples: tuple[KernelSample, ...] = ()
    matmul_factor: float = 1.0  # seconds of matmuls inside steps (power, clocks, cold caches) over those of the curves
    attention_factor: float = 1.0  # the same of attention kernels
    memory_factor: float = 1.0  # the same of memory-bound kernels, over bytes / memory_bytes_per_s
    variation: float = 0.0  # standard deviation of kernels' seconds from device to device, over their mean
    peak_memory_bytes_per_s: float | None = None  # the datasheet's; memory_bytes_per_s is what a large copy reaches
    num_multiprocessors: int | None = None
    communicator_bytes: int = 0
    source: Source  # of memory, bandwidth and launch
    figure_sources: tuple[FigureSource, ...] = ()

    def __post_init__(self) -> None:
        rates = ("memory_bytes", "memory_bytes_per_s", "peak_memory_bytes_per_s", "num_multiprocessors")
        check_numbers(self, positive=rates, not_negative=("reserved_bytes", "communicator_bytes", "launch_s"))
        for curve in self.efficiencies:
            waves = curve.tile_exponent is not None or curve.half_waves or curve.head_exponent
            if waves and self.num_multiprocessors is None:
                raise InputError(
                    f"{curve.op} {curve.dtype} of {self.kind} is a curve over multiprocessors: say num_multiprocessors"
                )

    def has_efficiency(self, op: str, dtype: str) -> bool:
        """Whether a curve of the operator in that dtype is known."""
        return any(curve.op == op and curve.dtype == dtype for curve in self.efficiencies)

    def efficiency(self, op: str, dtype: str) -> Efficiency:
        """The curve of an operator in a dtype. Raises ``InputError`` saying what is known and how to measure it."""
        for efficiency in self.efficiencies:
            if efficiency.op == op and efficiency.dtype == dtype:
                return efficiency
        known = ", ".join(sorted({f"{e.op} {e.dtype}" for e in self.efficiencies})) or "none"
        raise InputError(
            f"no {dtype} rate for {op} is known of device {self.kind!r} (known: {known}); "
            f"measure it with: meshwright profile --dtype {dtype}"
        )


@record
class NodeGroup:
    """Equal nodes: ``num_nodes`` hosts, each with ``devices_per_node`` devices of one kind."""

    device: str  # Device.kind
    num_nodes: int
    devices_per_node: int
    hosts: tuple[str, ...] = ()  # names, when measured; empty for a preset


@record
class LinkTier:
    """Links between devices that share a domain of ``group_size`` devices but no smaller one.

    ``bytes_per_s`` is one pair, one direction, alone; ``contended_bytes_per_s`` the share of each device when all
    devices of a node talk across this tier at once. ``latency_s`` is that of a small message, one way.

    What a collective adds to latency and bandwidth, by default nothing: ``launch_s`` is what any call costs at least
    (its kernel, its synchronisation); ``half_bytes`` the bytes of one device over this tier at which it reaches half
    of its rate; ``copy_hops`` a device's handling of its own chunk, in hops of a ring; ``step_s`` what each step of a
    ring over this tier costs at least, since a port is busy that long with a chunk of any size; ``congestion`` the
    exponent of the slowdown, over the lower domains that a group joins, of traffic that isn't between neighbours
    (trees, all_to_all; 0.4: twice the nodes, 1.3 times the time);
    ``reduction_bytes_per_s`` the bytes of a buffer that the switch of this tier adds up and hands back a second, None
    where it does not reduce.
    """

    name: str  # "node" (inside one), "cluster" (across), or a domain's own name
    kind: str = ""  # of links, as presets/links names them; empty where they were measured
    group_size: int  # devices in one domain of this tier
    latency_s: float
    bytes_per_s: float
    contended_bytes_per_s: float
    launch_s: float = 0.0
    half_bytes: float = 0.0
    copy_hops: float = 0.0
    step_s: float = 0.0
    congestion: float = 0.0
    reduction_bytes_per_s: float | None = None
    peak_bytes_per_s: float | None = None  # the datasheet's; bytes_per_s is what a large message reaches
    source: Source
    figure_sources: tuple[FigureSource, ...] = ()

    def __post_init__(self) -> None:
        rates = ("bytes_per_s", "contended_bytes_per_s", "peak_bytes_per_s", "reduction_bytes_per_s")
        terms = ("latency_s", "launch_s", "half_bytes", "copy_hops", "step_s", "congestion")
        check_numbers(self, positive=rates, not_negative=terms)
        if self.copy_hops > 1:  # else larger groups would cost less
            raise InputError(f"copy_hops must be at most 1, found {self.copy_hops}")


@record
class LinkMatrix:
    """Measured pairs: ``[rank][rank]``, symmetric in meaning but not in figures; the diagonal is 0.

    ``contended_bytes_per_s`` is the second pass, all devices of a node talking at once; empty where not measured.
    """

    latency_s: tuple[tuple[float, ...], ...]
    bytes_per_s: tuple[tuple[float, ...], ...]
    contended_bytes_per_s: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        size = len(self.latency_s)
        for name in ("latency_s", "bytes_per_s", "contended_bytes_per_s"):
            rows = getattr(self, name)
            if (rows or name != "contended_bytes_per_s") and [len(row) for row in rows] != [size] * size:
                raise InputError(f"{name} of the link matrix must have {size} rows of {size}, as latency_s has rows")
            if any(number < 0 for row in rows for number in row):
                raise InputError(f"{name} of the link matrix must be at least 0")


CollectiveOp = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]


@record
class CollectiveCurve:
    """Seconds of one collective over sizes, measured with every group of the shape running at the same time.

    The shape is ``num_ranks`` ranks, ``ranks_per_node`` of them on each node. ``message_bytes`` is the whole tensor:
    the buffer of all_reduce and broadcast, the *output* of all_gather, the *input* of reduce_scatter and of all_to_all
    on one rank. Between sizes interpolate linearly; above the largest extend the slope from end to end.
    ``seconds`` are medians, made monotone in bytes: no size takes longer than a larger one did, since what disturbs a
    measurement adds time. ``spread`` is (p90 - p10) / median. ``mean_s`` are means, monotone too: a step adds its calls
    up, so that where a few calls take far longer than most (threads of one core that wait for each other's time slice)
    the mean is what each costs it. Empty means as the medians.
    """

    op: CollectiveOp
    num_ranks: int
    ranks_per_node: int
    message_bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    spread: tuple[float, ...]
    mean_s: tuple[float, ...] = ()
    source: Source

    def __post_init__(self) -> None:
        lengths = {len(self.seconds), len(self.spread), len(self.expected_s)}
        if lengths != {len(self.message_bytes)} or not self.message_bytes:
            raise InputError("message_bytes, seconds and spread of a collective curve must have one length, at least 1")
        if list(self.message_bytes) != sorted(set(self.message_bytes)):
            raise InputError("message_bytes of a collective curve must increase")
        if min(*self.message_bytes, *self.seconds, *self.spread, *self.expected_s) < 0:
            raise InputError("message_bytes, seconds and spread of a collective curve must be at least 0")
        if list(self.seconds) != sorted(self.seconds) or list(self.mean_s) != sorted(self.mean_s):
            raise InputError("seconds of a collective curve must not fall as message_bytes grow")
        check_numbers(self, positive=("num_ranks", "ranks_per_node"))

    @property
    def expected_s(self) -> tuple[float, ...]:
        """What one call of many costs on average: ``mean_s`` where it was measured, else the medians."""
        return self.mean_s or self.seconds


@record
class CalibratedConstant:
    """A constant that measured steps corrected on this cluster (``cost_models/constants.py``), in place of another's.

    ``of`` is the device's kind, the kind of links (a tier's name where it has none), or the target's name.
    """

    owner: Literal["device", "link", "target"]
    of: str
    name: str
    value: float
    source: Source


@record
class ClusterProfile:
    """A cluster: devices, nodes, links by tier (innermost first, the last one holds all devices), and measured curves.

    Raises ``InputError`` when node groups name unknown devices or the tiers do not nest up to the whole cluster.
    """

    artifact: Literal["cluster"] = "cluster"
    schema_version: int = CLUSTER_SCHEMA_VERSION
    name: str
    devices: tuple[Device, ...]
    node_groups: tuple[NodeGroup, ...]
    tiers: tuple[LinkTier, ...]
    collectives: tuple[CollectiveCurve, ...] = ()
    link_matrix: LinkMatrix | None = None
    calibrated: tuple[CalibratedConstant, ...] = ()  # applied to every prediction: meshwright calibrate
    environment: Environment | None = None  # of the measurement; None for a preset
    measured_at: str | None = None  # ISO 8601, UTC
    notes: tuple[str, ...] = ()  # outliers, what could not be measured and why, a rank that died

    def __post_init__(self) -> None:
        kinds = {device.kind for device in self.devices}
        for group in self.node_groups:
            if group.device not in kinds:
                raise InputError(f"node group names device {group.device!r}, devices are {', '.join(sorted(kinds))}")
            if group.num_nodes < 1 or group.devices_per_node < 1:
                raise InputError("num_nodes and devices_per_node must be at least 1")
        sizes = [tier.group_size for tier in self.tiers]
        if sizes != sorted(set(sizes)) or any(size < 1 for size in sizes):
            raise InputError(f"link tiers must grow from the innermost outward, found group sizes {sizes}")
        if not self.node_groups or (self.num_devices > 1 and (not sizes or sizes[-1] < self.num_devices)):
            raise InputError(f"the last link tier must hold all {self.num_devices} devices, found group sizes {sizes}")

    @property
    def num_devices(self) -> int:
        """Devices in the whole cluster: the largest world size."""
        return sum(group.num_nodes * group.devices_per_node for group in self.node_groups)

    @property
    def num_nodes(self) -> int:
        """Hosts in the whole cluster."""
        return sum(group.num_nodes for group in self.node_groups)

    @property
    def devices_per_node(self) -> int:
        """Devices on the smallest node: what a tensor-parallel group can count on."""
        return min(group.devices_per_node for group in self.node_groups)

    @property
    def device(self) -> Device:
        """The device kind of the first node group (clusters of one kind; unequal ones have several groups)."""
        return next(device for device in self.devices if device.kind == self.node_groups[0].device)

    def with_nodes(self, num_nodes: int) -> ClusterProfile:
        """The same cluster with ``num_nodes`` equal nodes: a preset, or a measured one planned for at another size.

        Domains smaller than the new cluster stay; the next one holds it whole and keeps its rates, as in a network
        without oversubscription. What was measured on particular ranks (link matrix, collectives across nodes) is not
        carried over.
        Raises ``InputError`` for unequal nodes, or where a single node says nothing of the network.
        """
        if len(self.node_groups) != 1:
            raise InputError(f"{self.name} has unequal nodes: cannot tell which kind to add or remove")
        group = self.node_groups[0]
        if num_nodes == group.num_nodes:
            return self
        size = group.devices_per_node
        if num_nodes > 1 and group.num_nodes == 1:
            raise InputError(f"{self.name} is a single node: nothing is known of a network for {num_nodes} nodes")
        inner = tuple(tier for tier in self.tiers[:-1] if tier.group_size < num_nodes * size)
        whole = self.tiers[len(inner) : len(inner) + 1]
        tiers = (*inner, *(replace(tier, group_size=num_nodes * size) for tier in whole))
        return replace(
            self,
            node_groups=(replace(group, num_nodes=num_nodes, hosts=()),),
            tiers=tiers,
            collectives=tuple(curve for curve in self.collectives if curve.num_ranks == curve.ranks_per_node),
            link_matrix=None,
        )

    @property
    def digest(self) -> str:
        """Fingerprint of the figures; name, date, environment and notes do not belong to it.

        Nor does what measured steps corrected: plans made before still run on the calibrated cluster, which is the
        same machines.
        """
        return artifact.digest(self, without=("name", "measured_at", "environment", "notes", "calibrated"))


def load_cluster(source: str | Path) -> ClusterProfile:
    """A cluster from a file, or from a preset: ``"h100-sxm:16"`` is 16 nodes of the preset ``h100-sxm``.

    A name without a folder and without ``.json`` that is no file here is taken for a preset's.
    Raises ``InputError`` for an unknown preset (with the nearest names) or a bad file.
    """
    path = Path(source)
    if not isinstance(source, str) or path.name != source or path.suffix == ".json" or path.is_file():
        return artifact.load(ClusterProfile, path, artifact="cluster", schema_version=CLUSTER_SCHEMA_VERSION)
    return load_preset(source)


def load_preset(source: str) -> ClusterProfile:
    """The preset ``NAME`` (one node) or ``NAME:NODES``, whatever files there are; raises as ``load_cluster`` does."""
    path, num_nodes = find_preset(source)
    text = json.dumps(profile_tree(path) | {"schema_version": CLUSTER_SCHEMA_VERSION})
    preset = artifact.loads(
        ClusterProfile, text, artifact="cluster", schema_version=CLUSTER_SCHEMA_VERSION, where=str(path)
    )
    return replace(preset.with_nodes(num_nodes), name=source)
