"""What the target runs: one config for each rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshwright import InputError
from meshwright.cost_models.framework import (
    forward_calls,
    microbatches_per_round,
    num_microbatches,
    refuse_dtypes,
    supported,
)
from meshwright.cost_models.strategy import V_SHAPED, ConfigBatch, ParallelConfig, Recompute, Schedule
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload, recipe_named
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import Block

WORKLOAD = Workload(seq_len=32, global_batch_size=24)


def runs(model: Any, workload: Workload = WORKLOAD, **changes: Any) -> bool:
    batch = ConfigBatch.from_configs([ParallelConfig(**changes)])
    return bool(supported(batch, MESHWRIGHT, model, workload)[0])


def test_the_default_config_runs(toy: Any) -> None:
    assert runs(toy.model())


def test_targets_without_context_or_expert_parallelism_say_so(toy: Any) -> None:
    alone = replace(MESHWRIGHT, context_parallel=False, expert_parallel=False)
    splits: tuple[dict[str, Any], ...] = (
        {"cp": 2, "cp_ring": 2},
        {"dp": 2, "ep": 2},
        {"tp": 2, "etp": 2, "vocab_parallel": True},
    )
    for changes in splits:
        assert runs(toy.model(), **changes)
        assert not supported(ConfigBatch.from_configs([ParallelConfig(**changes)]), alone, toy.model(), WORKLOAD)[0]


def test_exchanges_in_parts_need_an_exchange(toy: Any) -> None:
    assert runs(toy.model(), dp=2, ep=2, ep_chunks=4)
    assert not runs(toy.model(), dp=2, ep=2, ep_chunks=3)
    assert not runs(toy.model(), dp=2, ep_chunks=2)


def test_the_vocabulary_is_split_exactly_where_tensors_are(toy: Any) -> None:
    assert runs(toy.model(), tp=2, vocab_parallel=True)
    assert not runs(toy.model(), tp=2)
    assert not runs(toy.model(), vocab_parallel=True)


def test_zero_shards_over_all_data_ranks(toy: Any) -> None:
    assert runs(toy.model(), dp=4, zero_stage=3, dp_shard=4)
    assert not runs(toy.model(), dp=4, zero_stage=3, dp_shard=2)
    assert not runs(toy.model(), dp=4, zero_stage=0, dp_shard=4)


@pytest.mark.parametrize("framework", ["meshwright", "torchtitan"])
@pytest.mark.parametrize("schedule", [Schedule.ZB_H1, Schedule.ZBV, Schedule.DUALPIPEV])
def test_a_split_backward_runs_with_whole_gradients_and_torchs_own_without_recompute(
    toy: Any, schedule: Schedule, framework: str
) -> None:
    def accepts(**changes: Any) -> bool:
        config = ParallelConfig(pp=2, vpp=1 if schedule is Schedule.ZB_H1 else 2, dp=2, schedule=schedule, **changes)
        batch = ConfigBatch.from_configs([config])
        return bool(supported(batch, framework_named(framework), toy.model(num_layers=4), WORKLOAD)[0])

    assert accepts() and accepts(zero_stage=1, dp_shard=2)
    assert not accepts(zero_stage=2, dp_shard=2) and not accepts(zero_stage=3, dp_shard=2)
    ours = framework == "meshwright"
    assert accepts(recompute=Recompute.SELECTIVE) is ours and accepts(recompute=Recompute.FULL) is ours


def test_forward_calls() -> None:
    batch = ConfigBatch.from_configs([ParallelConfig(recompute=recompute) for recompute in Recompute])
    assert forward_calls(batch).tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("schedule", "pp", "global_batch", "expected"),
    [
        (Schedule.ONE_F_ONE_B, 4, 4, True),
        (Schedule.ONE_F_ONE_B, 4, 3, False),  # torch wants as many micro-batches as stages
        (Schedule.GPIPE, 4, 3, True),
        (Schedule.INTERLEAVED, 4, 3, True),  # one round of three
        (Schedule.INTERLEAVED, 4, 10, True),  # two rounds of five
        (Schedule.INTERLEAVED, 4, 9, False),  # two rounds do not divide nine
        (Schedule.INTERLEAVED, 4, 13, False),  # nor three thirteen
        (Schedule.ZB_H1, 4, 3, True),
        (Schedule.ZB_H1, 4, 9, False),  # in rounds too, of which there are two
        (Schedule.ZBV, 4, 1, True),
        (Schedule.DUALPIPEV, 4, 8, True),
        (Schedule.DUALPIPEV, 4, 7, False),  # one for each stage
    ],
)
def test_micro_batches_that_torch_takes(
    toy: Any, schedule: Schedule, pp: int, global_batch: int, expected: bool
) -> None:
    workload = replace(WORKLOAD, global_batch_size=global_batch)
    vpp = 2 if schedule in (Schedule.INTERLEAVED, *V_SHAPED) else 1
    assert runs(toy.model(num_layers=8), workload, pp=pp, vpp=vpp, schedule=schedule) is expected


def test_a_batch_that_does_not_divide_has_a_reason_of_its_own(toy: Any) -> None:
    assert runs(toy.model(), pp=4, dp=5)  # 24 sequences over 5 ranks: BATCH says so, not the target


def test_a_target_may_leave_models_with_experts_to_data_parallelism(toy: Any) -> None:
    dense = toy.model()
    block = dense.blocks[1]
    moe = MoeLayer(hidden=64, num_experts=4, top_k=2, expert_ffn_size=32)
    model = replace(
        dense, blocks=(dense.blocks[0], Block(kind=block.kind, layers=(*block.layers[:3], moe)), dense.blocks[2])
    )
    batch = ConfigBatch.from_configs([ParallelConfig(dp=2), ParallelConfig(tp=2, vocab_parallel=True)])
    target = replace(MESHWRIGHT, tensor_parallel_moe=False)
    assert supported(batch, target, model, WORKLOAD).tolist() == [True, False]
    assert supported(batch, MESHWRIGHT, model, WORKLOAD).tolist() == [True, True]


def test_micro_batches_and_rounds() -> None:
    batch = ConfigBatch.from_configs(
        [ParallelConfig(pp=4, dp=2, micro_batch_size=2), ParallelConfig(pp=4), ParallelConfig(pp=4, dp=8)]
    )
    assert num_microbatches(batch, WORKLOAD).tolist() == [6, 24, 3]
    assert microbatches_per_round(batch, WORKLOAD).tolist() == [6, 4, 3]


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(InputError, match="expected one of meshwright"):
        framework_named("megatorn")


def test_megatron_interleaves_multiples_of_pp_and_wants_equal_stages(toy: Any) -> None:
    megatron = framework_named("megatron-bridge")

    def accepts(num_layers: int, global_batch: int, vpp: int) -> bool:
        schedule = Schedule.INTERLEAVED if vpp > 1 else Schedule.ONE_F_ONE_B
        batch = ConfigBatch.from_configs([ParallelConfig(pp=2, vpp=vpp, schedule=schedule)])
        workload = Workload(seq_len=32, global_batch_size=global_batch)
        return bool(supported(batch, megatron, toy.model(num_layers=num_layers), workload)[0])

    assert accepts(8, 6, 2) and accepts(8, 3, 1)
    assert not accepts(8, 7, 2)  # seven micro-batches in rounds of two
    assert not accepts(9, 6, 1) and not accepts(6, 6, 2)  # layers that do not fill stages evenly


def test_dtypes_that_a_target_does_not_train_in() -> None:
    for recipe, target, said in (("fp16", "meshwright", "loss scaling"), ("fp8", "deepspeed", "float8")):
        workload = Workload(seq_len=32, global_batch_size=24, recipe=recipe_named(recipe))
        with pytest.raises(InputError, match=said):
            refuse_dtypes(framework_named(target), workload)
        refuse_dtypes(framework_named("megatron-bridge"), workload)
