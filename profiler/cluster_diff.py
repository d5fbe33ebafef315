"""What changed between two profiles: the same machines on another day, another driver, another cluster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from meshwright.profiler.cluster import ClusterProfile, CollectiveCurve, Device, Efficiency
from meshwright.profiler.efficiency import kernel_seconds
from meshwright.profiler.environment import environment_differences
from meshwright.profiler.record import record

REFERENCE_SIZE = 1024.0  # matmuls are compared at 1024 x 1024 x 1024


@record
class Change:
    """One figure in both profiles. ``unit`` is s, bytes, bytes/s, FLOP/s or empty for a share or a count."""

    what: str
    before: float
    after: float
    unit: str
    higher_is_better: bool = True

    @property
    def percent(self) -> float:
        """``after`` over ``before``, less one, in percent; 0 where both are 0, infinite from 0 to something."""
        if self.before == self.after:
            return 0.0
        return 100 * (self.after / self.before - 1) if self.before else float("inf")


@record
class ClusterDiff:
    """Figures both profiles have, what only one has, and how the environments differ."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    environment: tuple[str, ...]


def diff_clusters(before: ClusterProfile, after: ClusterProfile) -> ClusterDiff:
    """Every figure of ``before`` against the same figure of ``after``.

    Devices are matched by their place, tiers by name, operators by name and dtype, collectives by operation and shape
    (at the largest size both measured, interpolated).
    """
    first, second = _figures(before), _figures(after)
    changes = [
        Change(what=name, before=value, after=second[name][0], unit=unit, higher_is_better=better)
        for name, (value, unit, better) in first.items()
        if name in second
    ]
    curves = {_curve_name(curve): curve for curve in after.collectives}
    for curve in before.collectives:
        if (name := _curve_name(curve)) in curves:
            changes.append(_compare_curves(name, curve, curves[name]))
    names_before = set(first) | {_curve_name(curve) for curve in before.collectives}
    names_after = set(second) | set(curves)
    known = before.environment is not None and after.environment is not None
    return ClusterDiff(
        changes=tuple(changes),
        only_before=tuple(sorted(names_before - names_after)),
        only_after=tuple(sorted(names_after - names_before)),
        environment=environment_differences(before.environment, after.environment)
        if known and before.environment and after.environment
        else (),
    )


def reference_rate(curve: Efficiency) -> float:
    """FLOP/s of a curve at ``REFERENCE_SIZE`` in every dimension: its overhead, waves and memory left out."""
    size, flops = REFERENCE_SIZE, 2.0 * REFERENCE_SIZE**3
    smooth = replace(curve, overhead_s=0.0, half_waves=0.0, tile_exponent=None)
    seconds = kernel_seconds(
        smooth,
        num_multiprocessors=1,
        memory_bytes_per_s=np.inf,
        flops=flops,
        num_bytes=0.0,
        m=size,
        n=size,
        k=size,
    )
    return flops / float(seconds)


def _figures(profile: ClusterProfile) -> dict[str, tuple[float, str, bool]]:
    figures: dict[str, tuple[float, str, bool]] = {
        "nodes": (float(profile.num_nodes), "", True),
        "devices": (float(profile.num_devices), "", True),
    }
    for place, device in enumerate(profile.devices):
        figures |= _device_figures(device, f"device {place} " if len(profile.devices) > 1 else "")
    for tier in profile.tiers:
        figures[f"{tier.name} latency"] = (tier.latency_s, "s", False)
        figures[f"{tier.name} bandwidth alone"] = (tier.bytes_per_s, "bytes/s", True)
        figures[f"{tier.name} bandwidth contended"] = (tier.contended_bytes_per_s, "bytes/s", True)
    return figures


def _device_figures(device: Device, prefix: str) -> dict[str, tuple[float, str, bool]]:
    figures: dict[str, tuple[float, str, bool]] = {
        f"{prefix}memory": (float(device.memory_bytes), "bytes", True),
        f"{prefix}memory reserved": (float(device.reserved_bytes), "bytes", False),
        f"{prefix}memory bandwidth": (device.memory_bytes_per_s, "bytes/s", True),
        f"{prefix}launch of an operator": (device.launch_s, "s", False),
        f"{prefix}slow-down while communicating": (device.communication_slowdown, "", False),
    }
    for curve in device.efficiencies:
        figures[f"{prefix}{curve.op} {curve.dtype}"] = (reference_rate(curve), "FLOP/s", True)
    return figures


def _curve_name(curve: CollectiveCurve) -> str:
    return f"{curve.op} over {curve.num_ranks} ranks, {curve.ranks_per_node} a node"


def _compare_curves(name: str, before: CollectiveCurve, after: CollectiveCurve) -> Change:
    size = min(before.message_bytes[-1], after.message_bytes[-1])
    old, new = (float(np.interp(size, curve.message_bytes, curve.seconds)) for curve in (before, after))
    return Change(what=name, before=old, after=new, unit="s", higher_is_better=False)
