"""Ranks that meet before each collective, and both ends of a transfer, counted by hand on the toy model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshwright.cost_models.framework import HostCost
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.units import MIB

WORKLOAD = Workload(seq_len=32, global_batch_size=8, recipe=RECIPES["bf16"])
PARAMS = 180_800


def seconds(toy: Any, host: HostCost, workload: Workload = WORKLOAD, **changes: Any) -> float:
    batch = ConfigBatch.from_configs([ParallelConfig(**changes)])
    framework = toy.framework(host=host, overlap_dp_reduce=0.0, overlap_dp_gather=0.0, reduces_once=True)
    return float(estimate_batch(toy.model(), workload, toy.cluster(), framework, batch).step_s[0])


def added(toy: Any, host: HostCost, workload: Workload = WORKLOAD, **changes: Any) -> float:
    return seconds(toy, host, workload, **changes) - seconds(toy, HostCost(), workload, **changes)


MEETS = HostCost(checked_collective_s=1.0)


class TestMeeting:
    def test_zero_1_sums_and_gathers_once_a_step(self, toy: Any) -> None:
        # two over dp; of a step's own one over dp and one over all
        assert added(toy, MEETS, dp=2, zero_stage=1, dp_shard=2) == pytest.approx(2 * 2 + 2 + 2)

    def test_zero_0_meets_for_every_bucket(self, toy: Any) -> None:
        buckets = PARAMS * 2 / (25 * MIB)
        assert added(toy, MEETS, dp=2) == pytest.approx(buckets * 2 + 2 + 2)

    def test_no_more_than_three_buckets_a_block(self, toy: Any) -> None:
        model = toy.model(num_layers=1, hidden=4096, ffn_size=16384, num_heads=32, num_kv_heads=32, vocab_size=256)
        batch = ConfigBatch.from_configs([ParallelConfig(dp=2)])

        def step(host: HostCost) -> float:
            framework = toy.framework(host=host, overlap_dp_reduce=0.0)
            return float(estimate_batch(model, WORKLOAD, toy.cluster(), framework, batch).step_s[0])

        ends = 2 * (2 * 256 * 4096 + 4096) / (25 * MIB)  # table, final norm and head
        assert step(MEETS) - step(HostCost()) == pytest.approx((3 + ends) * 2 + 2 + 2)

    def test_tensor_parallelism_meets_in_every_micro_batch(self, toy: Any) -> None:
        # 2 sums each way in 4 blocks, one of the table; two of the loss and one of the head's input
        calls = 4 * 4 + 1 + 3
        changes: dict[str, Any] = {"tp": 2, "vocab_parallel": True}
        assert added(toy, MEETS, **changes) == pytest.approx(8 * calls * 2 + 1 + 2)

    def test_norms_one_by_one_with_sequence_parallelism(self, toy: Any) -> None:
        # gathers and scatters each way in 4 blocks, one each of table and head, two of the loss; 9 norms
        calls = 4 * 8 + 2 + 4
        changes: dict[str, Any] = {"tp": 2, "vocab_parallel": True, "sequence_parallel": True}
        assert added(toy, MEETS, **changes) == pytest.approx(8 * calls * 2 + 9 * 2 + 1 + 2)


class TestTransfers:
    @pytest.mark.parametrize("pp", [2, 4])
    def test_one_micro_batch_waits_once_each_way(self, toy: Any, pp: int) -> None:
        one = replace(WORKLOAD, global_batch_size=1)
        assert added(toy, HostCost(hop_s=1e3), one, pp=pp) == pytest.approx(2e3 * (pp - 1))

    def test_in_between_both_ends_work(self, toy: Any) -> None:
        # of each micro-batch a stage of two sends and receives
        few, many = (replace(WORKLOAD, global_batch_size=size) for size in (4, 8))
        each = (added(toy, HostCost(hop_s=1e3), many, pp=2) - added(toy, HostCost(hop_s=1e3), few, pp=2)) / 4
        assert each == pytest.approx(2e3)
