"""Schedules that split backward train the same numbers as one process; what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from meshwright import InputError
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ParallelConfig, Schedule
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.executors.apply import parallelize
from meshwright.executors.spec_model import build_spec_model
from meshwright.planner.plan import Plan, default_stages
from meshwright.profiler.launch import Rank, run_ranks
from meshwright.profiler.model import load_model

pytestmark = pytest.mark.multiprocess

# model | config | micro-batches of each data rank, share of targets ignored
CASES = """
example              | pp2 zb-h1                         | n4 ignored0.4
example tied layers5 | pp2 zb-h1                         | n1
example tied         | pp2 zbv                           | n3 ignored0.4
example layers7      | pp2 zbv                           | n1
example tied layers6 | pp2 dualpipev                     | n4 ignored0.4
opt                  | pp2 zbv                           | n2
example tied         | pp2 dp2 zero1 zb-h1               | n4 ignored0.4
example layers5      | pp2 dp2 zb-h1 mbs2                | n2+3
example tied layers5 | pp2 dp2 zero1 zbv                 | n2+3 ignored0.4
example              | pp2 dp2 zbv                       | n4
example tied         | pp2 dp2 zero1 dualpipev           | n4+5
example tied         | pp2 dp2 dualpipev                 | n4
example vocab65 tied | pp2 tp2 sp zb-h1                  | n2 ignored0.4
example kv1 tied     | pp2 tp2 zbv                       | n3
example              | pp2 tp2 sp dualpipev              | n5
gpt2 vocab65         | pp2 tp2 sp zbv                    | n2
gpt_neox             | pp2 dp2 zero1 zb-h1               | n2
qwen3 tied           | pp2 tp2 sp dualpipev              | n4
opt                  | pp2 dp2 zero1 zbv                 | n2 ignored0.4
example layers9      | pp4 zb-h1                         | n10
example tied layers9 | pp4 zbv                           | n5 ignored0.4
example layers9      | pp4 dualpipev                     | n9
llama tied           | pp2 tp2 dp2 zero1 sp zbv          | n3 ignored0.4
example layers8 tied | pp4 dp2 zero1 dualpipev           | n8
example              | pp2 zb-h1 full                    | n4 ignored0.4
example tied layers5 | pp2 dp2 zero1 zbv selective       | n3
gpt2 vocab65         | pp2 dualpipev full                | n5
opt                  | pp2 tp2 sp zbv full               | n3
example kv1          | pp2 tp2 dualpipev selective       | n4
gpt_neox             | pp2 tp2 dp2 zero1 sp zb-h1 selective | n2
"""


@pytest.mark.parametrize("case", [" ".join(line.split()) for line in CASES.strip().splitlines()])
def test_equals_one_process(case: str, assert_equal: Callable[[str], None]) -> None:
    assert_equal(case)


# -- master weights -------------------------------------------------------------------------------------------------


def _gradients(parallel: Any, batch: Any) -> tuple[dict[str, Any], float]:
    parallel.zero_grad()
    parallel.step(batch)
    grads = {name: grad.numpy() for name, grad in parallel.full_gradients().items()}
    return grads, parallel.clip_grad_norm_(1e9).item()


@pytest.mark.parametrize(
    ("split", "whole", "number"),
    [
        ("zb-h1", "1f1b", "n8"),
        ("zbv", "interleaved", "n8"),
        ("dualpipev", "interleaved", "n8"),
        ("zb-h1", "gpipe", "n2"),  # one micro-batch of each data rank, with nothing to add to
        ("zbv", "interleaved", "n2"),
    ],
)
@pytest.mark.parametrize("zero", ["", "zero1"])
def test_gradients_beside_master_weights_add_up_in_their_own_dtype(
    split: str, whole: str, number: str, zero: str, on_split: Callable[..., list[Any]]
) -> None:
    """Each micro-batch has the same gradients in bfloat16 either way; their sums in bfloat16 would differ by 1e-3."""
    torch.set_num_threads(1)
    found = []
    for schedule in (split, whole):
        outcomes = on_split(f"example tied | pp2 dp2 {zero} {schedule} | {number} bf16", _gradients)
        found.append(({name: grad for grads, _ in outcomes for name, grad in grads.items()}, outcomes[0][1]))
    (grads, norm), (expected, expected_norm) = found
    assert grads.keys() == expected.keys()
    assert {grad.dtype for grad in grads.values()} == {np.dtype(np.float32)}
    apart = {name: float(np.abs(grads[name] - grad).max() / np.abs(grad).max()) for name, grad in expected.items()}
    assert max(apart.values()) < 1e-5, apart
    assert norm == pytest.approx(expected_norm, rel=1e-5)


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("example | pp2 dp2 zero2 zbv | n4", "zero_stage=2 saves nothing: use zero_stage 0 or 1"),
        ("example | pp2 dp2 zero3 dualpipev | n4", "zero_stage=3 saves nothing: use zero_stage 0 or 1"),
        ("example | pp2 dualpipev | n3", "dualpipev with pp=2 needs at least 4 micro-batches, found 3"),
        ("example | pp2 zb-h1 | n5", "zb-h1 with pp=2 runs 5 micro-batches in 2 rounds"),
    ],
)
def test_refused(line: str, sentence: str, on_split: Callable[..., list[Any]]) -> None:
    with pytest.raises(InputError, match=sentence):
        on_split(line, _gradients)


def _refusal(rank: Rank, plan: Plan) -> str:
    with pytest.raises(InputError) as caught:
        parallelize(build_spec_model(plan.model).double(), plan)
    return str(caught.value)


def test_stages_elsewhere_are_refused() -> None:
    config = ParallelConfig(pp=2, vpp=2, schedule=Schedule.ZBV)
    spec = load_model(
        {
            "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4,
            "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
        }
    )  # fmt: skip
    plan = Plan(
        framework="meshwright", model=spec,
        workload=Workload(seq_len=8, global_batch_size=4, recipe=RECIPES["fp64"]), cluster_name="test",
        cluster_digest="", environment=None, config=config, placement=Placement(),
        stages=default_stages(spec, config, "cpu"), micro_batches_per_data_rank=(4,), cost=None, memory=None,
        search=None,
    )  # fmt: skip
    looped = replace(plan, stages=tuple(replace(stage, pp_rank=i % 2) for i, stage in enumerate(plan.stages)))
    for said in run_ranks(_refusal, 2, looped, timeout_s=60.0):
        assert said == "zbv has its stages on the pipeline ranks 0, 1, 1, 0; found 0, 1, 0, 1"
