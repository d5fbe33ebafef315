"""The training script that users start from: runs a plan, makes the loss fall, and refuses another model's plan."""

from __future__ import annotations

import re

import pytest
import torch
import train
from llama import Llama, LlamaConfig
from torch import Tensor

import meshwright
from meshwright.cost_models.workload import recipe_named
from meshwright.profiler.launch import Rank, run_ranks

pytestmark = pytest.mark.multiprocess

SIZES = LlamaConfig(hidden=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48, tied=True)
WORKLOAD = meshwright.Workload(seq_len=16, global_batch_size=4, recipe=recipe_named("fp32"))


def plan_of(model: meshwright.ModelSpec, **fixed: int) -> meshwright.Plan:
    return meshwright.make_plan(model, WORKLOAD, meshwright.load_cluster("h100-sxm:1"), gpus=2, constraints=fixed)


def small() -> meshwright.ModelSpec:
    with torch.device("meta"):
        return meshwright.trace_model(Llama(SIZES), name="small")


def trained(rank: Rank, plan: meshwright.Plan, text: Tensor) -> None:
    train.train(plan, text, steps=40)


@pytest.mark.parametrize("axis", ["tp", "pp", "dp"])
def test_it_trains_as_planned(axis: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = torch.tensor(list(b"how vexingly quick daft zebras jump; " * 4))
    run_ranks(trained, 2, plan_of(small(), **{axis: 2}), text, timeout_s=60)
    lines = capfd.readouterr().out.splitlines()
    losses = [float(found[1]) for line in lines if (found := re.match(r"step \d+0: loss ([\d.]+), ", line))]
    assert len(losses) == len(lines) == 4, lines  # rank 0 alone reports
    assert losses[-1] < 0.8 * losses[0]
    assert "s a step (predicted " in lines[0] and lines[0].endswith(" tokens/s")


def test_the_plan_of_another_model_is_refused() -> None:
    with pytest.raises(meshwright.InputError, match="gpt2-small, whose layers the example Llama does not have"):
        train.build_model(plan_of(meshwright.load_model("gpt2-small")))
