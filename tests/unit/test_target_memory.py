"""What targets keep, reduce and update in ways of their own, counted by hand on the toy model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meshwright.cost_models.blocks import block_kinds, stage_counts
from meshwright.cost_models.estimate import MemoryBreakdown, Moment
from meshwright.cost_models.framework import AttentionKernel, Framework, Selective
from meshwright.cost_models.memory_traits import LossTensors, MemoryTraits, UpdateTensors
from meshwright.cost_models.offload import kept_activations
from meshwright.cost_models.saved import BlockBytes, block_bytes
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Partition, Recompute, Schedule
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import Block, BlockKind

# toy model: hidden 64, ffn 128, 8 and 4 heads of 8, vocabulary 256, 4 blocks; 32 tokens a micro-batch
TOKENS, HIDDEN, FFN, KV, HEADS, VOCAB = 32, 64, 128, 32, 8, 256
BF16 = Workload(seq_len=32, global_batch_size=8, recipe=RECIPES["bf16-grads"])
FLOAT8 = replace(BF16, recipe=replace(RECIPES["fp8"], grads=BF16.recipe.grads))


def target(toy: Any, traits: MemoryTraits, **changes: Any) -> Framework:
    """Megatron's kind: no master weights among the parameters, fused norms."""
    changes = {"masters_are_parameters": False, "eager_rms_norm": False, "shards_rows": False} | changes
    found: Framework = toy.framework(memory=traits, **changes)
    return found


def held(block: Block, framework: Framework, workload: Workload = BF16, **changes: Any) -> BlockBytes:
    return block_bytes(block, workload, framework, ConfigBatch.from_configs([ParallelConfig(**changes)]))


def peak(toy: Any, framework: Framework, workload: Workload = BF16, **changes: Any) -> MemoryBreakdown:
    batch = ConfigBatch.from_configs([ParallelConfig(**changes)])
    cluster = toy.cluster(num_nodes=8, devices_per_node=8)
    return estimate_batch(toy.model(), workload, cluster, framework, batch).estimate(0, batch).memory


class TestKept:
    def test_gate_and_up_in_one_tensor(self, toy: Any) -> None:
        block = toy.model().blocks[1]
        apart, fused = (target(toy, MemoryTraits(gated_tensors=tensors)) for tensors in (4.0, 3.0))
        assert held(block, apart).saved - held(block, fused).saved == TOKENS * FFN * 2

    def test_inputs_kept_as_cast(self, toy: Any) -> None:
        block = toy.model().blocks[1]
        framework = target(toy, MemoryTraits(gated_tensors=3.0, float8_inputs=True))
        norms, inputs = 2 * 2 * HIDDEN, 2 * HIDDEN
        attention = 2 * (HIDDEN + 2 * KV) + (2 + 1) * HIDDEN + 4 * HEADS  # its output twice: as it is, and cast
        feed_forward = 2 * 2 * FFN + FFN
        assert held(block, framework, FLOAT8).saved == TOKENS * (norms + inputs + attention + feed_forward)
        assert held(block, framework).saved == TOKENS * (norms + 2 * inputs + attention - HIDDEN + 6 * FFN)

    def test_attention_recomputed_keeps_only_the_cast_output(self, toy: Any) -> None:
        block = toy.model().blocks[1]
        framework = target(toy, MemoryTraits(float8_inputs=True), selective=Selective(rest=0.0, core=1.0))
        whole, selective = (
            held(block, framework, FLOAT8, recompute=how).saved for how in (Recompute.NONE, Recompute.SELECTIVE)
        )
        assert whole - selective == TOKENS * (2 * HIDDEN + 4 * HEADS)

    def test_masks_of_dropout_that_drops_nothing(self, toy: Any) -> None:
        block = toy.model().blocks[1]
        plain, masks = (target(toy, MemoryTraits(masks_always=always)) for always in (False, True))
        assert held(block, masks).saved - held(block, plain).saved == 2 * TOKENS * HIDDEN

    @pytest.mark.parametrize("etp", [1, 2])
    def test_tokens_of_experts_under_tp(self, toy: Any, etp: int) -> None:
        experts = MoeLayer(hidden=64, num_experts=8, top_k=2, expert_ffn_size=32)
        block = Block(kind=BlockKind.DECODER, layers=(experts,))
        framework = target(toy, MemoryTraits(gated_tensors=3.0, expert_rows=1.0), regathers_sequence=True)
        rows = TOKENS * 2 / 2  # of two experts a token, parted by tp
        inner = rows * (3 * 32 * 2 + etp * 64 * 2)  # each rank of etp has all rows of the others, and part of the width
        routing = TOKENS / 2 * (8 * 4 + 64 * 2)
        assert held(block, framework, tp=2, dp=2, ep=2, etp=etp, sequence_parallel=True).saved == inner + routing

    def test_losses(self, toy: Any) -> None:
        head = toy.model().blocks[-1]
        loss = LossTensors(kept=1.0, beside=1.0)
        sharded = LossTensors(kept_float32=1.0, beside_float32=4.0)
        framework = target(toy, MemoryTraits(loss=loss, sharded_loss=sharded))
        whole, split = held(head, framework), held(head, framework, tp=2, vocab_parallel=True)
        inputs = 2 * TOKENS * HIDDEN * 2
        assert (whole.saved[0], whole.working[0]) == (inputs + 2 * TOKENS * VOCAB, 2 * TOKENS * VOCAB)
        assert (split.saved[0], split.working[0]) == (inputs + 4 * TOKENS * VOCAB / 2, 16 * TOKENS * VOCAB / 2)

    def test_what_weight_gradients_take(self, toy: Any) -> None:
        block = toy.model().blocks[1]
        megatron = target(toy, MemoryTraits(), torch_schedules=False)
        read = HIDDEN + HIDDEN + HIDDEN + FFN  # by queries, keys and values; out; gate and up; down
        made = HIDDEN + 2 * KV + HIDDEN + 2 * FFN + HIDDEN
        assert held(block, megatron).waiting == 2 * TOKENS * (read + made)
        torch = target(toy, MemoryTraits())
        assert held(block, torch).waiting == held(block, torch).saved + 2 * TOKENS * (read + made)


class TestMoments:
    def test_an_update_of_everything_at_once(self, toy: Any) -> None:
        framework = target(toy, MemoryTraits(update=UpdateTensors(temporaries=2.0)))
        memory, params = peak(toy, framework), toy.model().params
        assert memory.moment is Moment.UPDATE
        assert memory.grads_bytes == 2 * params
        assert memory.working_bytes == (4 + 8) * params  # gradients copied to float32, and two temporaries
        assert memory.activations_bytes == 0

    def test_gradients_that_are_freed_leave_blocks_behind(self, toy: Any) -> None:
        traits = MemoryTraits(update=UpdateTensors(temporaries=2.0, frees_grads=True), fragmentation=0.0)
        framework, params = target(toy, traits), toy.model().params
        assert peak(toy, framework).grads_bytes == peak(toy, framework).fragmentation_bytes == 0
        backward = peak(toy, target(toy, MemoryTraits()))
        apart = peak(toy, target(toy, replace(traits, reuses_blocks=False)))
        own = backward.activations_bytes + backward.working_bytes + backward.communication_bytes
        assert apart.fragmentation_bytes == own + (2 + 2) * params  # gradients, and the flat tensor they went through

    def test_a_model_made_whole(self, toy: Any) -> None:
        workload = replace(BF16, seq_len=2, global_batch_size=64)
        config: dict[str, Any] = {"dp": 64, "dp_shard": 64, "zero_stage": 3}
        built = peak(toy, target(toy, MemoryTraits(builds_whole=True, units=0.0)), workload, **config)
        assert (built.moment, built.params_bytes) == (Moment.BUILD, 2 * toy.model().params)
        assert built.peak_bytes == built.params_bytes
        sharded = peak(toy, target(toy, MemoryTraits(units=0.0)), workload, **config)
        assert sharded.moment is Moment.BACKWARD and sharded.peak_bytes < built.peak_bytes

    def test_gradients_reduced_where_they_are(self, toy: Any) -> None:
        config: dict[str, Any] = {"dp": 2, "dp_shard": 2, "zero_stage": 1}
        assert peak(toy, target(toy, MemoryTraits(reduces_in_place=True), reduces_once=True), **config).moment
        assert peak(toy, target(toy, MemoryTraits(reduces_in_place=True)), **config).communication_bytes == 0
        buckets = peak(toy, target(toy, MemoryTraits(bucket_numbers=1000.0)), **config)
        assert buckets.communication_bytes == 2 * 1000 * 2

    def test_micro_batches_beyond_the_schedule(self, toy: Any) -> None:
        config: dict[str, Any] = {"pp": 2, "schedule": Schedule.ONE_F_ONE_B}
        plain, more = (
            peak(toy, target(toy, MemoryTraits(loss=LossTensors(), held_more=number)), **config).activations_bytes
            for number in (0, 1)
        )
        assert more * 2 == plain * 3  # two on the first of two stages, and one
        half = peak(toy, target(toy, MemoryTraits(loss=LossTensors(), held_factor=1.5)), **config).activations_bytes
        assert half == more

    def test_a_split_backward_waits(self, toy: Any) -> None:
        framework = target(toy, MemoryTraits(loss=LossTensors()), torch_schedules=False)
        block, head = (held(toy.model().blocks[index], framework) for index in (1, 2))
        memory = peak(toy, framework, pp=2, schedule=Schedule.ZB_H1)
        assert memory.stage == 1  # one micro-batch is held there while another waits
        on_stage = 2 * (block.saved + block.waiting) + head.saved + head.waiting
        assert memory.activations_bytes == on_stage

    def test_stages_of_internevo(self, toy: Any) -> None:
        kinds = block_kinds(toy.model(num_layers=6))
        assert stage_counts(kinds, 4, 1, Partition.LATER)[:, 0, 1].tolist() == [1, 1, 2, 2]


def test_layers_on_the_host() -> None:
    activations, excess = np.full(4, 80.0), np.array([-5.0, 0.5, 16.0, 1e9])
    # of eight layers with 10 bytes each: none, one, two, all but one
    assert kept_activations(activations, excess, 8).tolist() == [80.0, 70.0, 60.0, 10.0]


def test_attention_written_out_is_untouched_by_casts(toy: Any) -> None:
    framework = target(toy, MemoryTraits(), attention=AttentionKernel.WRITTEN_OUT)
    block = toy.model().blocks[1]
    flash = target(toy, MemoryTraits())
    assert held(block, framework).saved - held(block, flash).saved == TOKENS * 32 * HEADS * 2
