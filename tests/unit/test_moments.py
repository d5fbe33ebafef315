"""What a rank of our executors holds at each moment, counted by hand on a small Llama."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshwright.cost_models.blocks import block_kinds, stage_counts
from meshwright.cost_models.estimate import KINDS, Moment
from meshwright.cost_models.moments import rank_moments
from meshwright.cost_models.rank_bytes import KindBytes
from meshwright.cost_models.saved import block_bytes
from meshwright.cost_models.step_states import Pipeline, states, unlike_ranks
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute, Schedule
from meshwright.cost_models.traffic import hop_bytes
from meshwright.cost_models.workload import RECIPES, Workload

# toy model: hidden 64, ffn 128, 8 and 4 heads of 8, vocabulary 256, 4 blocks
BLOCK, TABLE = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64, 256 * 64
OUTER, TOKENS, LOGITS = 2 * TABLE + 64, 32, 32 * 256
HIDDEN = TOKENS * 64 * 2


def pipeline_of(toy: Any, recipe: str = "bf16", batch: int = 8, **axes: Any) -> tuple[list[Any], Pipeline]:
    config, model = ParallelConfig(**axes), toy.model()
    workload = Workload(seq_len=TOKENS, global_batch_size=batch, recipe=RECIPES[recipe])
    configs, kinds, framework = ConfigBatch.from_configs([config]), block_kinds(model), toy.framework()
    counts = np.asarray(stage_counts(kinds, config.pp, config.vpp), dtype=np.float64)
    pipe = Pipeline(
        kinds=kinds, counts=counts, schedule=config.schedule, workload=workload, framework=framework, batch=configs
    )
    return [block_bytes(block, workload, framework, configs) for block in kinds.kinds], pipe


def moments(toy: Any, rank: int = 0, **options: Any) -> list[tuple[Moment, KindBytes]]:
    """Time after time, at each the moments in their order."""
    blocks, pipe = pipeline_of(toy, **options)
    found = rank_moments(blocks, pipe, rank, hop_bytes(toy.model(), pipe.workload, pipe.batch))
    tables = [
        (moment, {name: np.atleast_2d(getattr(held, name)) for name in (*KINDS, "total")}) for moment, held in found
    ]
    return [
        (moment, KindBytes(**{name: table[name][min(time, len(table[name]) - 1)] for name in KINDS}))
        for time in range(max(len(table["total"]) for _, table in tables))
        for moment, table in tables
        if time < len(table["total"])
    ]


def of(found: list[tuple[Moment, KindBytes]], moment: Moment) -> list[KindBytes]:
    return [held for name, held in found if name is moment]


def saved(toy: Any, **options: Any) -> tuple[float, float]:
    blocks, _ = pipeline_of(toy, **options)
    return float(blocks[1].saved[0]), float(blocks[2].saved[0])


def test_zero_3_gathers_ahead_and_reduces_behind(toy: Any) -> None:
    found = moments(toy, dp=4, zero_stage=3, dp_shard=4)  # two micro-batches
    loss, (first, second, third, last) = of(found, Moment.LOSS)[-2], of(found, Moment.BACKWARD)[-4:]
    assert {float(held.params[0]) for _, held in found} == {(OUTER + 4 * BLOCK) * 4 / 4}
    # at the loss the flat buffer of the last block; then a block and the flat buffer of the one before
    assert loss.gathered == (OUTER + BLOCK) * 2
    assert first.gathered == second.gathered == third.gathered == (OUTER + 2 * BLOCK) * 2
    assert last.gathered == (OUTER + BLOCK) * 2
    # what was reduced last in the first micro-batch; then the block before
    assert loss.communication == first.communication == OUTER * 4
    assert second.communication == third.communication == last.communication == BLOCK * 4
    assert {float(held.grads[0]) for held in (loss, first, second, last)} == {OUTER + 4 * BLOCK}  # shards in float32


def test_the_loss_and_its_logits(toy: Any) -> None:
    forward, backward = of(moments(toy, dp=8, zero_stage=1, dp_shard=8), Moment.LOSS)[:2]
    block, head = saved(toy)
    assert head == 32 * 64 * (4 + 2 + 2) + LOGITS * 4  # norm, projection's input, log-softmax in float32
    assert forward.activations == backward.activations == 4 * block + head
    assert forward.working == LOGITS * (2 + 4)  # as they came, and raised to float32
    assert backward.working == LOGITS * (4 + 4)  # gradients of log-softmax and of its input
    assert forward.grads == 0  # one micro-batch: nothing is there yet
    assert forward.gathered == (OUTER + 4 * BLOCK + BLOCK) * 2  # all, and the last flat buffer


def test_a_sharded_loss_keeps_its_logits(toy: Any) -> None:
    forward = of(moments(toy, tp=2, vocab_parallel=True), Moment.LOSS)[0]
    assert forward.working == LOGITS / 2 * (4 + 4)  # raised, and their exponentials


@pytest.mark.parametrize(("recipe", "own", "stays"), [("bf16", 2, 0), ("fp32", 0, 4)])
def test_gradients_of_a_unit_before_they_are_reduced(toy: Any, recipe: str, own: int, stays: int) -> None:
    reduction = of(moments(toy, recipe=recipe, batch=4, dp=4), Moment.REDUCTION)
    outer = reduction[2]
    assert outer.working == OUTER * own
    assert outer.grads == (4 * BLOCK) * 4 + OUTER * stays
    flat = OUTER * 4 if recipe == "bf16" else 0.0  # without master weights ZeRO 0 reduces after the step's end
    assert outer.communication == flat
    quotient = reduction[3]
    assert quotient.communication == 2 * flat
    assert quotient.grads == (4 * BLOCK + OUTER) * 4


def test_zero_1_adds_to_whole_gradients_until_the_last_micro_batch(toy: Any) -> None:
    found = moments(toy, dp=4, zero_stage=1, dp_shard=4)  # two micro-batches
    assert [held.grads for held in of(found, Moment.LOSS)[::2]] == [0, (OUTER + 4 * BLOCK) * 4]
    after = of(found, Moment.REDUCTION)[-1]
    assert after.grads == (OUTER + 4 * BLOCK) * 4 / 4
    assert after.gathered == 0


def test_micro_batches_in_flight_keep_what_they_received_and_sent(toy: Any) -> None:
    block, head = saved(toy, pp=2)
    first = of(moments(toy, pp=2), Moment.BACKWARD)[0]
    parted = block_bytes_left(toy)
    assert first.activations == 2 * (2 * block + HIDDEN) - parted
    # the last stage: received, not sent; the loss is over
    last = of(moments(toy, rank=1, pp=2), Moment.BACKWARD)[0]
    assert last.activations == 2 * block + HIDDEN - parted
    assert head > 0


def block_bytes_left(toy: Any) -> float:
    """What of a block is gone at the fullest moment of its backward."""
    blocks, _ = pipeline_of(toy)
    return float(blocks[1].saved[0] - blocks[1].lifetimes.backward.activations[0])


def test_recomputed_blocks_save_what_was_received_themselves(toy: Any) -> None:
    full = of(moments(toy, rank=1, pp=2, recompute=Recompute.FULL), Moment.BACKWARD)[0]
    assert full.activations == 2 * HIDDEN


def test_all_but_1f1b_keep_what_they_sent(toy: Any) -> None:
    block = saved(toy)[0]
    held = {
        schedule: of(moments(toy, pp=2, schedule=schedule), Moment.BACKWARD)
        for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B)
    }
    parted = block_bytes_left(toy)
    assert held[Schedule.GPIPE][0].activations == 8 * (2 * block + HIDDEN) - parted
    assert held[Schedule.GPIPE][3].activations == 7 * 2 * block + 8 * HIDDEN - parted
    assert held[Schedule.ONE_F_ONE_B][3].activations == 2 * (2 * block + HIDDEN) + HIDDEN - parted


def test_put_off_gradients_of_matrices_wait(toy: Any) -> None:
    blocks, pipe = pipeline_of(toy, pp=2, schedule=Schedule.ZB_H1)
    lives = blocks[1].lifetimes
    # a token's inputs of matrices: norms 64 + 64, attention 64, product 128; gradients of outputs: queries 64, keys and
    # values 32 + 32, output 64, gate, up 128 + 128, down 64; in bf16
    assert lives.inputs == TOKENS * (64 * 3 + 128) * 2
    assert lives.outputs == TOKENS * (64 + 32 + 32 + 64 + 256 + 64) * 2
    waiting = [float(state.waiting.max()) for state in states(pipe, 1)]
    assert max(waiting) == 2  # on the last rank, rank + 1 at most
    weights = of(moments(toy, rank=1, pp=2, schedule=Schedule.ZB_H1), Moment.WEIGHTS)
    assert max(float(held.working[0]) for held in weights) >= 2 * BLOCK * 2


def test_of_equal_ranks_the_first_is_looked_at(toy: Any) -> None:
    assert unlike_ranks(pipeline_of(toy, pp=4)[1]) == [0, 1, 3]
    assert unlike_ranks(pipeline_of(toy, pp=4, schedule=Schedule.ZB_H1)[1]) == [0, 1, 2, 3]
