"""Gradients that wait for the end of a backward, and what an allocator holds on top, counted by hand on the toy model.

The toy model has 4 blocks of 36,992 parameters, a table of 16,384 and a head of 16,448: 180,800 in all. Of a token a
block saves 1,952 bytes (two norms' inputs and two of projections at 128, queries, output, keys and values at 384, 32
of their log-sum-exp, four tensors of the feed-forward at 256), the head 1,280 (two of 128, a float32 softmax of 1,024).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshwright.cost_models.blocks import block_kinds, stage_counts
from meshwright.cost_models.estimate import MemoryBreakdown, Moment
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.held_blocks import held_bytes
from meshwright.cost_models.memory_traits import HeldBlocks, LossTensors, MemoryTraits
from meshwright.cost_models.residency import Numbers
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.step_states import Pipeline
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Schedule
from meshwright.cost_models.workload import RECIPES, Workload

PARAMS, TOKENS = 180_800, 32
SAVED, BESIDE = TOKENS * (4 * 1952 + 1280), TOKENS * 256 * 4
WORKLOAD = Workload(seq_len=TOKENS, global_batch_size=8, recipe=RECIPES["bf16"])
BLOCKS = HeldBlocks(activations=0.25, pending_outputs=10.0, base_bytes=1000.0)


def target(toy: Any, communicators: float = 0.0) -> Framework:
    traits = MemoryTraits(
        blocks=BLOCKS,
        communicators_bytes=communicators,
        loss=LossTensors(kept_float32=1.0, beside_float32=1.0),
    )
    found: Framework = toy.framework(
        memory=traits,
        masters_are_parameters=False,
        eager_rms_norm=False,
        shards_rows=False,
        reduces_once=True,
        receives_ahead=False,
        regathers_sequence=True,
    )
    return found


def peak(toy: Any, communicators: float = 0.0, **changes: Any) -> MemoryBreakdown:
    batch = ConfigBatch.from_configs([ParallelConfig(**changes)])
    cluster = toy.cluster(num_nodes=4, devices_per_node=8)
    return estimate_batch(toy.model(), WORKLOAD, cluster, target(toy, communicators), batch).estimate(0, batch).memory


def test_recipe() -> None:
    recipe = WORKLOAD.recipe
    assert recipe.master is not None
    assert (recipe.params.num_bytes, recipe.grads.num_bytes, recipe.master.num_bytes) == (2, 4, 4)


class TestMoments:
    def test_gradients_are_whole_when_a_backward_ends(self, toy: Any) -> None:
        found = peak(toy)
        assert found.moment is Moment.BACKWARD
        assert (found.params_bytes, found.grads_bytes, found.optimizer_bytes) == (2 * PARAMS, 4 * PARAMS, 12 * PARAMS)
        assert (found.activations_bytes, found.working_bytes, found.communication_bytes) == (0, 2 * PARAMS, 0)

    def test_activations_of_two_sequences_weigh_more(self, toy: Any) -> None:
        found = peak(toy, micro_batch_size=2)
        assert found.moment is Moment.LOSS
        assert (found.activations_bytes, found.working_bytes) == (2 * SAVED, 2 * BESIDE)

    def test_replicas_hold_buckets_of_all_gradients(self, toy: Any) -> None:
        assert peak(toy, dp=2).communication_bytes == 2 * PARAMS

    def test_zero_1_gathers_weights_through_flat_buffers(self, toy: Any) -> None:
        found = peak(toy, dp=2, zero_stage=1, dp_shard=2)
        assert found.moment is Moment.UPDATE
        assert found.optimizer_bytes == 12 * PARAMS // 2
        assert found.communication_bytes == 2 * (2 * PARAMS + PARAMS // 2)

    def test_sequence_parallelism_keeps_two_buffers(self, toy: Any) -> None:
        found = peak(toy, tp=2, sequence_parallel=True, vocab_parallel=True, micro_batch_size=4)
        assert found.moment is Moment.LOSS
        assert found.communication_bytes == 2 * (4 * TOKENS * 64 * 2)

    def test_process_groups_take_of_what_is_offered(self, toy: Any) -> None:
        assert peak(toy, communicators=1e6).reserved_bytes - peak(toy).reserved_bytes == 1_000_000


class TestOnTop:
    def test_gaps_and_outputs_that_wait(self, toy: Any) -> None:
        found = peak(toy, tp=2, sequence_parallel=True, vocab_parallel=True, micro_batch_size=4)
        waiting = 10 * 4 * TOKENS * 64 * 2  # of 8 a forward and two micro-batches no more than 10
        assert found.fragmentation_bytes == round(0.25 * found.activations_bytes + waiting + 1000)

    def test_no_less_than_the_base_at_another_moment(self, toy: Any) -> None:
        # at the loss fewer tensors than at the end of the backward, by 2 * PARAMS - SAVED - BESIDE
        less = 2 * PARAMS - SAVED - BESIDE
        assert less > 0
        assert peak(toy).fragmentation_bytes == round(max(0.25 * SAVED + 1000 - less, 1000))

    @pytest.mark.parametrize(
        ("changes", "flying", "expected"),
        [
            ({}, 1.0, 100),  # gradients come into the blocks of activations
            ({"dp": 2}, 1.0, 100),
            ({"dp": 2, "zero_stage": 1, "dp_shard": 2}, 1.0, 100 + 2 * 500),
            ({"pp": 2}, 2.0, 100 + 2 * 500),
            ({"pp": 4, "tp": 2, "sequence_parallel": True, "vocab_parallel": True}, 4.0, 100 + 2 * 500 + 2 * 3 * 16),
            ({"pp": 4, "tp": 2, "sequence_parallel": True, "vocab_parallel": True}, 1.0, 100 + 2 * 500),
            ({"tp": 2, "sequence_parallel": True, "vocab_parallel": True}, 1.0, 100 + 2 * 3 * 16),
        ],
    )
    def test_blocks_that_no_other_moment_uses(
        self, toy: Any, changes: dict[str, Any], flying: float, expected: int
    ) -> None:
        batch = ConfigBatch.from_configs([ParallelConfig(**changes)])
        kinds = block_kinds(toy.model())
        pipe = Pipeline(
            kinds=kinds,
            counts=stage_counts(kinds, int(batch.pp[0]), 1).astype(np.float64),
            schedule=Schedule.ONE_F_ONE_B,
            workload=WORKLOAD,
            framework=target(toy),
            batch=batch,
        )
        numbers = Numbers(*(np.array([500.0]) for _ in range(3)))
        blocks = HeldBlocks(activations=0.0, pending_outputs=50.0, base_bytes=100.0)
        found = held_bytes(blocks, pipe, np.array([1e6]), numbers, np.array([16.0]), 3.0, np.array([flying]))
        assert found[0] == expected
