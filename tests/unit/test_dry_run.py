"""Dry runs: bytes by hand, what is refused and where it fails, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import meshwright
from meshwright.cli import app, main
from meshwright.cost_models.estimate import MemoryBreakdown, Moment
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.schedules import Pass, rank_actions
from meshwright.cost_models.strategy import ParallelConfig, Recompute, Schedule
from meshwright.cost_models.workload import RECIPES, Optimizer, Workload
from meshwright.executors.dry_run import DryRun, dry_run, stage_ranks
from meshwright.executors.fake_kernels import workspace_bytes
from meshwright.executors.shorter_step import enough_microbatches
from meshwright.executors.spec_model import Attention, build_spec_model
from meshwright.planner.plan import Plan, default_stages, save_plan
from meshwright.profiler.model import ModelSpec, load_model

FIELDS: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def make_plan(
    recipe: str = "fp32", micro_batches: int = 2, sequence: int = 64, *, tied: bool = False, **axes: Any
) -> Plan:
    axes["dp_shard"] = axes.get("dp", 1) if axes.get("zero_stage") else 1
    config = ParallelConfig(vocab_parallel=axes.get("tp", 1) > 1, **axes)
    spec = load_model(FIELDS | {"tie_word_embeddings": tied})
    return Plan(
        framework="meshwright", model=spec,
        workload=Workload(seq_len=sequence, global_batch_size=micro_batches * config.dp, recipe=RECIPES[recipe]),
        cluster_name="test", cluster_digest="", environment=None, config=config, placement=Placement(),
        stages=default_stages(spec, config, "h100"), micro_batches_per_data_rank=(micro_batches,) * config.dp,
        cost=None, memory=None, search=None,
    )  # fmt: skip


def predicted(capacity_bytes: int, stage: int = 0) -> MemoryBreakdown:
    return MemoryBreakdown(
        stage=stage, moment=Moment.BACKWARD, params_bytes=10**6, grads_bytes=10**6, optimizer_bytes=10**6,
        activations_bytes=10**6, gathered_bytes=0, working_bytes=10**5, communication_bytes=0, fragmentation_bytes=0,
        reserved_bytes=10**5, capacity_bytes=capacity_bytes,
    )  # fmt: skip


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return build_spec_model(load_model(FIELDS))


def rounded(*sizes: int) -> int:
    """Bytes of storages of these sizes: each a multiple of 512."""
    return sum(-(-size // 512) * 512 for size in sizes)


def test_weights_gradients_and_states_of_a_rank_of_many() -> None:
    """tp 2, pp 2, ZeRO 1 over 16 of the second stage: matrices halved, then a sixteenth of their rows; norms sharded.

    A sixteenth of [32, 64], [16, 64] twice, [64, 32], [80, 64] twice, [64, 80], two norms; head [256, 64] and its norm.
    """
    run = dry_run(None, make_plan("bf16", tp=2, dp=16, pp=2, zero_stage=1), rank=40)
    assert (run.pp_rank, run.stages) == (1, (1,))
    shards = (2 * 64, 64, 64, 4 * 32, 5 * 64, 5 * 64, 4 * 80, 4, 4)
    numbers = (*shards, *shards, 16 * 64, 4)
    assert run.params_bytes == rounded(*(4 * number for number in numbers))
    assert run.optimizer_bytes == 2 * run.params_bytes + 512 * len(numbers)  # two moments, and each tensor's step
    whole = (32 * 64, 16 * 64, 16 * 64, 64 * 32, 80 * 64, 80 * 64, 64 * 80, 64, 64)
    assert run.grads_bytes == rounded(*(4 * number for number in (*whole, *whole, 256 * 64, 64)))
    assert run.gathered_bytes == rounded(*(2 * number for number in (*whole, *whole, 256 * 64, 64)))
    assert run.fits is None
    assert run.peak_bytes == max(run.step_peaks_bytes)


def test_activations_of_the_kernels_of_a_gpu() -> None:
    """64 rows in bf16 of hidden size 64, 4 heads and 2 of keys and values of 16, 160 inner numbers, 512 words."""
    run = dry_run(None, make_plan("bf16-pure", micro_batches=1))
    stream, number_a_row = 64 * 64 * 2, 64 * 4
    norm = (2 * stream, number_a_row, stream, stream)  # its input in float32, normalised, and what it returns
    qkv = (stream, stream // 2, stream // 2)
    flash = (stream, 4 * number_a_row, 2 * 8, 8)  # its output, a log-sum-exp a head and row, the random state
    tables = (64 * 16 * 2,) * 4  # sines and cosines, for queries and for keys
    mlp = (64 * 160 * 2,) * 4  # gate, up, the activated gate, their product
    block = rounded(*norm, *qkv, *tables, *flash, *norm, *mlp)
    head = rounded(*norm, 64 * 512 * 4, 4, 4, 4)  # log-softmax in float32; three scalars of the loss
    assert run.activations_bytes == 4 * block + head
    assert run.phase == "backward"


def test_a_cpu_keeps_float32_copies_in_fused_norms() -> None:
    plan = make_plan("bf16-pure", micro_batches=1)
    gpu, cpu = (dry_run(partial(_with_fused_norms, plan.model), plan, kernels=kernels) for kernels in ("cuda", "cpu"))
    assert gpu.params_bytes == cpu.params_bytes
    assert cpu.activations_bytes - gpu.activations_bytes > 9 * 64 * 64 * 4


def _with_fused_norms(spec: ModelSpec) -> nn.Module:
    with torch.device("meta"):
        model = build_spec_model(spec)
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "RMSNorm":
                model.set_submodule(name, nn.RMSNorm(64))
    return model


def test_workspace_of_flash_attention_backward() -> None:
    """dq in float32 and a number a row, for 100 rows rounded to 128; dk and dv of 4 heads before 2 are summed to 1."""
    query, key = torch.empty(1, 4, 100, 64, dtype=torch.bfloat16), torch.empty(1, 2, 100, 64, dtype=torch.bfloat16)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    assert workspace_bytes(flash, (query, query, key, key)) == 4 * 128 * (64 * 4 + 4) + 2 * 4 * 100 * 64 * 2
    assert workspace_bytes(flash, (query, query, query, query)) == 4 * 128 * (64 * 4 + 4)
    assert workspace_bytes(torch.ops.aten.mm.default, (query, key)) == 0


@pytest.mark.parametrize("pp", [2, 4])
def test_micro_batches_that_are_enough_hold_as_many_in_flight(pp: int) -> None:
    plan = make_plan(pp=pp, micro_batches=64, schedule=Schedule.ONE_F_ONE_B)
    for rank in range(pp):
        few = enough_microbatches(plan, rank, 64)
        assert few <= pp + 3
        assert _in_flight_at_a_backward(pp, rank, few) == _in_flight_at_a_backward(pp, rank, 64)


def _in_flight_at_a_backward(pp: int, rank: int, count: int) -> int:
    """The most micro-batches in flight at the start of a backward that adds to gradients."""
    alive, backwards, most = 0, 0, 0
    for action in rank_actions(Schedule.ONE_F_ONE_B, pp, 1, count)[rank]:
        if action.kind is Pass.BACKWARD:
            most = max(most, alive if backwards else 0)
            backwards += 1
            alive -= 1
        else:
            alive += 1
    return most


def test_four_rounds_are_enough_where_schedules_repeat_themselves() -> None:
    assert enough_microbatches(make_plan(pp=2, micro_batches=20, schedule=Schedule.GPIPE), 0, 20) == 20
    assert enough_microbatches(make_plan(pp=2, micro_batches=20, schedule=Schedule.ZB_H1), 0, 20) == 8
    assert enough_microbatches(make_plan(pp=2, micro_batches=21, schedule=Schedule.ZB_H1), 0, 21) == 21
    assert enough_microbatches(make_plan(micro_batches=20), 0, 20) == 3


def test_the_model_given_is_left_as_it_was() -> None:
    model = on_meta()
    names = {name: id(weight) for name, weight in model.named_parameters()}
    run = dry_run(model, make_plan(tp=2))
    assert isinstance(run, DryRun)
    assert {name: id(weight) for name, weight in model.named_parameters()} == names
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("axes", [{"dp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2, "schedule": Schedule.ZBV}])
def test_a_model_in_memory_keeps_its_tied_embedding(axes: dict[str, Any]) -> None:
    plan = make_plan(tied=True, **axes)
    model = build_spec_model(plan.model)
    assert dry_run(model, plan).peak_bytes == dry_run(None, plan).peak_bytes


def test_an_optimizer_without_states() -> None:
    plan = make_plan(tp=2)
    plain = replace(plan, workload=replace(plan.workload, optimizer=Optimizer.SGD))
    assert dry_run(None, plain).optimizer_bytes == 0


def test_one_rank_of_each_stage() -> None:
    plan = make_plan(tp=2, dp=2, pp=4, micro_batches=4)
    assert stage_ranks(plan) == (0, 4, 8, 12)
    uneven = replace(plan, micro_batches_per_data_rank=(3, 5))
    assert stage_ranks(uneven) == (2, 6, 10, 14)


class _Broken(Attention):
    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return super().forward(x, position_ids) @ x


class _Curious(Attention):
    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return super().forward(x, position_ids) if x.sum().item() > 0 else x


class TestRefusals:
    def test_a_rank_that_is_not_there(self) -> None:
        with pytest.raises(meshwright.InputError, match="rank must be 0 to 3, found 4"):
            dry_run(None, make_plan(tp=2, dp=2), rank=4)

    def test_a_plan_for_another_framework(self) -> None:
        with pytest.raises(meshwright.InputError, match="for 'megatron'"):
            dry_run(None, replace(make_plan(), framework="megatron"))

    def test_another_model(self) -> None:
        with torch.device("meta"):
            other = build_spec_model(load_model({**FIELDS, "num_hidden_layers": 3}))
        with pytest.raises(meshwright.InputError, match="238,144 parameters, this SpecModel has 195,008"):
            dry_run(other, make_plan())

    def test_shapes_that_do_not_match_name_their_module(self) -> None:
        model = on_meta()
        model.get_submodule("blocks.2.attention_1").__class__ = _Broken
        with pytest.raises(meshwright.InputError, match=r"in the forward of blocks\.2\.attention_1 .*bmm"):
            dry_run(model, make_plan(sequence=32))

    @pytest.mark.parametrize("pp", [1, 2])
    def test_a_sequence_that_tp_does_not_divide(self, pp: int) -> None:
        with pytest.raises(meshwright.InputError, match="divide the sequence of 63"):
            dry_run(None, make_plan(tp=2, pp=pp, sequence=63, sequence_parallel=True))

    def test_a_model_that_looks_at_values(self) -> None:
        model = on_meta()
        model.get_submodule("blocks.1.attention_1").__class__ = _Curious
        with pytest.raises(meshwright.InputError, match=r"attention_1 .* asks for the values of tensors"):
            dry_run(model, make_plan())


class TestCommand:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        plan = make_plan("bf16", pp=2, dp=2, zero_stage=1, recompute=Recompute.FULL)
        save_plan(replace(plan, memory=predicted(10**8, stage=1)), tmp_path / "plan.json")
        return tmp_path / "plan.json"

    def test_shows_the_stage_that_is_predicted_to_bind(self, path: Path) -> None:
        result = CliRunner().invoke(app, ["dry-run", str(path)])
        assert result.exit_code == 0, result.output
        assert "Memory of rank 2 (stage 1)" in result.stdout
        assert "predicted" in result.stdout
        assert "peak in the" in result.stdout

    def test_all_stages_as_json(self, path: Path) -> None:
        result = CliRunner().invoke(app, ["dry-run", str(path), "--all-stages", "--json"])
        assert result.exit_code == 0, result.output
        runs = json.loads(result.stdout)
        assert [run["rank"] for run in runs] == [0, 2]
        assert [run["stages"] for run in runs] == [[0], [1]]

    def test_what_does_not_fit_exits_with_3(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        plan = meshwright.load_plan(path)
        save_plan(replace(plan, memory=predicted(10**6)), path)
        with pytest.raises(SystemExit, match="3"):
            main(["dry-run", str(path), "--quiet"])
        out = capsys.readouterr()
        assert "DOES NOT FIT" in out.out
        assert "does not fit: rank 0 (stage 0) needs" in out.err

    def test_rank_and_all_stages_exclude_each_other(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["dry-run", str(path), "--rank", "1", "--all-stages"])
        assert "--rank 1 or --all-stages, not both" in capsys.readouterr().err
