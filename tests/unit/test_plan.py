from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright import InputError
from meshwright.cost_models.strategy import ParallelConfig, Recompute, Schedule
from meshwright.cost_models.workload import Workload
from meshwright.planner.plan import default_stages, load_plan, save_candidates, save_plan
from meshwright.planner.search import make_plan, plan_for
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import load_model

LLAMA = load_model("llama3-8b")
CLUSTER = load_cluster("h100-sxm:2")
WORKLOAD = Workload(seq_len=4096, global_batch_size=64)
LOOPED = ParallelConfig(pp=2, vpp=2, dp=8, schedule=Schedule.INTERLEAVED, recompute=Recompute.FULL)


def test_a_plan_reads_back_equal(tmp_path: Path) -> None:
    plan = make_plan(LLAMA, WORKLOAD, CLUSTER, top=3)
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.digest == plan.digest


def test_digest_is_of_what_runs_and_not_of_how_it_was_found() -> None:
    searched = make_plan(LLAMA, WORKLOAD, CLUSTER)
    bare = replace(searched, cost=None, memory=None, search=None, assumptions=(), environment=None, cluster_name="x")
    assert bare.digest == searched.digest
    assert replace(searched, workload=Workload(seq_len=2048, global_batch_size=64)).digest != searched.digest
    assert replace(searched, cluster_digest="sha256:0").digest != searched.digest


def test_default_stages_of_a_looped_schedule_by_hand() -> None:
    stages = default_stages(LLAMA, LOOPED, "H100")
    assert [(stage.pp_rank, stage.chunk) for stage in stages] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [(stage.first_layer, stage.last_layer) for stage in stages] == [(0, 8), (8, 16), (16, 24), (24, 32)]
    assert {stage.recompute for stage in stages} == {(Recompute.FULL,) * 8}


def test_default_stages_of_a_v_come_back_to_the_first_rank() -> None:
    config = ParallelConfig(pp=2, vpp=2, dp=8, schedule=Schedule.ZBV)
    stages = default_stages(LLAMA, config, "H100")
    assert [(stage.pp_rank, stage.chunk) for stage in stages] == [(0, 0), (1, 0), (1, 1), (0, 1)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": ()}, "stages must cover layers 0 to 32 in order"),
        ({"config": ParallelConfig(pp=4, dp=4)}, "pp\\*vpp is 4, found 2 stages"),
        ({"micro_batches_per_data_rank": (8,)}, "must have dp=8 entries"),
        ({"micro_batches_per_data_rank": (7,) * 8}, "micro-batches hold 56 sequences, not 64"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any], sentence: str) -> None:
    plan = plan_for(ParallelConfig(pp=2, dp=8), LLAMA, WORKLOAD, CLUSTER)
    with pytest.raises(InputError, match=sentence):
        replace(plan, **changes)


def test_each_layer_needs_its_recompute_choice() -> None:
    plan = plan_for(ParallelConfig(dp=16), LLAMA, WORKLOAD, CLUSTER)
    with pytest.raises(InputError, match="recompute choice of each of its layers"):
        replace(plan, stages=(replace(plan.stages[0], recompute=(Recompute.NONE,)),))


def test_stages_in_another_order_are_refused() -> None:
    plan = plan_for(ParallelConfig(pp=2, dp=8), LLAMA, WORKLOAD, CLUSTER)
    with pytest.raises(InputError, match="in order"):
        replace(plan, stages=plan.stages[::-1])


def test_uneven_micro_batches_are_a_plan() -> None:
    plan = plan_for(ParallelConfig(pp=2, dp=8), LLAMA, WORKLOAD, CLUSTER)
    uneven = replace(plan, micro_batches_per_data_rank=(9, 7, 8, 8, 8, 8, 8, 8))
    assert sum(uneven.micro_batches_per_data_rank) == 64


def test_candidates_are_written_in_order(tmp_path: Path) -> None:
    plans = [
        plan_for(ParallelConfig(tp=tp, dp=16 // tp, vocab_parallel=tp > 1), LLAMA, WORKLOAD, CLUSTER) for tp in (1, 2)
    ]
    paths = save_candidates(plans, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["plan-001.json", "plan-002.json"]
    assert [load_plan(path).config.tp for path in paths] == [1, 2]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        save_candidates(plans, tmp_path / "file")
    assert stat.S_ISREG(paths[0].stat().st_mode)
