"""One operator on one device -> seconds: the device's curve for it, at the shape that it has on one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.profiler.cluster import Device
from meshwright.profiler.efficiency import WIDE_HEAD, kernel_seconds

FloatArray = NDArray[np.float64]


def operator_seconds(
    device: Device,
    op: str,
    dtype: str,
    flops: Any,
    num_bytes: Any,
    m: Any,
    n: Any,
    k: Any,
    head_dim: Any = WIDE_HEAD,
    *,
    even_tiles: bool = False,
) -> FloatArray:
    """Seconds that a device is busy with an operator, its floor for a small kernel included.

    ``m``, ``n``, ``k`` as ``Efficiency`` names them, ``flops`` and ``num_bytes`` of the whole call; numbers or arrays
    that broadcast to the result's shape. ``head_dim`` and ``even_tiles`` (no mask) matter to attention alone. The
    formula and its sources stand in ``profiler/efficiency.py``, times the device's factor from measured steps; the
    host's cost of a launch is not in it.
    Raises ``InputError`` when the device has no curve for ``op`` in ``dtype``, saying how to measure it.
    """
    curve = device.efficiency(op, dtype)
    seconds = kernel_seconds(
        curve,
        num_multiprocessors=device.num_multiprocessors,
        memory_bytes_per_s=device.memory_bytes_per_s,
        flops=flops,
        num_bytes=num_bytes,
        m=m,
        n=n,
        k=k,
        head_dim=head_dim,
        even_tiles=even_tiles,
    )
    factor = device.attention_factor if op.startswith("attention") else device.matmul_factor
    return np.asarray(curve.overhead_s + factor * (seconds - curve.overhead_s))
