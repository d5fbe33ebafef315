"""What a schedule that splits backward puts off and no longer hides."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.parts import block_parts
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.step import estimate
from meshwright.cost_models.strategy import V_SHAPED, ConfigBatch, ParallelConfig, Recompute, Schedule
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import load_model

MODEL, CLUSTER = load_model("llama3-8b"), load_cluster("h100-sxm:2")
WORKLOAD = Workload(seq_len=4096, global_batch_size=128)


def config(schedule: Schedule, **changes: object) -> ParallelConfig:
    vpp = 2 if schedule in (Schedule.INTERLEAVED, *V_SHAPED) else 1
    return ParallelConfig(pp=4, dp=4, vpp=vpp, schedule=schedule, zero_stage=1, dp_shard=4, **changes)  # type: ignore[arg-type]


def test_our_executors_put_off_matrices_of_blocks_alone() -> None:
    batch, kinds = ConfigBatch.from_configs([config(Schedule.ZB_H1)]), block_kinds(MODEL)
    for name, puts_off in (("meshwright", [False, True, False]), ("torchtitan", [True, True, True])):
        parts = block_parts(kinds, MODEL, WORKLOAD, CLUSTER, framework_named(name), batch, Placement())
        assert [bool((part.compute_weights > 0).all()) for part in parts] == puts_off
        assert all((part.compute_weights <= part.compute_backward).all() for part in parts)


def test_reductions_after_a_split_backward_are_exposed() -> None:
    whole, split = (estimate(MODEL, WORKLOAD, CLUSTER, config(s)).cost for s in (Schedule.ONE_F_ONE_B, Schedule.ZB_H1))
    assert split.dp_s > whole.dp_s and split.hidden_s < whole.hidden_s
    assert split.dp_s + split.hidden_s == pytest.approx(whole.dp_s + whole.hidden_s, rel=0.1)
    assert split.bubble_s < whole.bubble_s


def test_recompute_costs_what_it_costs_without_a_split() -> None:
    for recompute in Recompute:
        whole, split = (
            estimate(MODEL, WORKLOAD, CLUSTER, config(s, recompute=recompute)).cost
            for s in (Schedule.ONE_F_ONE_B, Schedule.ZB_H1)
        )
        assert np.isclose(split.recompute_s, whole.recompute_s, rtol=0.1)  # of the rank that finishes last
        assert (split.recompute_s > 0) is (recompute is not Recompute.NONE)
