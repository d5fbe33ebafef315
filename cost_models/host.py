"""What a device waits for: its host, which launches kernels, and the slowest of its peers."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.framework import Framework
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.profiler.cluster import Device

FloatArray = NDArray[np.float64]


def launches_ahead(device: Device) -> bool:
    """Whether the host runs ahead of the device, so that launches hide behind kernels: true of GPUs.

    On a CPU, and on a virtual device, which is one, the next operator is called when the last has returned.
    """
    return not device.kind.startswith(("cpu", "virtual"))


def host_wait(device: Device, framework: Framework, on_device: FloatArray, on_host: FloatArray) -> FloatArray:
    """Seconds that launches add to ``on_device`` seconds of kernels and collectives in their stream.

    ``(device^q + host^q)^(1/q) - device`` with the target's ``HostCost.run_ahead`` for ``q``: nothing while the device
    is far behind, all but the device's own time where the host is the slower. A CPU waits for every call.
    """
    if not launches_ahead(device):
        return on_host
    longest = np.maximum(np.maximum(on_device, on_host), 1e-30)
    power = framework.host.run_ahead
    both = longest * ((on_device / longest) ** power + (on_host / longest) ** power) ** (1.0 / power)
    return np.asarray(both - on_device)


def slowest(device: Device, batch: ConfigBatch) -> FloatArray:
    """Seconds of kernels on the slowest of a config's devices, over those of a usual one; ``[num_configs]``.

    Devices of one kind differ (Sinha et al. 2022, "Not All GPUs Are Created Equal", SC22), and a step waits for the
    slowest: ``1 + variation * E(n)``, with ``E(n)`` the mean of the largest of ``n`` standard normal numbers, about
    ``inverse((n - 0.375) / (n + 0.25))`` (Blom 1958). The mean that the device's rates stand for is a usual node's, so
    that ``E`` counts from 8 devices on.
    """
    ranks, inverse = np.unique(batch.tp * batch.cp * batch.pp * batch.dp, return_inverse=True)
    normal = NormalDist()
    largest = np.array([normal.inv_cdf((n - 0.375) / (n + 0.25)) for n in np.maximum(ranks, 8).tolist()])
    usual = normal.inv_cdf((8 - 0.375) / (8 + 0.25))
    return np.asarray(1.0 + device.variation * (largest - usual)[inverse])
