"""`meshwright cluster` and what it prints: exit codes, tables, heat maps."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright import InputError, load_cluster
from meshwright.cli import main
from meshwright.profiler.artifact import save
from meshwright.profiler.cluster import ClusterProfile, LinkMatrix
from meshwright.profiler.units import format_bytes_per_s
from meshwright.terminal.heatmap import bandwidth_matrix, by_node, heatmap_lines, save_heatmap


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Two nodes of two devices, the links of the second pair of ranks slow."""
    rates = ((0.0, 100e9, 10e9, 10e9), (100e9, 0.0, 10e9, 10e9), (10e9, 10e9, 0.0, 50e9), (10e9, 10e9, 50e9, 0.0))
    matrix = LinkMatrix(latency_s=rates, bytes_per_s=rates)
    preset = load_cluster("a100-sxm:2")
    tiers = (replace(preset.tiers[0], group_size=2), replace(preset.tiers[1], group_size=4))
    groups = (replace(preset.node_groups[0], devices_per_node=2),)
    save(replace(preset, name="mine", node_groups=groups, tiers=tiers, link_matrix=matrix), tmp_path / "mine.json")
    return tmp_path / "mine.json"


def test_show_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cluster", "show", "h100-sxm:2") == 0
    out = capsys.readouterr().out
    node = format_bytes_per_s(load_cluster("h100-sxm:2").tiers[0].bytes_per_s)
    for words in ("16 devices", "80.0 GiB", "990 TFLOP/s", node, "48.5 GB/s", "assumed", "bandwidth by rank"):
        assert words in out


def test_show_as_json_is_the_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cluster", "show", "v100-sxm", "--json") == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["kind"] == "V100-SXM2-32GB"


def test_show_a_measured_cluster_draws_its_links(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("cluster", "show", str(measured), "--heatmap", str(tmp_path / "links.svg")) == 0
    assert "10.0 GB/s" in capsys.readouterr().out  # the slow end of the scale
    assert (tmp_path / "links.svg").read_text().startswith("<?xml")
    save_heatmap(load_cluster(measured), tmp_path / "links.png")
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")


def test_presets_are_listed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cluster", "preset") == 0
    assert "h200-sxm" in capsys.readouterr().out
    assert run("cluster", "preset", "h100-sxm:4", "-o", str(tmp_path / "mine.json")) == 0
    assert load_cluster(tmp_path / "mine.json") == load_cluster("h100-sxm:4")


def test_diff_says_percent(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cluster", "diff", "h100-sxm:2", "h200-sxm:2") == 0
    assert "+43.3 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cluster", "show", "h100-smx"], "did you mean h100-sxm"),
        (["cluster", "show", "h100-sxm", "--heatmap", "links.pdf"], "ends in .png or .svg"),
        (["cluster", "preset", "-o", "x.json"], "name the preset"),
        (["cluster", "preset", "none"], "unknown cluster 'none'"),
        (["cluster", "diff", "h100-sxm", "nowhere.json"], "cannot read nowhere.json"),
        (["profile", "-o", "x.json", "--budget", "soon"], "cannot read 'soon' as a time"),
        (["profile", "-o", "x.json", "--device", "tpu"], "unknown device 'tpu'"),
        (["profile", "-o", "nowhere/x.json"], "cannot write nowhere/x.partial.json: No such file or directory"),
    ],
)
def test_wrong_input_is_one_sentence_and_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_without_matplotlib_the_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install matplotlib"):
        save_heatmap(load_cluster("h100-sxm"), tmp_path / "links.png")


def test_a_preset_gets_its_matrix_from_tiers() -> None:
    profile = load_cluster("h100-sxm:2")
    matrix = bandwidth_matrix(profile)
    assert len(matrix) == 16
    assert (matrix[0][0], matrix[0][7], matrix[0][8]) == (0.0, *(tier.bytes_per_s for tier in profile.tiers))


def test_by_node_is_the_mean_over_pairs(measured: Path) -> None:
    profile: ClusterProfile = load_cluster(measured)
    assert by_node(bandwidth_matrix(profile), [2, 2]) == ((100e9, 10e9), (10e9, 50e9))


def test_heat_map_lines_by_hand() -> None:
    lines = [line.plain for line in heatmap_lines(((0.0, 1e9), (100e9, 0.0)), colours=False)]
    assert lines == ["  0 · ░░", "  1 ██· ", "    ░░ 1.00 GB/s   ██ 100 GB/s   (row sends to column)"]
    assert heatmap_lines(((0.0,),), colours=False) == []
