"""The contract of a split model beside equality: what it refuses, whose loss it takes, weights out and in again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright import InputError
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ParallelConfig
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.executors.apply import parallelize
from meshwright.executors.spec_model import build_spec_model
from meshwright.planner.plan import Plan, default_stages
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.environment import Environment, Setting
from meshwright.profiler.launch import Rank, run_ranks
from meshwright.profiler.model import ModelSpec, load_model

pytestmark = pytest.mark.multiprocess

FIELDS = {
    "model_type": "llama", "vocab_size": 65, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def plan_of(**axes: Any) -> Plan:
    spec = load_model(FIELDS)
    config = ParallelConfig(vocab_parallel=axes.get("tp", 1) > 1, **axes)
    return Plan(
        framework="meshwright", model=spec,
        workload=Workload(seq_len=8, global_batch_size=4, recipe=RECIPES["fp64"]), cluster_name="test",
        cluster_digest="", environment=None, config=config, placement=Placement(),
        stages=default_stages(spec, config, "cpu"),
        micro_batches_per_data_rank=(config.num_microbatches(4),) * config.dp, cost=None, memory=None, search=None,
    )  # fmt: skip


def build(spec: ModelSpec) -> nn.Module:
    torch.manual_seed(0)
    return build_spec_model(spec).double()


def batch(rows: int) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(rows * 9).view(rows, 9) % 65
    return tokens[:, :-1], tokens[:, 1:]


def on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    return run_ranks(function, num_ranks, *args, timeout_s=60)


# -- what is refused ------------------------------------------------------------------------------------------------


def _refusal(rank: Rank, plan: Plan, options: dict[str, Any]) -> str:
    model = build(load_model({**FIELDS, **options.get("model", {})}))
    try:
        parallelize(model.to(options.get("dtype", torch.float64)), plan)
    except InputError as error:
        return str(error)
    return ""


REFUSED: list[tuple[Plan, dict[str, Any], str]] = [
    (plan_of(dp=2), {}, "the plan is for 2 ranks (dp2 mbs1), this run has 1"),
    (replace(plan_of(), framework="megatron"), {}, "this plan is for 'megatron'"),
    (plan_of(), {"model": {"intermediate_size": 64}}, "with 17,600 parameters, this SpecModel has 20,672"),
    (plan_of(), {"dtype": torch.float32}, "the plan keeps weights in float64, this SpecModel has float32"),
]


@pytest.mark.parametrize(("plan", "options", "sentence"), REFUSED)
def test_refuses_what_the_plan_is_not_for(plan: Plan, options: dict[str, Any], sentence: str) -> None:
    assert sentence in on_ranks(1, _refusal, plan, options)[0]


def test_needs_a_process_group() -> None:
    with pytest.raises(InputError, match=r"torch\.distributed is not initialised"):
        parallelize(build(load_model(FIELDS)), plan_of())


def _uneven(rank: Rank) -> str:
    plan = replace(plan_of(dp=2, zero_stage=2, dp_shard=2), micro_batches_per_data_rank=(1, 3))
    return _refusal(rank, plan, {})


def test_zero_2_needs_even_shares() -> None:
    assert all("data ranks need equally many; found (1, 3)" in message for message in on_ranks(2, _uneven))


def _warnings(rank: Rank) -> list[str]:
    settings = (Setting(name="NCCL_ALGO", value="Ring"),)
    then = Environment(meshwright="0.1.0", python="3.11", torch="1.0", backend="gloo", settings=settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallelize(build(load_model(FIELDS)), replace(plan_of(), environment=then))
    return [str(warning.message) for warning in caught]


def _on_cluster(rank: Rank, digest: str) -> str:
    preset = load_cluster("h100-sxm:1")
    try:
        parallelize(build(load_model(FIELDS)), replace(plan_of(), cluster_digest=digest), cluster=preset)
    except InputError as error:
        return str(error)
    return ""


def test_a_plan_for_another_cluster_is_refused() -> None:
    assert on_ranks(1, _on_cluster, load_cluster("h100-sxm:1").digest) == [""]
    assert (
        "the plan was made for cluster test (sha256:0), this is h100-sxm:1" in on_ranks(1, _on_cluster, "sha256:0")[0]
    )


def _state_after_a_step(rank: Rank) -> bool:
    parallel = parallelize(build(load_model(FIELDS)), plan_of())
    before = parallel.state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    with torch.no_grad():
        for weight in parallel.parameters():
            weight.add_(1.0)
    return all(torch.equal(before[name], kept[name]) for name in kept)


def test_a_full_state_dict_does_not_change_with_training() -> None:
    assert on_ranks(1, _state_after_a_step) == [True]


def test_other_settings_than_the_profile_warn() -> None:
    (message,) = on_ranks(1, _warnings)[0]
    assert "torch was 1.0, now is" in message and "NCCL_ALGO was Ring, now is not set" in message


def _bad_batch(rank: Rank) -> str:
    parallel = parallelize(build(load_model(FIELDS)), plan_of(dp=2))
    with pytest.raises(InputError) as caught:
        parallel.step(batch(3))
    return str(caught.value)


def test_a_batch_of_another_shape_is_refused() -> None:
    for rank, message in enumerate(on_ranks(2, _bad_batch)):
        assert f"data rank {rank} takes inputs and targets of shape [2, sequence]" in message


# -- the loss -------------------------------------------------------------------------------------------------------


def squared_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of whole, unpadded logits."""
    assert logits.shape[-1] == 65
    counted = targets != -100
    return (logits.square().sum(-1) * counted).sum(), counted.sum()


def _own_loss(rank: Rank, axes: dict[str, int]) -> tuple[float, float]:
    model = build(load_model(FIELDS))
    total, count = squared_logits(model(batch(4)[0]), batch(4)[1])
    parallel = parallelize(model, plan_of(tp=2, **axes), squared_logits)
    loss = parallel.step({"input_ids": batch(4)[0], "targets": batch(4)[1]})
    return (total / count).item(), loss.item()


@pytest.mark.parametrize("axes", [{"pp": 2}, {"cp": 2, "cp_ring": 2}], ids=str)
def test_a_loss_of_ones_own_sees_whole_logits(axes: dict[str, int]) -> None:
    for expected, found in on_ranks(4, _own_loss, axes):
        assert found == pytest.approx(expected, rel=1e-12)


def _counts_all(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logits.sum(), torch.tensor(targets.numel())


def _miscounting(rank: Rank) -> str:
    parallel = parallelize(build(load_model(FIELDS)), plan_of(pp=2), _counts_all)
    tokens, targets = batch(4)
    with pytest.raises(InputError) as caught:
        parallel.step((tokens, targets.masked_fill(targets == 3, -100)))
    return str(caught.value)


def test_a_loss_that_counts_otherwise_is_refused_on_every_rank() -> None:
    assert on_ranks(2, _miscounting) == ["loss_fn counted 32 targets, 31 are not -100"] * 2


def _nothing_counts(rank: Rank) -> tuple[float, float]:
    parallel = parallelize(build(load_model(FIELDS)), plan_of(dp=2))
    loss = parallel.step((batch(2)[0], torch.full((2, 8), -100)))
    return float(loss), float(parallel.clip_grad_norm_(1.0))


def test_a_batch_in_which_nothing_counts_changes_nothing() -> None:
    assert on_ranks(2, _nothing_counts) == [(0.0, 0.0)] * 2


# -- weights --------------------------------------------------------------------------------------------------------


def _round_trip(rank: Rank, plan: Plan) -> None:
    whole = build(load_model(FIELDS)).state_dict()
    other = build(load_model(FIELDS))
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    parallel = parallelize(other, plan)
    parallel.load_state_dict(whole)
    found = parallel.state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    parts = {name: value.detach().clone() for name, value in parallel.state_dict(full=False).items()}
    parallel.load_state_dict({name: torch.zeros_like(value) for name, value in whole.items()})
    assert not any(value.any() for value in parallel.state_dict().values())
    parallel.load_state_dict(parts, full=False)
    found = parallel.state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    with pytest.raises(InputError, match="state_dict has no"):
        parallel.load_state_dict({})


@pytest.mark.parametrize(
    "axes",
    [
        {"tp": 2, "pp": 2},
        {"tp": 2, "dp": 2, "zero_stage": 3, "dp_shard": 2},
        {"pp": 2, "dp": 2, "zero_stage": 1, "dp_shard": 2},
        {"dp": 4, "zero_stage": 2, "dp_shard": 4},
    ],
    ids=str,
)
def test_weights_go_out_whole_and_in_again(axes: dict[str, Any]) -> None:
    on_ranks(4, _round_trip, plan_of(**axes))


def _modes(rank: Rank) -> list[bool]:
    parallel = parallelize(build(load_model(FIELDS)), plan_of(pp=2))
    parallel.eval()
    modes = [any(module.training for chunk in parallel.modules() for module in chunk.modules())]
    parallel.train()
    return [*modes, all(module.training for chunk in parallel.modules() for module in chunk.modules())]


def test_train_and_eval_reach_every_stage() -> None:
    assert on_ranks(2, _modes) == [[False, True]] * 2
