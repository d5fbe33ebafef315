"""The collectives of a real step, counted on real ranks, equal what the model prices: calls and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from meshwright.cost_models.strategy import LOOPED, SPLIT_BACKWARD, V_SHAPED, ParallelConfig, Recompute, Schedule
from meshwright.cost_models.traffic import rank_traffic
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.model import load_model

pytestmark = pytest.mark.multiprocess

Counts = dict[tuple[str, str], tuple[int, int]]

SEQUENCE = 8  # the harness's; its example model has these sizes
FIELDS = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def lines() -> Iterator[tuple[str, ParallelConfig]]:
    """Every ZeRO stage without a pipeline and under each schedule; tensor parallelism in each of its forms."""
    for zero in (0, 1, 2, 3):
        shard = 2 if zero else 1
        yield f"dp2 zero{zero}", ParallelConfig(dp=2, zero_stage=zero, dp_shard=shard)
        for schedule in Schedule:
            if schedule in SPLIT_BACKWARD and zero >= 2:
                continue
            vpp = 2 if schedule in (*LOOPED, *V_SHAPED) else 1
            config = ParallelConfig(dp=2, pp=2, vpp=vpp, schedule=schedule, zero_stage=zero, dp_shard=shard)
            yield f"pp2 dp2 zero{zero} {schedule.value}", config
    for words, sequence_parallel in (("", False), ("sp", True)):
        for recompute in Recompute:
            word = "" if recompute is Recompute.NONE else recompute.value
            config = ParallelConfig(tp=2, vocab_parallel=True, sequence_parallel=sequence_parallel, recompute=recompute)
            yield f"tp2 {words} {word}", config
    yield (
        "tp2 pp2 dp2 zero2 sp",
        ParallelConfig(tp=2, pp=2, dp=2, vocab_parallel=True, sequence_parallel=True, zero_stage=2, dp_shard=2),
    )
    for schedule in SPLIT_BACKWARD:
        config = ParallelConfig(
            tp=2, pp=2, vpp=2 if schedule in V_SHAPED else 1, schedule=schedule, vocab_parallel=True,
            sequence_parallel=True,
        )  # fmt: skip
        yield f"tp2 pp2 sp {schedule.value}", config
    for recompute in Recompute:
        word = "" if recompute is Recompute.NONE else recompute.value
        yield f"ring2 ulysses2 {word}", ParallelConfig(cp=4, cp_ring=2, cp_ulysses=2, recompute=recompute)
    yield (
        "ring2 tp2 sp zero3 full",
        ParallelConfig(
            cp=2, cp_ring=2, tp=2, vocab_parallel=True, sequence_parallel=True, zero_stage=3, dp_shard=2,
            recompute=Recompute.FULL,
        ),
    )  # fmt: skip
    yield "ulysses4 pp2", ParallelConfig(cp=4, cp_ulysses=4, pp=2)  # more ranks than kv heads
    yield "tp4 sp", ParallelConfig(tp=4, vocab_parallel=True, sequence_parallel=True)  # more ranks than kv heads


@pytest.mark.parametrize(("words", "config"), list(lines()), ids=lambda value: value if isinstance(value, str) else "")
def test_counted_equals_priced(words: str, config: ParallelConfig, count_step: Callable[[str], list[Counts]]) -> None:
    microbatches = 4
    counted = count_step(f"example | {words} | n{microbatches}")
    workload = Workload(seq_len=SEQUENCE, global_batch_size=microbatches * config.dp, recipe=RECIPES["fp64"])
    for rank, found in enumerate(counted):
        pp_rank = rank // (config.tp * config.cp * config.dp)
        priced = rank_traffic(load_model(FIELDS), workload, config, pp_rank)
        assert under_one_name(found, config) == under_one_name(priced, config)


@pytest.mark.parametrize("schedule", Schedule)
def test_a_tied_embedding(schedule: Schedule, count_step: Callable[[str], list[Counts]]) -> None:
    vpp = 2 if schedule in (*LOOPED, *V_SHAPED) else 1
    config = ParallelConfig(pp=2, dp=2, vpp=vpp, schedule=schedule, zero_stage=1, dp_shard=2)
    workload = Workload(seq_len=SEQUENCE, global_batch_size=8, recipe=RECIPES["fp64"])
    model = load_model(FIELDS | {"tie_word_embeddings": True})
    for rank, found in enumerate(count_step(f"example tied | pp2 dp2 zero1 {schedule.value} | n4")):
        assert found == rank_traffic(model, workload, config, rank // 2)


def under_one_name(counts: Counts, config: ParallelConfig) -> Counts:
    """An axis that spans all ranks shares the default group, and is counted under its own name or the world's."""
    sizes = {"tp": config.tp, "pp": config.pp, "dp": config.dp * config.cp}
    spanning = [axis for axis, size in sizes.items() if size == config.world_size]
    merged: Counts = {}
    for (op, axis), (calls, num_bytes) in counts.items():
        key = (op, "world" if axis in spanning else axis)
        before = merged.get(key, (0, 0))
        merged[key] = (before[0] + calls, before[1] + num_bytes)
    return merged
