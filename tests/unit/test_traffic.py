"""Every collective of a step, against tables worked out by hand; real steps are counted in tests/multiprocess."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute, Schedule
from meshwright.cost_models.target_megatron import INTERNEVO
from meshwright.cost_models.traffic import block_traffic, rank_traffic
from meshwright.cost_models.workload import RECIPES, Workload

# 12 sequences of 16 tokens, 4 bytes a number; the toy model: 4 blocks of hidden 64, ffn 128, 8 and 4 heads of 8
WORKLOAD = Workload(seq_len=16, global_batch_size=12, recipe=RECIPES["fp32"])
BLOCK = 4 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64)
TABLE, NORM = 4 * 256 * 64, 4 * 64
HIDDEN = 4 * 16 * 64  # one sequence


def test_a_single_device_sends_nothing(toy: Any) -> None:
    assert rank_traffic(toy.model(), WORKLOAD, ParallelConfig(), 0) == {}


def test_tensor_parallel(toy: Any) -> None:
    # 12 micro-batches of: 4 blocks * (2 + 2), the embedding's, the head's; the loss's two, of 16 and 32 numbers
    got = rank_traffic(toy.model(), WORKLOAD, ParallelConfig(tp=2, vocab_parallel=True), 0)
    assert got == {
        ("all_reduce", "tp"): (12 * (16 + 1 + 1 + 2), 12 * (18 * HIDDEN + 3 * 16 * 4)),
        ("all_reduce", "world"): (1, 16),
    }


def test_sequence_parallel(toy: Any) -> None:
    # blocks: 2 gathers and 2 scatters each way; embedding: a scatter forward, a gather backward; head the reverse
    config = ParallelConfig(tp=2, vocab_parallel=True, sequence_parallel=True)
    got = rank_traffic(toy.model(), WORKLOAD, config, 0)
    assert got["all_gather", "tp"] == (12 * 18, 12 * 18 * HIDDEN)
    assert got["reduce_scatter", "tp"] == (12 * 18, 12 * 18 * HIDDEN)
    norms = 9 * NORM  # two a block and the last one, summed in one go
    assert got["all_reduce", "tp"] == (12 * 2 + 1, 12 * 3 * 16 * 4 + norms)


def test_full_recompute_repeats_all_but_a_blocks_last_sum(toy: Any) -> None:
    plain, full = (
        rank_traffic(toy.model(), WORKLOAD, ParallelConfig(tp=2, vocab_parallel=True, recompute=recompute), 0)
        for recompute in (Recompute.SELECTIVE, Recompute.FULL)
    )
    assert full["all_reduce", "tp"][0] - plain["all_reduce", "tp"][0] == 12 * 4
    config = ParallelConfig(tp=2, vocab_parallel=True, sequence_parallel=True, recompute=Recompute.FULL)
    repeated = rank_traffic(toy.model(), WORKLOAD, config, 0)
    assert repeated["all_gather", "tp"][0] == 12 * (18 + 2 * 4)
    assert repeated["reduce_scatter", "tp"][0] == 12 * (18 + 4)


def test_copies_of_keys_and_values_are_summed_whole(toy: Any) -> None:
    # tp 8 over 4 key/value heads: keys and values of 32 rows of 64 each, in 4 blocks
    got = rank_traffic(toy.model(), WORKLOAD, ParallelConfig(tp=8, vocab_parallel=True), 0)
    assert got["all_reduce", "tp"] == (12 * 20 + 1, 12 * (18 * HIDDEN + 3 * 16 * 4) + 4 * 4 * 2 * 32 * 64)


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [
        (0, {"all_reduce": (5 + 1, 1)}),
        (1, {"all_gather": (5, 1), "reduce_scatter": (5, 1)}),
        (2, {"all_gather": (5, 1), "reduce_scatter": (5 * 6, 6)}),
    ],
)
def test_data_parallel_by_zero_stage(toy: Any, zero_stage: int, expected: dict[str, tuple[int, int]]) -> None:
    # dp 2: 6 micro-batches each; units are 4 blocks and one of all else; once more 8 bytes, the count of targets
    config = ParallelConfig(dp=2, zero_stage=zero_stage, dp_shard=2 if zero_stage else 1)
    got = rank_traffic(toy.model(), WORKLOAD, config, 0)
    whole = 4 * BLOCK + 2 * TABLE + NORM
    for op, (calls, times) in expected.items():
        assert got[op, "dp"] == (calls, times * whole + (8 if op == "all_reduce" else 0))


def test_zero_3_gathers_blocks_twice_and_the_rest_once(toy: Any) -> None:
    got = rank_traffic(toy.model(), WORKLOAD, ParallelConfig(dp=2, zero_stage=3, dp_shard=2), 0)
    assert got["all_gather", "dp"] == (6 * (2 * 4 + 1), 6 * (2 * 4 * BLOCK + 2 * TABLE + NORM))
    assert got["reduce_scatter", "dp"] == (6 * 5, 6 * (4 * BLOCK + 2 * TABLE + NORM))


def test_pipeline_sends(toy: Any) -> None:
    model = toy.model()
    first, middle, last = (rank_traffic(model, WORKLOAD, ParallelConfig(pp=4), rank) for rank in (0, 1, 3))
    assert first["send", "pp"] == last["send", "pp"] == (12, 12 * HIDDEN)
    assert middle["send", "pp"] == (24, 24 * HIDDEN)
    config = ParallelConfig(pp=2, vpp=2, schedule=Schedule.INTERLEAVED)
    assert rank_traffic(model, WORKLOAD, config, 0)["send", "pp"] == (3 * 12, 3 * 12 * HIDDEN)
    shards = ParallelConfig(pp=2, tp=2, sequence_parallel=True, vocab_parallel=True)
    assert rank_traffic(model, WORKLOAD, shards, 0)["send", "pp"] == (12, 12 * HIDDEN // 2)


def test_a_tied_embedding_is_exchanged_by_the_ends_of_a_pipeline(toy: Any) -> None:
    model = toy.model(tied=True)
    ends = [rank_traffic(model, WORKLOAD, ParallelConfig(pp=4), rank)["send", "pp"] for rank in range(4)]
    assert ends == [(13, 12 * HIDDEN + TABLE), (24, 24 * HIDDEN), (24, 24 * HIDDEN), (13, 12 * HIDDEN + TABLE)]
    sharded = ParallelConfig(pp=2, dp=2, zero_stage=1, dp_shard=2)
    assert rank_traffic(model, WORKLOAD, sharded, 0)["send", "pp"] == (7, 6 * HIDDEN + TABLE // 2)


def test_stages_reduce_their_own_units(toy: Any) -> None:
    config = ParallelConfig(pp=2, dp=2, zero_stage=1, dp_shard=2)
    first, last = (rank_traffic(toy.model(), WORKLOAD, config, rank)["reduce_scatter", "dp"] for rank in (0, 1))
    assert first == (3, 2 * BLOCK + TABLE)
    assert last == (3, 2 * BLOCK + TABLE + NORM)


def test_owners_of_tensors_broadcast_them_in_their_shard_group(toy: Any) -> None:
    # 4 data ranks share one copy of the weights, 8 have all gradients; 39 tensors: 9 a block, table, head and norm
    model, batch = toy.model(), ConfigBatch.from_configs([ParallelConfig(dp=8, zero_stage=1, dp_shard=4)])
    kinds = block_kinds(model)
    entries = [
        (entry.op, float(entry.calls[0]), entry.in_shard, float(entry.calls[0] * entry.message_bytes[0]))
        for entry in block_traffic(kinds, 1, model, WORKLOAD, batch, INTERNEVO)
        if entry.axis == "dp" and entry.calls[0]
    ]
    assert entries == [("broadcast", 4 * 9 / 39, True, BLOCK), ("all_reduce", 1.0, False, BLOCK)]
