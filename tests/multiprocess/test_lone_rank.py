"""One rank of many without its peers, on the path of the GPU tests: real tensors take what a dry run says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meshwright import InputError
from meshwright.cost_models.strategy import Schedule
from meshwright.executors.dry_run import DryRun, dry_run, stage_ranks
from meshwright.executors.lone_rank import run_alone
from meshwright.planner.plan import Plan
from meshwright.profiler.model import load_model

pytestmark = pytest.mark.multiprocess

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_on_gpu.py"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("memory_on_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_on_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


BENCH = _script()
LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
FEW = [
    next(case for case in BENCH.CASES if case.config.schedule is schedule and case.config.zero_stage == zero)
    for schedule, zero in ((Schedule.INTERLEAVED, 1), (Schedule.ZBV, 0))
] + [next(case for case in BENCH.CASES if case.config.pp == 1 and case.config.zero_stage == zero) for zero in (2, 3)]


@pytest.mark.parametrize("case", FEW, ids=lambda case: str(case.name))
def test_a_share_takes_what_its_dry_run_says(case: Any) -> None:
    found = BENCH.compare(case, "cpu")
    assert found.measured_bytes == pytest.approx(found.dry_bytes, rel=0.01)
    assert found.allocator_bytes is None
    assert 0.5 < found.memory.peak_bytes / found.measured_bytes < 1.5  # predicted for a GPU's kernels


def test_kinds_of_a_rank_of_1024() -> None:
    case = next(case for case in BENCH.CASES if case.config.world_size == 1024)
    plan = BENCH.shrunk(case)
    rank = stage_ranks(plan)[3]
    found = run_alone(plan, rank, device="cpu")
    kinds = {kind.kind: kind.num_bytes for kind in found.kinds}
    assert found.rank == rank and sum(kinds.values()) == found.peak_bytes
    # two blocks of hidden 128 over tp 8: a query head of 16, the only key and value head, 16 of 128 feed-forward units,
    # norms; in float32, an eighth of each tensor over dp 8, and of each tensor up to 512 bytes more
    params = 2 * (2 * 128 * 16 + 2 * 16 * 128 + 3 * 128 * 16 + 2 * 128) * 4 // 8
    assert params <= kinds["params"] < params + 2 * 9 * 512
    assert 2 * params <= kinds["optimizer"] < 2 * params + 2 * 9 * 3 * 512


@pytest.mark.parametrize("axes", [{"dp": 48, "zero_stage": 3}, {"dp": 200, "zero_stage": 2, "tp": 2}], ids=str)
def test_shards_are_padded_as_counted(axes: dict[str, int]) -> None:
    # hidden 64, 3 * 16 feed-forward units, 511 words: few of these are multiples of the ranks
    spec = load_model({**LLAMA, "vocab_size": 511, "intermediate_size": 48})
    _check_shards(BENCH.plan_of(BENCH._case("odd", 2, 64, **axes), spec), None, num_tensors=2 * 9 + 3)


def test_stacks_of_few_experts_are_cut_as_counted() -> None:
    # 4 experts over 32 ranks: cut along their width, where padded each rank would keep one of each layer's
    fields: dict[str, Any] = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    plan = BENCH.plan_of(BENCH._case("experts", 1, 64, dp=32, zero_stage=3), load_model(fields))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    found = _check_shards(plan, model, num_tensors=2 * 9 + 3)
    assert found.params_bytes < 2 * 3 * 64 * 64 * 4


def _check_shards(plan: Plan, model: Any, num_tensors: int) -> DryRun:
    found, predicted = dry_run(model, plan, 0), plan.memory
    assert predicted is not None
    assert 0 <= found.params_bytes - predicted.params_bytes <= num_tensors * 512
    assert 0 <= found.optimizer_bytes - predicted.optimizer_bytes <= 3 * num_tensors * 512
    return found


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="device must be cpu"):
        run_alone(BENCH.shrunk(FEW[0]), device="tpu")


def test_the_cases_are_many_and_varied() -> None:
    configs = [case.config for case in BENCH.CASES]
    assert len(configs) >= 12
    assert {config.zero_stage for config in configs} == {0, 1, 2, 3}
    assert max(config.world_size for config in configs) >= 1024
    assert len({config.schedule for config in configs}) >= 5
