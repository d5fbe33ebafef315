"""The joint fit: which runs, what they weigh, which constants touch which runs, and that a truth is found again."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.cost_models.constants import Value
from meshwright.cost_models.published import PublishedRun, read_published
from meshwright.cost_models.published_fit import (
    CAP,
    FEW,
    Problem,
    expanded,
    fitted_on,
    joint_fit,
    mixed,
)

RUN = {
    "id": "a", "family": "a", "gpu_type": "A100-80GB-SXM", "gpus_per_node": "8", "num_gpus": "4",
    "interconnect": "NVLink", "framework": "Megatron-DeepSpeed", "model": "gpt", "arch_family": "gpt",
    "layers": "12", "hidden": "1024", "heads": "16", "kv_heads": "16", "ffn": "4096", "vocab": "50304",
    "seq_len": "1024", "precision": "bf16", "tp": "1", "pp": "2", "vpp": "1", "dp": "2", "cp": "1", "ep": "1",
    "micro_batch": "2", "global_batch": "16", "recompute": "full", "schedule": "1f1b", "step_time_s": "0.2",
    "usable_for": "time", "status": "ok", "zero_stage": "0",
}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> tuple[PublishedRun, ...]:
    rows = [
        RUN,
        RUN | {"id": "b", "tp": "2", "dp": "1", "micro_batch": "4"},
        RUN | {"id": "c", "tp": "4", "dp": "1", "pp": "1", "micro_batch": "1"},
        RUN | {"id": "d", "family": "n", "framework": "nanotron", "gpu_type": "H100-80GB", "interconnect": "EFA"},
        RUN | {"id": "e", "family": "n", "framework": "nanotron", "gpu_type": "H100-80GB", "zero_stage": "1"},
        RUN | {"id": "f", "step_time_s": ""},
    ]
    path = tmp_path / "runs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(RUN))
        writer.writeheader()
        writer.writerows(rows)
    return read_published(path).runs


def test_runs_without_a_time_and_runs_of_either_version_are_left_out(runs: tuple[PublishedRun, ...]) -> None:
    assert [run.row_id for run in runs if mixed(run)] == ["d"]  # a pipeline of nanotron's, replicas without ZeRO
    assert [run.row_id for run in fitted_on(runs)] == ["a", "b", "c", "e"]


def test_weights_let_a_large_family_count_as_little_more_than_a_small_one(runs: tuple[PublishedRun, ...]) -> None:
    problem = Problem(fitted_on(runs))
    assert problem.weights.tolist() == pytest.approx([CAP / (3 + FEW)] * 3 + [CAP / (1 + FEW)])


def test_constants_touch_the_runs_of_their_owner(runs: tuple[PublishedRun, ...]) -> None:
    problem = Problem(fitted_on(runs))
    touched = {
        (prior.value.of, prior.value.name): {problem.runs[at].row_id for group in groups for at in group.positions}
        for prior, groups in zip(problem.priors, problem.touched, strict=True)
    }
    assert touched["A100-SXM4-80GB", "matmul_factor"] == {"a", "b", "c"}
    assert touched["H100-SXM5-80GB", "matmul_factor"] == {"e"}
    assert touched["megatron-deepspeed", "host.step_s"] == {"a", "b", "c"}
    assert touched["nanotron", "overlap_tp"] == {"e"}
    assert not [of for of, _ in touched if of in ("llm-foundry", "torchtitan")]
    base = problem.predict(())
    moved = (Value(owner="target", of="megatron-deepspeed", name="host.step_s", value=0.5),)
    assert np.flatnonzero(problem.predict(moved) != base).tolist() == [0, 1, 2]


def test_devices_of_one_chip_share_a_factor_unless_they_have_their_own() -> None:
    chip = Value(owner="device", of="H100-SXM5-80GB", name="matmul_factor", value=1.2)
    own = replace(chip, of="H100-SXM5-96GB-500W", value=1.3)
    found = {each.of: each.value for each in expanded((chip, own))}
    assert found == {"H100-SXM5-80GB": 1.2, "H200-SXM5-141GB": 1.2, "H100-SXM5-96GB-500W": 1.3}


def test_a_truth_is_found_again_over_processes(runs: tuple[PublishedRun, ...]) -> None:
    chosen = [run for run in fitted_on(runs) if run.family == "a"]
    truth = (Value(owner="target", of="megatron-deepspeed", name="host.launch_factor", value=9.0),)
    seconds = Problem(chosen).predict(truth)
    made = [
        replace(run, measured=replace(run.measured, step_s=float(step)))
        for run, step in zip(chosen, seconds, strict=True)
    ]
    told: list[str] = []
    found = joint_fit(Problem(made), num_workers=2, max_evaluations=12, on_progress=told.append)
    assert np.abs(found.after).max() < 0.05 < np.abs(found.before).max()
    launches = next(each.value for each in found.values if each.name == "host.launch_factor")
    assert launches == pytest.approx(9.0, rel=0.25)
    assert told[0].startswith("round 1: ")
    assert all(float(f"{each.value:.4g}") == each.value for each in found.values)  # as they are written
