"""The constants that measured steps may correct: which there are, what each belongs to, and how to set it.

A constant belongs to a device, to a tier of links or to a target, never to a run. A *value* is named by its owner:
the device's kind, the links' kind (the tier's name, ``node`` or ``cluster``, where they were measured), or the target's
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from meshwright import InputError
from meshwright.cost_models.framework import Framework
from meshwright.profiler.cluster import ClusterProfile, Device, LinkTier
from meshwright.profiler.record import record

Owner = Literal["device", "link", "target"]


@record
class Constant:
    """One number: a field of ``Device``, ``LinkTier`` or ``Framework`` (``host.x`` of its ``HostCost``), and its range.

    ``spread`` is how far, as a factor, a value may plausibly lie from its prior: what a fit is held back with.
    """

    owner: Owner
    name: str
    lower: float
    upper: float
    spread: float
    meaning: str


CONSTANTS: tuple[Constant, ...] = (
    Constant(
        owner="device",
        name="matmul_factor",
        lower=0.7,
        upper=1.6,
        spread=1.15,
        meaning="seconds of matmuls inside steps over those of the curves",
    ),
    Constant(
        owner="device",
        name="attention_factor",
        lower=0.5,
        upper=2.5,
        spread=1.3,
        meaning="seconds of attention kernels inside steps over those of the curves",
    ),
    Constant(
        owner="device",
        name="memory_factor",
        lower=0.9,
        upper=2.0,
        spread=1.2,
        meaning="seconds of memory-bound kernels over bytes / memory_bytes_per_s",
    ),
    Constant(
        owner="device",
        name="variation",
        lower=0.0,
        upper=0.05,
        spread=1.02,
        meaning="standard deviation of kernels' seconds from device to device, over their mean",
    ),
    Constant(
        owner="device",
        name="communication_slowdown",
        lower=0.0,
        upper=0.6,
        spread=1.5,
        meaning="share by which compute slows while a collective runs",
    ),
    Constant(
        owner="link",
        name="bytes_per_s",
        lower=1e8,
        upper=3e12,
        spread=1.3,
        meaning="what one pair reaches, and each device's share with it",
    ),
    Constant(
        owner="link",
        name="latency_s",
        lower=1e-7,
        upper=1e-3,
        spread=1.5,
        meaning="one way, small message",
    ),
    Constant(
        owner="link",
        name="congestion",
        lower=0.0,
        upper=1.0,
        spread=1.3,
        meaning="exponent of the slowdown of trees and exchanges over the nodes that a group joins",
    ),
    Constant(
        owner="link",
        name="step_s",
        lower=1e-6,
        upper=1e-3,
        spread=1.3,
        meaning="how long a port is busy with a chunk of a ring",
    ),
    Constant(
        owner="target",
        name="host.launch_factor",
        lower=0.02,
        upper=30.0,
        spread=5.0,
        meaning="host seconds of an operator over the device's launch_s",
    ),
    Constant(
        owner="target",
        name="host.collective_s",
        lower=1e-6,
        upper=5e-3,
        spread=10.0,
        meaning="host seconds of one collective call",
    ),
    Constant(
        owner="target",
        name="host.pipelined_collective_s",
        lower=1e-7,
        upper=5e-3,
        spread=10.0,
        meaning="host seconds of a collective call for each rank of its group, with a pipeline beside it",
    ),
    Constant(
        owner="target",
        name="host.checked_collective_s",
        lower=1e-7,
        upper=5e-3,
        spread=10.0,
        meaning="host seconds of a collective call for each rank of its group, which it meets before it starts",
    ),
    Constant(
        owner="target",
        name="host.hop_s",
        lower=1e-6,
        upper=1.0,
        spread=10.0,
        meaning="host seconds of one send or receive between stages",
    ),
    Constant(
        owner="target",
        name="host.skew_s",
        lower=1e-7,
        upper=2e-3,
        spread=3.0,
        meaning="seconds that a tensor-parallel collective waits for its last rank",
    ),
    Constant(
        owner="target",
        name="host.microbatch_s",
        lower=1e-5,
        upper=1.0,
        spread=10.0,
        meaning="host seconds of a micro-batch on a stage, exposed",
    ),
    Constant(
        owner="target",
        name="host.step_s",
        lower=1e-4,
        upper=2.0,
        spread=10.0,
        meaning="host seconds of a step, exposed",
    ),
    Constant(
        owner="target",
        name="host.run_ahead",
        lower=1.0,
        upper=16.0,
        spread=2.5,
        meaning="how well kernels hide launches: exponent of the sum of both",
    ),
    Constant(
        owner="target",
        name="pointwise_factor",
        lower=0.3,
        upper=4.0,
        spread=2.0,
        meaning="seconds of the memory-bound rest over what its passes cost",
    ),
    Constant(
        owner="target",
        name="matmul_factor",
        lower=0.8,
        upper=1.4,
        spread=1.25,
        meaning="seconds of matmuls over those of the device in steps of other targets",
    ),
    Constant(
        owner="target",
        name="hopper_factor",
        lower=0.9,
        upper=1.5,
        spread=1.15,
        meaning="seconds of matmuls on Hopper over those of the library that the curves were measured with",
    ),
    Constant(
        owner="target",
        name="row_scaled_factor",
        lower=1.0,
        upper=2.5,
        spread=1.2,
        meaning="seconds of float8 matmuls with a scale for each row over those with one for all",
    ),
    Constant(
        owner="target",
        name="block_scaled_factor",
        lower=1.0,
        upper=1.5,
        spread=1.1,
        meaning="seconds of float8 matmuls with a scale for each block over those with one for all",
    ),
    Constant(
        owner="target",
        name="dp_factor",
        lower=0.2,
        upper=8.0,
        spread=2.0,
        meaning="seconds of data-parallel collectives over what their bytes cost",
    ),
    Constant(
        owner="target",
        name="overlap_dp_reduce",
        lower=0.0,
        upper=1.0,
        spread=1.5,
        meaning="share of gradient reduction that can hide",
    ),
    Constant(
        owner="target",
        name="overlap_dp_scatter",
        lower=0.0,
        upper=1.0,
        spread=1.5,
        meaning="share of scattering gradients to their owners that can hide, where it differs",
    ),
    Constant(
        owner="target",
        name="overlap_dp_gather",
        lower=0.0,
        upper=1.0,
        spread=1.5,
        meaning="share of weight gathering that can hide",
    ),
    Constant(
        owner="target",
        name="overlap_tp",
        lower=0.0,
        upper=1.0,
        spread=1.5,
        meaning="share of tensor-parallel exchange that can hide",
    ),
)


@record
class ByHand:
    """A constant read off published steps by hand, outside the joint fit, so that it counts among the fitted ones."""

    owner: Owner
    of: str
    name: str
    value: float
    read_off: str


BY_HAND: tuple[ByHand, ...] = (
    ByHand(
        owner="device",
        of="half precision on tensor cores",
        name="operators.UNALIGNED",
        value=2.8,
        read_off="heads over 50,257 words of vTrain's runs with tp 1",
    ),
    ByHand(
        owner="target",
        of="megatron-lm",
        name="overlap_tp_backward",
        value=0.4,
        read_off="layer times of arXiv 2205.05198, table 4",
    ),
    ByHand(
        owner="target",
        of="megatron-bridge",
        name="block_scaled_factor",
        value=1.04,
        read_off="mxfp8 and fp8 steps of Llama 3 8B of one release",
    ),
    ByHand(
        owner="target",
        of="megatron-bridge",
        name="experts.exchange_factor",
        value=1.3,
        read_off="steps of models with experts on H100 whose exchange crosses nodes",
    ),
    ByHand(
        owner="target",
        of="torchtitan",
        name="context.step_factor",
        value=1.5,
        read_off="Llama 3.1 8B at 65,536 and 131,072 tokens on 8 H100 (benchmarks/llama3_h100_202412_torchtitan.md)",
    ),
    ByHand(
        owner="target",
        of="deepspeed-2021",
        name="dp_factor",
        value=9.0,
        read_off="ZeRO-3 in arXiv 2104.04473, table 2",
    ),
    ByHand(
        owner="target",
        of="deepspeed-2021",
        name="overlap_dp_gather",
        value=0.5,
        read_off="the same",
    ),
    ByHand(
        owner="target",
        of="deepspeed-2021",
        name="overlap_dp_reduce",
        value=0.5,
        read_off="the same",
    ),
)
BY_NAME: Mapping[tuple[str, str], Constant] = {(each.owner, each.name): each for each in CONSTANTS}


@record
class Value:
    """One constant of one owner."""

    owner: Owner
    of: str  # the device's kind, the links' kind, or the target
    name: str
    value: float

    @property
    def constant(self) -> Constant:
        """What kind of constant it is. Raises ``InputError`` for an unknown one."""
        try:
            return BY_NAME[self.owner, self.name]
        except KeyError:
            known = ", ".join(name for owner, name in BY_NAME if owner == self.owner)
            raise InputError(f"unknown constant {self.name!r} of a {self.owner}: expected one of {known}") from None


def on_framework(framework: Framework, values: tuple[Value, ...]) -> Framework:
    """The target with its own constants of ``values``; a version of another has that one's where both are alike."""
    shared = {
        each.name: each.value
        for each in values
        if each.owner == "target" and each.of == framework.version_of and each.name not in framework.differs_in
    }
    own = {each.name: each.value for each in values if each.owner == "target" and each.of == framework.name}
    named = shared | own
    host = {name.removeprefix("host."): value for name, value in named.items() if name.startswith("host.")}
    traits: dict[str, Any] = {name: value for name, value in named.items() if not name.startswith("host.")}
    return replace(framework, host=replace(framework.host, **host), **traits) if named else framework


def on_cluster(cluster: ClusterProfile, values: tuple[Value, ...]) -> ClusterProfile:
    """The cluster with the constants of its devices and links among ``values``."""
    devices = tuple(_on_device(device, values) for device in cluster.devices)
    tiers = tuple(_on_tier(tier, values) for tier in cluster.tiers)
    return replace(cluster, devices=devices, tiers=tiers)


def as_calibrated(cluster: ClusterProfile, framework: Framework) -> tuple[ClusterProfile, Framework]:
    """Both with the constants that measured steps corrected on this cluster (``ClusterProfile.calibrated``)."""
    if not cluster.calibrated:
        return cluster, framework
    values = tuple(Value(owner=each.owner, of=each.of, name=each.name, value=each.value) for each in cluster.calibrated)
    return on_cluster(cluster, values), on_framework(framework, values)


def _on_device(device: Device, values: tuple[Value, ...]) -> Device:
    own: dict[str, Any] = {
        each.name: each.value for each in values if each.owner == "device" and each.of == device.kind
    }
    return replace(device, **own) if own else device


def _on_tier(tier: LinkTier, values: tuple[Value, ...]) -> LinkTier:
    kind = tier.kind or tier.name
    own: dict[str, Any] = {each.name: each.value for each in values if each.owner == "link" and each.of == kind}
    if "bytes_per_s" in own:  # the share of each device keeps its relation to what a pair reaches
        own["contended_bytes_per_s"] = own["bytes_per_s"] * tier.contended_bytes_per_s / tier.bytes_per_s
    return replace(tier, **own) if own else tier


def value_on(owner: Owner, name: str, record_: Device | LinkTier | Framework) -> float:
    """What a record has for a constant now."""
    found: Any = record_
    for part in name.split("."):
        found = getattr(found, part)
    return float(found)
