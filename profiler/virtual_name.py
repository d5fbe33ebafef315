"""Names of virtual devices, and what a cost model is to believe of one. No torch here: ``virtual`` holds the clock.

``virtual:KIND/DIVISOR``: ``virtual:h100/1000`` is a datasheet H100 whose rates are divided by 1000.
``virtual:h100/1000/50`` divides the FLOP rates by 1000 and the memory rate by 50. With ``+numbers`` behind it the
matrix products are computed as well, so that losses are real.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from meshwright import InputError
from meshwright.profiler.cluster import Device, Efficiency, Source, load_cluster
from meshwright.profiler.cluster_presets import preset_names
from meshwright.profiler.record import record

DEVICE_VARIABLE = "MESHWRIGHT_DEVICE"  # names the virtual device of a rank that `meshwright emulate` started

_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
_NAME = re.compile(
    rf"virtual:(?P<kind>[A-Za-z0-9_-]+)/(?P<flops>{_NUMBER})(?:/(?P<memory>{_NUMBER}))?(?P<numbers>\+numbers)?"
)


@record
class VirtualName:
    """A name taken apart: a cluster preset whose device it is, what its rates are divided by, whether it computes."""

    preset: str
    flops_divisor: float
    memory_divisor: float
    numbers: bool


def split_virtual_name(name: str) -> VirtualName:
    """Read ``virtual:KIND/DIVISOR[/MEMORY_DIVISOR][+numbers]``; KIND is a preset or one without its ``-sxm``.

    Raises ``InputError`` for another form or a divisor that is not positive.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise InputError(
            f"cannot read {name!r} as a virtual device: expected virtual:KIND/DIVISOR, for example virtual:h100/1000, "
            "and optionally /MEMORY_DIVISOR and +numbers behind it"
        )
    flops = float(match["flops"])
    memory = float(match["memory"] or flops)
    if not (0 < flops < math.inf and 0 < memory < math.inf):
        raise InputError(f"a divisor of a virtual device must be positive and finite, found {name!r}")
    kind = match["kind"]
    return VirtualName(
        preset=f"{kind}-sxm" if f"{kind}-sxm" in preset_names() else kind,
        flops_divisor=flops,
        memory_divisor=memory,
        numbers=match["numbers"] is not None,
    )


def parse_virtual_device(name: str) -> Device:
    """The device record of a virtual device: the preset's with its rates divided.

    Half sizes, overheads, launch cost and slow-down are 0 and factors 1, because the clock charges none of them; memory
    is whole. Raises ``InputError`` as ``split_virtual_name`` does, and for an unknown KIND.
    """
    parts = split_virtual_name(name)
    device = load_cluster(parts.preset).device
    return replace(
        device,
        kind=name,
        memory_bytes_per_s=device.memory_bytes_per_s / parts.memory_divisor,
        peak_memory_bytes_per_s=None,
        num_multiprocessors=None,
        launch_s=0.0,
        communication_slowdown=0.0,
        matmul_factor=1.0,
        attention_factor=1.0,
        memory_factor=1.0,
        variation=0.0,
        efficiencies=tuple(_slower(efficiency, parts.flops_divisor) for efficiency in device.efficiencies),
        samples=(),
        source=_scaled(device.source, parts.memory_divisor),
        figure_sources=(),
    )


def _slower(efficiency: Efficiency, divisor: float) -> Efficiency:
    return replace(
        efficiency,
        peak_flops_per_s=efficiency.peak_flops_per_s / divisor,
        half_m=0.0,
        half_n=0.0,
        half_k=0.0,
        tile_exponent=None,
        half_waves=0.0,
        head_exponent=0.0,
        overhead_s=0.0,
        source=_scaled(efficiency.source, divisor),
    )


def _scaled(source: Source, divisor: float) -> Source:
    return Source(
        provenance=source.provenance, reference=f"virtual device: rate divided by {divisor:g}; {source.reference}"
    )
