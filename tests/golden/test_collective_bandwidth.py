"""Published collective bandwidths against the presets' links: figures as published, tolerances as found by the fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshwright import load_cluster
from meshwright.cost_models.collectives import groups_of, seconds
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig

# GB/s of bus bandwidth at 256 MiB on 1, 2, ... 64 nodes of 8 H100 with EFA: means over many runs, Ultra-Scale Playbook
# (assets/data/benchmarks/pp_comm_bandwidth.html)
EFA_NODES = (1, 2, 4, 8, 16, 32, 64)
EFA = {
    "all_reduce": (435.9668, 361.7492, 160.1395, 99.5643, 84.7405, 64.9254, 32.9378),
    "all_gather": (249.8488, 184.6132, 118.9675, 68.9975, 54.9723, 27.9692, 11.0383),
    "reduce_scatter": (249.7290, 181.5536, 115.7576, 68.5511, 54.5242, 27.9443, 11.0697),
}
# microseconds of NCCL in 16 bits inside a node: aiconfigurator-core 0.12.0, systems/data/*/comm/nccl
# (preset, operation, devices, bytes): measured
NCCL = {
    ("a100-sxm", "all_reduce", 8, 4096): 21.4,
    ("a100-sxm", "all_reduce", 8, 536870912): 4225.9,
    ("a100-sxm", "all_reduce", 2, 268435456): 1430.1,
    ("a100-sxm", "all_gather", 4, 67108864): 325.4,
    ("a100-sxm", "reduce_scatter", 8, 33554432): 210.0,
    ("h100-sxm", "all_reduce", 8, 4096): 16.0,
    ("h100-sxm", "all_reduce", 8, 16777216): 121.9,
    ("h100-sxm", "all_reduce", 8, 536870912): 2111.1,
    ("h100-sxm", "all_reduce", 4, 134217728): 613.2,
    ("h100-sxm", "all_gather", 8, 33554432): 125.5,
    ("h100-sxm", "all_gather", 2, 134217728): 292.5,
    ("h100-sxm", "reduce_scatter", 8, 268435456): 721.7,
    ("h100-sxm", "all_to_all", 8, 268435456): 763.9,
    ("b200-sxm", "all_reduce", 8, 536870912): 1334.6,
    ("b200-sxm", "all_gather", 8, 67108864): 137.5,
    ("gb200-nvl72", "reduce_scatter", 4, 268435456): 383.7,
}


def price(source: str, op: str, num_bytes: float, **degrees: Any) -> float:
    cluster = load_cluster(source)
    batch = ConfigBatch.from_configs([ParallelConfig(**degrees)])
    return float(seconds(cluster, op, groups_of(batch, cluster, Placement(), "dp"), num_bytes)[0])


@pytest.mark.parametrize("op", sorted(EFA))
def test_an_efa_cluster_from_1_to_64_nodes(op: str) -> None:
    errors = []
    for nodes, published in zip(EFA_NODES, EFA[op], strict=True):
        took = price(f"h100-efa:{nodes}", op, 2.0**28, dp=8 * nodes)
        if op != "all_reduce":  # lists of tensors: torch copies them through one buffer, a read and a write
            took += 2 * 2.0**28 / load_cluster("h100-efa").device.memory_bytes_per_s
        rounds = (2 if op == "all_reduce" else 1) * (8 * nodes - 1) / (8 * nodes)
        errors.append(rounds * 2.0**28 / took / (1e9 * published) - 1)
    assert np.abs(errors).mean() <= 0.12
    assert np.abs(errors).max() <= 0.23


@pytest.mark.parametrize(
    ("shape", "measured_us"), NCCL.items(), ids=lambda value: "-".join(map(str, np.atleast_1d(value)))
)
def test_nccl_inside_a_node(shape: tuple[str, str, int, int], measured_us: float) -> None:
    preset, op, devices, num_bytes = shape
    assert price(preset, op, float(num_bytes), dp=devices) == pytest.approx(1e-6 * measured_us, rel=0.15)


def test_a_small_all_reduce_over_32_nodes() -> None:
    # 63 us on 32 nodes of 8 A100 with 4 HDR ports (NVIDIA/nccl issue 652)
    assert price("a100-800gbps:32", "all_reduce", 64.0, dp=256) == pytest.approx(63e-6, rel=0.1)


def test_three_nodes_with_four_ports() -> None:
    # 24 A100: 96 GB/s at most up to 128 MB, 84.8 on average over sizes from 8 bytes in steps of 1 MiB
    # (NVIDIA/nccl-tests issue 119)
    sizes = 8.0 + 2.0**20 * np.arange(1, 128)
    rates = [2 * 23 / 24 * size / price("a100-40gb-4x200:3", "all_reduce", size, dp=24) for size in sizes]
    assert max(rates) == pytest.approx(96e9, rel=0.08)
    assert np.mean(rates) == pytest.approx(84.8e9, rel=0.08)


def test_h800_reduces_in_its_switches() -> None:
    # 215 GB/s of bus bandwidth on 8 H800 whose links have 200 GB/s each direction (NVIDIA/nccl issue 1374)
    size = 8e9
    assert 2 * 7 / 8 * size / price("h800-sxm", "all_reduce", size, dp=8) == pytest.approx(215e9, rel=0.08)
