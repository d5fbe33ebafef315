"""A handful of steps "measured" under constants that nobody knows: calibrated, and judged on plans never measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cli import main
from meshwright.cost_models.constants import Value, on_cluster, on_framework
from meshwright.cost_models.framework import supported
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute, Schedule, legal
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload
from meshwright.planner.calibrate import Calibration, MeasuredPlan, calibrate, read_measured
from meshwright.planner.plan import Plan, default_stages, save_plan
from meshwright.profiler import artifact
from meshwright.profiler.cluster import ClusterProfile, Provenance, load_cluster
from meshwright.profiler.environment import Environment
from meshwright.profiler.model import load_model
from meshwright.profiler.steps import RankMeasurement, StepMeasurement

MODEL, WORKLOAD = load_model("llama3.2-1b"), Workload(seq_len=2048, global_batch_size=64)
CLUSTER = load_cluster("h100-sxm:2")
TRUTH = {
    ("device", "matmul_factor"): 1.25,
    ("device", "memory_factor"): 1.3,
    ("target", "host.launch_factor"): 5.0,
    ("target", "host.step_s"): 0.03,
    ("target", "overlap_dp_reduce"): 0.3,
}


def truth() -> tuple[Value, ...]:
    of = {"device": CLUSTER.device.kind, "target": "meshwright"}
    return tuple(
        Value(owner=owner, of=of[owner], name=name, value=value)  # type: ignore[arg-type]
        for (owner, name), value in TRUTH.items()
    )


def configs() -> list[ParallelConfig]:
    """Every supported mix of these degrees on 16 devices."""
    found = []
    for tp, pp, micro, zero, recompute in product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4), (0, 1, 3), Recompute):
        dp = 16 // tp // pp
        if tp * pp * dp == 16 and (dp > 1 or zero == 0):
            found.append(
                ParallelConfig(
                    tp=tp,
                    pp=pp,
                    dp=dp,
                    dp_shard=dp if zero else 1,
                    zero_stage=zero,
                    micro_batch_size=micro,
                    recompute=recompute,
                    sequence_parallel=tp > 1,
                    vocab_parallel=tp > 1,
                    schedule=Schedule.ONE_F_ONE_B,
                )
            )
    batch = ConfigBatch.from_configs(found)
    runs = (legal(batch, MODEL, WORKLOAD) < 0) & supported(batch, framework_named("meshwright"), MODEL, WORKLOAD)
    return [config for config, run in zip(found, runs, strict=True) if run]


def plan_of(config: ParallelConfig, cluster: ClusterProfile = CLUSTER) -> Plan:
    return Plan(
        framework="meshwright",
        model=MODEL,
        workload=WORKLOAD,
        cluster_name=cluster.name,
        cluster_digest=cluster.digest,
        environment=None,
        config=config,
        placement=Placement(),
        stages=default_stages(MODEL, config, cluster.device.kind),
        micro_batches_per_data_rank=(WORKLOAD.global_batch_size // config.dp // config.micro_batch_size,) * config.dp,
        cost=None,
        memory=None,
        search=None,
    )


def step_s(config: ParallelConfig, cluster: ClusterProfile, values: tuple[Value, ...] = ()) -> float:
    framework = on_framework(framework_named("meshwright"), values)
    batch = ConfigBatch.from_configs([config])
    return float(estimate_batch(MODEL, WORKLOAD, on_cluster(cluster, values), framework, batch).step_s[0])


def measured(chosen: Sequence[ParallelConfig], noise: Sequence[float] | None = None) -> list[MeasuredPlan]:
    factors = noise or [1.0] * len(chosen)
    return [
        MeasuredPlan(
            plan=plan_of(config), step_s=step_s(config, CLUSTER, truth()) * factor, spread=0.02, steps=10, where="m"
        )
        for config, factor in zip(chosen, factors, strict=True)
    ]


def different(every: Sequence[ParallelConfig]) -> list[ParallelConfig]:
    """Four plans that differ in tp, pp, micro batch and ZeRO, as a user who reads the documentation measures."""
    first = {
        "no split of a layer": lambda config: config.tp == config.pp == 1 and config.micro_batch_size == 4,
        "bound by launches": lambda config: config.tp == 4 and config.micro_batch_size == 1,
        "a pipeline": lambda config: config.pp == 4 and config.tp == 1,
        "sharded weights": lambda config: config.zero_stage == 3 and config.tp == 2,
    }
    return [next(config for config in every if wanted(config)) for wanted in first.values()]


def others(every: Sequence[ParallelConfig], chosen: Sequence[ParallelConfig], count: int = 40) -> list[ParallelConfig]:
    order = np.random.default_rng(3).permutation(len(every))
    return [every[index] for index in order if every[index] not in chosen][:count]


@lru_cache
def on_exact_steps() -> Calibration:
    return calibrate(CLUSTER, measured(different(configs())))


def errors(cluster: ClusterProfile, judged: Sequence[ParallelConfig]) -> NDArray[np.float64]:
    return np.array([abs(step_s(config, cluster) / step_s(config, CLUSTER, truth()) - 1.0) for config in judged])


@pytest.mark.parametrize("noise", [None, (1.02, 0.98, 1.015, 0.985)], ids=["exact", "noisy"])
def test_four_steps_mend_the_predictions_of_forty_other_plans(noise: tuple[float, ...] | None) -> None:
    chosen = different(configs())
    judged = others(configs(), chosen)
    found = calibrate(CLUSTER, measured(chosen, noise)) if noise else on_exact_steps()
    before, after = errors(CLUSTER, judged), errors(found.cluster, judged)
    assert len(judged) == 40
    assert np.median(before) > 0.25
    assert np.median(after) < (0.02 if noise is None else 0.03)
    assert after.max() < 0.15
    launches = next(each for each in found.constants if each.name == "host.launch_factor")
    assert launches.after == pytest.approx(5.0, rel=0.15)
    assert [plan.measured_s for plan in found.plans] == [each.step_s for each in measured(chosen, noise)]
    assert all(
        abs(plan.after_s / plan.measured_s - 1) < abs(plan.before_s / plan.measured_s - 1) for plan in found.plans
    )


def test_a_calibrated_cluster_says_what_was_calibrated_and_from_what(tmp_path: Path) -> None:
    found = calibrate(CLUSTER, measured(different(configs())[:2]))
    constants = found.cluster.calibrated
    assert {(each.owner, each.of) for each in constants} <= {("device", CLUSTER.device.kind), ("target", "meshwright")}
    assert all(each.source.provenance is Provenance.MEASURED for each in constants)
    assert constants[0].source.reference == "20 steps of 2 plans: meshwright calibrate"
    artifact.save(found.cluster, tmp_path / "cluster.json")
    assert load_cluster(tmp_path / "cluster.json") == found.cluster
    assert found.cluster.digest == CLUSTER.digest  # the same machines: plans made before still run
    again = calibrate(found.cluster, measured(different(configs())[:2]))
    assert again.cluster == found.cluster  # replaced, not refined
    assert "2 plans tell at most 2 constants apart" in again.notes[0]


def test_one_measurement_says_what_it_cannot_tell() -> None:
    config = different(configs())[0]
    found = calibrate(CLUSTER, measured([config]))
    assert found.notes[0].startswith("one plan tells how far its own step is off, not why")
    assert found.plans[0].after_s == pytest.approx(found.plans[0].measured_s, rel=0.05)


def test_steps_as_predicted_change_nothing() -> None:
    config = different(configs())[0]
    exact = MeasuredPlan(plan=plan_of(config), step_s=step_s(config, CLUSTER), spread=0.0, steps=3, where="m")
    found = calibrate(CLUSTER, [exact])
    assert found.plans[0].before_s == found.plans[0].measured_s
    assert found.plans[0].after_s == pytest.approx(found.plans[0].measured_s, rel=0.01)


# -- files ------------------------------------------------------------------------------------------------------------


def measurement_file(path: Path, config: ParallelConfig, *, with_plan: bool = True, seconds: float = 0.0) -> Path:
    plan = plan_of(config)
    seconds = seconds or step_s(config, CLUSTER, truth())
    record = StepMeasurement(
        plan_digest=plan.digest,
        framework="meshwright",
        config=config.describe(),
        step_s=seconds,
        step_s_spread=0.01,
        predicted_step_s=None,
        predicted_peak_bytes=None,
        losses=(5.0, 4.0),
        ranks=(RankMeasurement(rank=0, host="a", device="cuda", step_s=(seconds, seconds), peak_bytes=None),),
        environment=Environment(meshwright="0.1.0", python="3.11"),
        measured_at="2026-11-20T00:00:00Z",
        plan=json.loads(artifact.to_json(plan)) if with_plan else None,
    )
    artifact.save(record, path)
    return path


def code_of(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def test_the_command_shows_errors_before_and_after_and_writes_the_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact.save(CLUSTER, tmp_path / "cluster.json")
    files = [measurement_file(tmp_path / f"m{i}.json", config) for i, config in enumerate(different(configs())[:2])]
    assert code_of("calibrate", tmp_path / "cluster.json", *files, "-o", tmp_path / "out.json") == 0
    shown = capsys.readouterr().out
    assert "predicted before" in shown and "median error" in shown and "host.launch_factor" in shown
    assert f"wrote {tmp_path / 'out.json'}" in shown
    assert load_cluster(tmp_path / "out.json").calibrated
    assert code_of("cluster", "show", tmp_path / "out.json") == 0
    assert "4 steps of 2 plans: meshwright calibrate" in capsys.readouterr().out
    assert code_of("calibrate", tmp_path / "cluster.json", *files, "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert [plan["framework"] for plan in tree["plans"]] == ["meshwright", "meshwright"]


def test_a_measurement_without_its_plan_takes_the_file_beside_it(tmp_path: Path) -> None:
    config = different(configs())[0]
    old = measurement_file(tmp_path / "m.json", config, with_plan=False)
    with pytest.raises(
        InputError, match=r"does not hold the plan that it measured .* name the plan's file with --plan"
    ):
        read_measured([old])
    save_plan(plan_of(config), tmp_path / "plan.json")
    assert read_measured([old], [tmp_path / "plan.json"]) == read_measured(
        [measurement_file(tmp_path / "m.json", config)]
    )


def test_files_that_contradict_themselves_or_each_other_are_refused(tmp_path: Path) -> None:
    first, second = different(configs())[:2]
    path = measurement_file(tmp_path / "m.json", first)
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"step_s": 2 * tree["step_s"]}))
    with pytest.raises(InputError, match=r"contradicts itself: step_s is .* the slowest rank took"):
        read_measured([path])
    path.write_text(json.dumps(tree | {"plan": json.loads(artifact.to_json(plan_of(second)))}))
    with pytest.raises(InputError, match=r"measured plan sha256:.* but the plan in it is sha256:"):
        read_measured([path])
    files = [measurement_file(tmp_path / f"{seconds}.json", first, seconds=seconds) for seconds in (1.0, 2.0)]
    with pytest.raises(InputError, match=r"measured the same plan .* at 1 s and 2 s: leave out"):
        calibrate(CLUSTER, read_measured(files))


def test_measurements_of_another_cluster_or_device_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to calibrate on"):
        calibrate(CLUSTER, [])
    given = measured(different(configs())[:1])
    with pytest.raises(InputError, match=r"was measured on H100-SXM5-80GB, cluster a100-sxm:2 has A100"):
        calibrate(load_cluster("a100-sxm:2"), given)
    with pytest.raises(InputError, match="calibrate the cluster that its plan was made on"):
        calibrate(load_cluster("h100-efa:2"), given)


def test_constants_of_one_cluster_leave_other_targets_alone() -> None:
    found = on_exact_steps()
    config = different(configs())[0]
    batch, other = ConfigBatch.from_configs([config]), framework_named("llm-foundry")
    alone = tuple(each for each in found.cluster.calibrated if each.owner == "device")
    seconds = [
        float(estimate_batch(MODEL, WORKLOAD, cluster, other, batch).step_s[0])
        for cluster in (found.cluster, replace(found.cluster, calibrated=alone))
    ]
    assert seconds[0] == seconds[1]
