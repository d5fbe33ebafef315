"""Measuring plans on real ranks: what is recorded, several in one start, a rank that dies, a virtual device."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright import InputError
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ParallelConfig
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.executors.measure import measure_files
from meshwright.executors.run import UnfinishedRun, measure_plans
from meshwright.executors.spec_model import build_spec_model
from meshwright.planner.plan import Plan, default_stages, save_plan
from meshwright.profiler.launch import Rank, run_ranks
from meshwright.profiler.model import ModelSpec, load_model
from meshwright.profiler.steps import StepMeasurement, load_measurement

pytestmark = pytest.mark.multiprocess

FIELDS = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


def plan_of(recipe: str = "fp32", **axes: Any) -> Plan:
    spec, config = load_model(FIELDS), ParallelConfig(**axes)
    return Plan(
        framework="meshwright", model=spec,
        workload=Workload(seq_len=16, global_batch_size=4, recipe=RECIPES[recipe]), cluster_name="test",
        cluster_digest="", environment=None, config=config, placement=Placement(),
        stages=default_stages(spec, config, "cpu"),
        micro_batches_per_data_rank=(config.num_microbatches(4),) * config.dp, cost=None, memory=None, search=None,
    )  # fmt: skip


def test_several_plans_in_one_start() -> None:
    plans = [plan_of(dp=2), plan_of(pp=2), plan_of(tp=2, vocab_parallel=True)]
    seen: list[int] = []
    measured = measure_plans(plans, steps=3, warmup=1, on_step=lambda found: seen.append(len(found[0].losses)))
    assert seen == [1, 2, 3]
    assert [one.plan_digest for one in measured] == [plan.digest for plan in plans]
    for one in measured:
        assert len(one.ranks) == 2 and all(len(rank.step_s) == 3 for rank in one.ranks)
        slowest = sorted(max(times) for times in zip(*(rank.step_s for rank in one.ranks), strict=True))
        assert one.step_s == slowest[1]
        assert one.losses[-1] < one.losses[0]  # the same random batch every step
        assert one.environment.backend == "gloo" and one.ranks[0].compute_s is None
    # tensor and pipeline ranks are given the same batch, so these two are one training run
    assert measured[1].losses == pytest.approx(measured[2].losses, rel=1e-4)


def test_a_cpu_counts_tensors_while_it_warms_up() -> None:
    plans = [plan_of(dp=2, zero_stage=3, dp_shard=2), plan_of(pp=2)]
    counted = measure_plans(plans, steps=1, warmup=2)
    for one in counted:
        for rank in one.ranks:
            assert rank.peak_bytes == sum(kind.num_bytes for kind in rank.kinds)
            assert rank.reserved_bytes is None and rank.fragmentation is None
        assert one.peak_bytes == max(rank.peak_bytes or 0 for rank in one.ranks)
    kinds = {kind.kind: kind.num_bytes for kind in counted[0].ranks[0].kinds}
    # halves of 2 * 64 * 32 + 2 * (32 * 32 * 3 + 3 * 32 * 48 + 2 * 32) + 32 numbers in float32, and AdamW's two of each;
    # beyond them every small tensor is rounded up to 512 bytes
    half = (2 * 64 * 32 + 2 * (32 * 32 * 3 + 3 * 32 * 48 + 2 * 32) + 32) * 4 // 2
    assert half <= kinds["params"] < half + 21 * 512
    assert 2 * half <= kinds["optimizer"] < 2 * half + 63 * 512
    (uncounted,) = measure_plans(plans[:1], steps=1, warmup=1)
    assert uncounted.peak_bytes is None and uncounted.ranks[0].kinds == ()


def _measured_here(rank: Rank) -> list[float]:
    return list(measure_plans([plan_of(dp=2)], steps=2, warmup=0)[0].losses)


def test_ranks_in_a_process_group_measure_together() -> None:
    first, second = run_ranks(_measured_here, 2, timeout_s=60)
    assert first == second and len(first) == 2


def test_master_weights_train_like_full_precision() -> None:
    ways: list[dict[str, Any]] = [{"dp": 2, "zero_stage": stage, "dp_shard": 2} for stage in (1, 3)]
    for axes in ({"dp": 2}, {"pp": 2}, {"tp": 2, "vocab_parallel": True}, *ways):
        mixed, full = (measure_plans([plan_of(recipe, **axes)], steps=3, warmup=0)[0] for recipe in ("bf16", "fp32"))
        assert mixed.losses == pytest.approx(full.losses, rel=2e-3)
        assert mixed.losses != full.losses


def test_virtual_device_states_its_compute() -> None:
    (measured,) = measure_plans([plan_of(dp=2)], steps=2, warmup=1, device="virtual:h100/1000")
    for rank in measured.ranks:
        assert rank.compute_s is not None and 0 < rank.compute_s <= min(rank.step_s)


class _DiesInStepThree(nn.Module):
    """Ends its process in the third step's forward, on rank 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, tokens: Tensor) -> Any:
        self.calls += 1
        if self.calls == 5 and torch.distributed.get_rank() == 1:  # two micro-batches a step
            os.kill(os.getpid(), signal.SIGKILL)
        return self.model(tokens)


def build_mortal(spec: ModelSpec) -> nn.Module:
    return _DiesInStepThree(build_spec_model(spec))


def test_a_rank_that_dies_is_named_and_what_was_measured_is_kept() -> None:
    with pytest.raises(UnfinishedRun, match=r"rank 1 of 2 died of signal 9") as caught:
        measure_plans([plan_of(dp=2)], build_model=build_mortal, steps=4, warmup=1)
    (kept,) = caught.value.measurements
    assert isinstance(kept, StepMeasurement)
    assert len(kept.losses) == 1


def test_files_in_and_out(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    save_plan(plan_of(dp=2), paths[0])
    save_plan(plan_of(pp=2), paths[1])
    found = measure_files(paths, steps=1, warmup=0, output=tmp_path / "out")
    assert load_measurement(tmp_path / "out" / "b.json") == found[1]
    measure_files(paths[:1], steps=1, warmup=0, output=tmp_path / "one.json")
    assert load_measurement(tmp_path / "one.json").config == "dp2 mbs1"


def test_a_plan_for_another_cluster_is_refused(tmp_path: Path) -> None:
    save_plan(plan_of(dp=2), tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"^the plan was made for cluster test \(\), this is h100-sxm:1 \(sha256:"):
        measure_files([tmp_path / "plan.json"], cluster="h100-sxm:1", steps=1)


def test_the_real_model_from_its_config(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **FIELDS}))
    save_plan(plan_of(pp=2), tmp_path / "plan.json")
    (measured,) = measure_files([tmp_path / "plan.json"], model=tmp_path, steps=2, warmup=0)
    assert measured.losses[1] < measured.losses[0]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"^transformers cannot build a causal LM"):
        measure_files([tmp_path / "plan.json"], model=tmp_path, steps=1)


def test_plans_for_different_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(InputError, match=r"one number of ranks, found \[1, 2\]"):
        measure_plans([plan_of(), plan_of(dp=2)])


def test_another_number_of_ranks_than_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^dp2 mbs1 is for 2 ranks, this run has 3$"):
        measure_plans([plan_of(dp=2)])


def test_a_model_that_would_fill_this_machine_is_refused() -> None:
    spec = load_model({**FIELDS, "hidden_size": 2**15, "intermediate_size": 2**17, "num_hidden_layers": 200})
    plan = plan_of(dp=2)
    huge = replace(plan, model=spec, stages=default_stages(spec, plan.config, "cpu"))
    with pytest.raises(InputError, match=r"2 ranks would each make \S+ whole first, .* TiB in all; this machine has"):
        measure_plans([huge])


def test_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match="device must be auto, cpu, cuda or virtual"):
        measure_plans([plan_of()], device="tpu")
