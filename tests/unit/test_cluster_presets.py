"""Presets: datasheet figures recomputed by hand, sizes, and what is said for a wrong name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from meshwright import InputError, load_cluster
from meshwright.profiler.artifact import save
from meshwright.profiler.cluster import Device, Provenance
from meshwright.profiler.cluster_presets import DEVICE_FOLDER, FOLDER, LINK_FOLDER, preset_names

GIB = 2**30


def test_the_well_known_machines_are_there() -> None:
    nvidia = {
        "h100-sxm",
        "h200-sxm",
        "a100-sxm",
        "a100-40gb-sxm",
        "v100-sxm",
        "b200-sxm",
        "b300-sxm",
        "l40s",
        "rtx-4090",
    }
    assert nvidia | {"gb200-nvl72", "gb300-nvl72", "mi300x", "mi250x"} <= set(preset_names())


@pytest.mark.parametrize("name", sorted(path.stem for path in DEVICE_FOLDER.glob("*.json")))
def test_every_device_has_the_operators_of_a_step_in_every_dtype_it_knows(name: str) -> None:
    device = TypeAdapter(Device).validate_json((DEVICE_FOLDER / f"{name}.json").read_text())
    half = {"float16"} if name.startswith("v100") else {"bfloat16", "float16"}
    for dtype in half | {"float32"}:
        for op in ("matmul", "attention_forward", "attention_backward", "grouped_matmul"):
            assert device.has_efficiency(op, dtype), (op, dtype)
    assert device.has_efficiency("matmul", "float8") == (not name.startswith(("v100", "a100", "mi250x")))
    assert device.has_efficiency("attention_forward_fa3", "bfloat16") == name.startswith(("h100", "h200"))
    pairs = [(curve.op, curve.dtype) for curve in device.efficiencies]
    assert len(pairs) == len(set(pairs))


def test_nvl72_is_a_domain_of_hosts() -> None:
    rack = load_cluster("gb200-nvl72:18")
    assert (rack.num_devices, rack.devices_per_node) == (72, 4)
    assert [tier.group_size for tier in rack.tiers] == [72]  # NVLink throughout
    two = load_cluster("gb200-nvl72:36")
    assert [tier.group_size for tier in two.tiers] == [72, 144]
    assert load_cluster("gb200-nvl72:2").tiers[0].bytes_per_s == rack.tiers[0].bytes_per_s


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_every_figure_has_a_source(name: str) -> None:
    profile = load_cluster(f"{name}:4")
    assert profile.name == f"{name}:4"
    assert profile.num_nodes == 4
    assert profile.num_devices == 4 * profile.devices_per_node == profile.tiers[-1].group_size
    device = profile.device
    assert device.source.provenance is Provenance.DATASHEET
    assert 0 < device.reserved_bytes < 0.1 * device.memory_bytes
    assert {figure.field for figure in device.figure_sources} >= {
        "memory_bytes_per_s",
        "reserved_bytes",
        "launch_s",
        "communication_slowdown",
    }
    for efficiency in device.efficiencies:
        assert 0 < efficiency.max_share <= 1
        assert len(efficiency.source.reference) > 20
    for tier in profile.tiers:
        assert tier.peak_bytes_per_s is not None
        assert tier.contended_bytes_per_s <= tier.bytes_per_s < tier.peak_bytes_per_s
    assert profile.link_matrix is None and not profile.collectives  # nothing pretends to be measured


def test_dgx_h100_figures() -> None:
    profile = load_cluster("h100-sxm:2")
    device = profile.device
    assert device.memory_bytes == 80 * GIB
    assert device.peak_memory_bytes_per_s == 3.35e12
    assert device.efficiency("matmul", "bfloat16").peak_flops_per_s == 1979e12 / 2  # 1,979 TFLOPS with sparsity
    assert device.efficiency("matmul", "float8").peak_flops_per_s == 3958e12 / 2
    assert device.efficiency("matmul", "float32").peak_flops_per_s == 67e12
    node, cluster = profile.tiers
    assert node.peak_bytes_per_s == 900e9 / 2  # both directions together on the datasheet
    # measured: 8 ranks gather 512 MB at 335 GB/s of bus bandwidth, which the ramp and each rank's own chunk hold back
    assert node.source.provenance is Provenance.MEASURED
    assert node.bytes_per_s == pytest.approx(18 * 20.6e9, rel=0.05)  # 18 links of 20.6 GB/s, as NCCL counts
    assert node.bytes_per_s < node.peak_bytes_per_s
    assert cluster.peak_bytes_per_s == 400e9 / 8
    assert cluster.contended_bytes_per_s == cluster.bytes_per_s  # a port for each device


def test_dgx_a100_and_dgx_1_figures() -> None:
    a100 = load_cluster("a100-sxm").device
    assert (a100.memory_bytes, a100.peak_memory_bytes_per_s) == (80 * GIB, 2.039e12)
    assert a100.efficiency("matmul", "float16").peak_flops_per_s == 312e12
    limit = a100.efficiency("matmul", "float16").max_share
    assert 271.2 / 312 < limit < 1  # ml-engineering's table of reached FLOP/s: 271.2 at its best shape
    assert a100.num_multiprocessors == 108
    assert load_cluster("a100-40gb-sxm").device.memory_bytes == 40 * GIB
    v100 = load_cluster("v100-sxm:2")
    assert v100.device.efficiency("matmul", "float16").peak_flops_per_s == 125e12
    # four ports of 100 Gb/s for eight devices
    assert v100.tiers[-1].contended_bytes_per_s == pytest.approx(v100.tiers[-1].bytes_per_s / 2)


def test_a_dtype_that_a_device_lacks_is_refused_not_invented() -> None:
    with pytest.raises(InputError, match=r"no bfloat16 rate for matmul is known of device 'V100.*meshwright profile"):
        load_cluster("v100-sxm").device.efficiency("matmul", "bfloat16")


def test_one_node_has_no_network() -> None:
    profile = load_cluster("h100-sxm")
    assert profile.num_nodes == 1
    assert [tier.name for tier in profile.tiers] == ["node"]
    with pytest.raises(InputError, match="nothing is known of a network"):
        profile.with_nodes(2)


def test_sizes_differ_in_digest_and_names_do_not() -> None:
    assert load_cluster("h100-sxm:2").digest != load_cluster("h100-sxm:3").digest
    assert load_cluster("h100-sxm").digest == load_cluster("h100-sxm:1").digest


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("h100-smx", "did you mean h100-sxm"),
        ("H100-SXM:4", "did you mean h100-sxm"),
        ("frontier", "presets are a100-400gbps, a100-40gb-4x200"),
        ("h100-sxm:0", "whole number of at least 1"),
        ("h100-sxm:", "whole number of at least 1"),
        ("h100-sxm:-2", "whole number of at least 1"),
        ("h100-sxm:²", "whole number of at least 1"),
        ("h100-sxm:2.5", "whole number of at least 1"),
        ("none.json", "cannot read none.json"),
    ],
)
def test_a_wrong_name_gets_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_cluster(source)


def test_a_preset_written_to_a_file_reads_back(tmp_path: Path) -> None:
    profile = load_cluster("a100-sxm:3")
    save(profile, tmp_path / "mine.json")
    assert load_cluster(tmp_path / "mine.json") == profile


@pytest.mark.parametrize("name", preset_names())
def test_preset_files_say_what_they_are(name: str) -> None:
    tree = json.loads((FOLDER / f"{name}.json").read_text())
    assert tree["name"] == name
    assert "meshwright profile" in " ".join(tree["notes"])
    assert [tier["link"] for tier in tree["tiers"]] and all(tier["group_size"] > 1 for tier in tree["tiers"])


@pytest.mark.parametrize("path", sorted(LINK_FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_kind_of_links_is_used_or_waits_for_its_device(path: Path) -> None:
    tree = json.loads(path.read_text())
    assert "group_size" not in tree  # a cluster's
    assert len(tree["source"]["reference"]) > 20
    assert {figure["field"] for figure in tree["figure_sources"]} <= set(tree)


def test_oversubscribed_above_a_pod() -> None:
    small, large = load_cluster("h100-roce-pods:4"), load_cluster("h100-roce-pods:2048")
    assert [tier.group_size for tier in small.tiers] == [8, 32]
    assert small.tiers[-1].contended_bytes_per_s == small.tiers[-1].bytes_per_s  # inside one pod
    assert [tier.group_size for tier in large.tiers] == [8, 3072, 16384]
    assert large.tiers[-1].contended_bytes_per_s == pytest.approx(large.tiers[1].contended_bytes_per_s / 7, rel=0.01)
