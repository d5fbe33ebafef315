"""Real steps on one GPU: a plan made from its own profile runs, and its peak is near the predicted one."""

from __future__ import annotations

import pytest
import torch

from meshwright import Workload, load_model
from meshwright.executors.run import measure_plans
from meshwright.planner.search import make_plan
from meshwright.profiler.profile import profile_cluster

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.device_count(), reason="no CUDA device")]


def test_a_plan_runs_and_its_peak_is_near_the_predicted_one() -> None:
    cluster = profile_cluster(num_ranks=1, device="cuda", budget_s=10.0)
    assert cluster is not None
    workload = Workload(seq_len=1024, global_batch_size=4)
    plan = make_plan(load_model("qwen3-0.6b"), workload, cluster)
    assert plan.memory is not None
    (measured,) = measure_plans([plan], steps=3, warmup=2, device="cuda")
    peak = measured.ranks[0].peak_bytes
    assert peak is not None
    assert 0.7 < peak / plan.memory.peak_bytes < 1.3
    assert all(loss == loss and loss > 0 for loss in measured.losses)
