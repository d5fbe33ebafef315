"""Bytes of weights, states and activations, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meshwright.cost_models.blocks import block_kinds, rank_params, stage_counts
from meshwright.cost_models.memory_traits import MemoryTraits
from meshwright.cost_models.saved import block_bytes
from meshwright.cost_models.step import estimate
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute
from meshwright.cost_models.target_megatron import MEGATRON_LM_2021
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MlpLayer, MoeLayer, NormKind, NormLayer
from meshwright.profiler.model import Block, BlockKind

# toy model: hidden 64, ffn 128, 8 and 4 heads of 8, vocabulary 256, 4 blocks
ATTENTION, MLP = 64 * 64 + 2 * 64 * 32 + 64 * 64, 3 * 64 * 128
BLOCK, TABLE = ATTENTION + MLP + 2 * 64, 256 * 64
WORKLOAD = Workload(seq_len=32, global_batch_size=8)  # bf16 compute, fp32 gradients, master and states
FORMULAS = MemoryTraits()  # of other targets than ours, whose blocks are not followed operator by operator


def params(block: Any, **changes: Any) -> float:
    return float(rank_params(block, ConfigBatch.from_configs([ParallelConfig(**changes)]))[0])


def saved(block: Any, framework: Any, **changes: Any) -> float:
    batch = ConfigBatch.from_configs([ParallelConfig(**changes)])
    return float(block_bytes(block, WORKLOAD, framework, batch).saved[0])


def test_parameters_of_a_rank(toy: Any) -> None:
    embedding, block, head = toy.model().blocks
    assert params(block) == block.params == BLOCK
    assert params(block, tp=4) == (ATTENTION + MLP) / 4 + 128  # norms are whole
    assert params(block, tp=8) == 2 * 64 * 8 + 2 * 64 * 8 + MLP / 8 + 128  # one head of keys and values each
    assert params(embedding, tp=2, vocab_parallel=True) == TABLE / 2
    assert params(head) == TABLE + 64


def test_an_odd_vocabulary_is_padded(toy: Any) -> None:
    embedding = toy.model(vocab_size=257).blocks[0]
    assert params(embedding, tp=4, vocab_parallel=True) == 65 * 64


def test_a_tied_head_is_a_copy_only_across_stages(toy: Any) -> None:
    head = toy.model(tied=True).blocks[-1]
    assert params(head) == 64
    assert params(head, pp=2) == TABLE + 64


def test_latent_projections_and_experts_are_held_whole(toy: Any) -> None:
    latent = AttentionLayer(
        attention_kind=AttentionKind.MLA, hidden=64, num_heads=4, num_kv_heads=4, head_dim=8, value_head_dim=8,
        q_lora_rank=24, kv_lora_rank=16, rope_head_dim=4, extra_params=40,
    )  # fmt: skip
    whole, cut = 64 * 24 + 64 * 20 + 40, 24 * 48 + 16 * 64 + 32 * 64
    block = Block(kind=BlockKind.DECODER, layers=(latent,))
    assert params(block) == latent.params == whole + cut
    assert params(block, tp=2) == whole + cut / 2
    experts = MoeLayer(hidden=64, num_experts=8, top_k=2, expert_ffn_size=32, shared_ffn_size=16)
    block = Block(kind=BlockKind.DECODER, layers=(experts,))
    assert params(block, dp=4, ep=4) == 2 * 3 * 64 * 32 + 8 * 64 + 3 * 64 * 16


def test_stages_hold_their_blocks(toy: Any) -> None:
    kinds = block_kinds(toy.model(num_layers=6))
    assert stage_counts(kinds, 2, 2)[:, :, 1].tolist() == [[1, 2], [2, 1]]  # stages of 1, 2, 2, 1 blocks
    assert stage_counts(kinds, 2, 2)[:, :, 0].tolist() == [[1, 0], [0, 0]]  # the embedding on the first of all
    assert stage_counts(kinds, 2, 2)[:, :, 2].tolist() == [[0, 0], [0, 1]]


def test_equal_blocks_are_one_kind_wherever_they_stand(toy: Any) -> None:
    model, other = toy.model(), toy.model(window=16).blocks[1]
    mixed = replace(
        model, blocks=(model.blocks[0], *([replace(model.blocks[1], repeat=1), other] * 2), model.blocks[2])
    )
    kinds = block_kinds(mixed)
    assert len(kinds) == 4
    assert kinds.of_layer.tolist() == [1, *[2] * 4, 1, *[2] * 4]


def test_activations_of_a_block(toy: Any) -> None:
    # 32 tokens, 2 bytes: two fused norms keep their inputs; the projections' inputs; queries, keys, values, output with
    # a float32 log-sum-exp for each head; gate, up, activated gate and product
    block = toy.model(norm=NormKind.LAYER).blocks[1]
    attention = 32 * (2 * (64 + 32 + 32 + 64) + 4 * 8)
    expected = 2 * (32 * 64 * 2) + 2 * (32 * 64 * 2) + attention + 4 * 32 * 128 * 2
    assert saved(block, toy.framework()) == expected


def test_activations_under_tensor_and_sequence_parallelism(toy: Any) -> None:
    block = toy.model(norm=NormKind.LAYER).blocks[1]
    stream, inner = 32 * 64 * 2, 32 * (2 * 192 + 32) + 4 * 32 * 128 * 2
    assert saved(block, toy.framework(), tp=2) == 4 * stream + inner / 2
    # the norms' inputs are cut; a projection's gathered input is kept, or gathered again
    sp = {"tp": 2, "sequence_parallel": True}
    assert saved(block, toy.framework(), **sp) == 2 * stream / 2 + 2 * stream + inner / 2
    assert saved(block, toy.framework(regathers_sequence=True, memory=FORMULAS), **sp) == 4 * stream / 2 + inner / 2


def test_an_rms_norm_written_out_keeps_a_float32_copy(toy: Any) -> None:
    layer_norm, rms_norm = (toy.model(norm=norm).blocks[1] for norm in (NormKind.LAYER, NormKind.RMS))
    more = saved(rms_norm, toy.framework()) - saved(layer_norm, toy.framework())
    assert more == 2 * 32 * 64 * 4  # float32 input and bf16 output instead of bf16 input
    assert saved(rms_norm, toy.framework(eager_rms_norm=False, memory=FORMULAS)) == saved(layer_norm, toy.framework())


def test_activations_under_recompute(toy: Any) -> None:
    block, framework = toy.model().blocks[1], toy.framework()
    assert saved(block, framework, recompute=Recompute.FULL) == 32 * 64 * 2
    # the block's input, projections' outputs (queries, keys, values, output; gate, up, down), attention's output
    kept = 64 + (64 + 32 + 32) + 64 + 64 + (128 + 128) + 64
    assert saved(block, framework, recompute=Recompute.SELECTIVE) == 32 * (kept * 2 + 8 * 4)
    batch = ConfigBatch.from_configs([ParallelConfig(recompute=Recompute.FULL)])
    framework = toy.framework(memory=FORMULAS)
    whole = saved(block, framework)
    assert block_bytes(block, WORKLOAD, framework, batch).working == [whole - 32 * 64 * 2]


def test_logits_and_loss(toy: Any) -> None:
    # whole: their log-softmax in float32; split over tp: the logits themselves
    head = toy.model(norm=NormKind.LAYER).blocks[-1]
    assert saved(head, toy.framework(memory=FORMULAS)) == 2 * (32 * 64 * 2) + 32 * 256 * 4
    assert saved(head, toy.framework(memory=FORMULAS), tp=2, vocab_parallel=True) == 2 * (32 * 64 * 2) + 32 * 128 * 2
    batch = ConfigBatch.from_configs([ParallelConfig()])
    assert block_bytes(head, WORKLOAD, toy.framework(memory=FORMULAS), batch).working == [32 * 256 * (4 + 4 + 2)]


@pytest.mark.parametrize(
    ("zero_stage", "params_bytes", "grads", "states", "copies"),
    [
        (0, 4.0, 4.0, 8.0, 2.0),  # parameters are the master weights, copies are computed with
        (1, 1.0, 4.0, 2.0, 2.0),
        (2, 1.0, 1.0, 2.0, 2.0),
    ],
)
def test_what_each_zero_stage_keeps(
    toy: Any, zero_stage: int, params_bytes: float, grads: float, states: float, copies: float
) -> None:
    config = ParallelConfig(dp=4, zero_stage=zero_stage, dp_shard=4 if zero_stage else 1)
    memory = estimate(toy.model(), WORKLOAD, toy.cluster(), config).memory
    numbers = toy.model().params
    assert memory.params_bytes == params_bytes * numbers
    assert memory.grads_bytes == grads * numbers
    assert memory.optimizer_bytes == states * numbers
    assert memory.gathered_bytes == copies * numbers


def test_without_master_weights_one_keeps_a_shard_beside_the_gathered(toy: Any) -> None:
    workload = replace(WORKLOAD, recipe=RECIPES["fp32"])
    config = ParallelConfig(dp=4, zero_stage=1, dp_shard=4)
    memory = estimate(toy.model(), workload, toy.cluster(), config).memory
    assert memory.params_bytes == 4 * toy.model().params / 4
    assert memory.gathered_bytes == 4 * toy.model().params
    assert memory.optimizer_bytes == 8 * toy.model().params / 4


def test_the_fullest_stage_is_reported_whole(toy: Any) -> None:
    # 1f1b with 4 stages: rank 0 has the embedding and 4 micro-batches, the last the head and 1
    model = toy.model(vocab_size=8)
    config = ParallelConfig(pp=4)
    memory = estimate(model, WORKLOAD, toy.cluster(), config).memory
    assert memory.stage == 0
    assert memory.gathered_bytes == 2 * (BLOCK + 8 * 64)
    three, four = (micro_batches * saved(model.blocks[1], toy.framework()) for micro_batches in (3, 4))
    sent = 5 * 32 * 64 * 2  # four micro-batches' outputs, and the one whose handle is still there
    assert three + sent < memory.activations_bytes < four + sent  # of the one at hand some is gone
    assert memory.communication_bytes == 32 * 64 * 2  # what came back from the next stage
    heavy_head = estimate(toy.model(vocab_size=4096), WORKLOAD, toy.cluster(), config).memory
    assert heavy_head.stage == 3


def test_published_shares_of_activation_memory(toy: Any) -> None:
    # Korthikanti et al. 2022 (arXiv 2205.05198), equations 2 and 4 without the attention scores and dropout masks that
    # flash attention without dropout has not: s b h (34 - 2 (masks)) -> tensor parallel 8 + 24/t, with sp 32/t
    block = toy.model(num_kv_heads=8, ffn_size=256, gated=False, norm=NormKind.LAYER).blocks[1]
    framework = toy.framework(regathers_sequence=True, memory=FORMULAS)
    token = 32 * 64
    statistics = 32 * 8 * 4  # log-sum-exp
    whole = saved(block, framework) - statistics
    assert whole / token == 32
    assert (saved(block, framework, tp=4) - statistics / 4) / token == 8 + 24 / 4
    sp = saved(block, framework, tp=4, sequence_parallel=True) - statistics / 4
    assert sp / token == 32 / 4
    assert np.isfinite(whole)


def test_scores_and_masks_are_kept_where_attention_is_written_out() -> None:
    # arXiv 2205.05198, equation 2, tp 1: s b h (34 + 5 a s / h) bytes a layer, 10 of the 34 not cut by tp; with
    # selective recompute the second term goes (equation 6)
    batch, seq, hidden, heads = 2, 128, 64, 4
    norm = NormLayer(norm_kind=NormKind.LAYER, hidden=hidden)
    attention = AttentionLayer(
        attention_kind=AttentionKind.MHA, hidden=hidden, num_heads=heads, num_kv_heads=heads, head_dim=16,
        value_head_dim=16,
    )  # fmt: skip
    mlp = MlpLayer(hidden=hidden, ffn_size=4 * hidden, gated=False)
    block = Block(kind=BlockKind.DECODER, layers=(norm, attention, norm, mlp), repeat=1)
    workload = Workload(seq_len=seq, global_batch_size=batch, recipe=RECIPES["fp16"])
    for recompute, scores in ((Recompute.NONE, 5), (Recompute.SELECTIVE, 0)):
        configs = ConfigBatch.from_configs([ParallelConfig(micro_batch_size=batch, recompute=recompute)])
        got = float(block_bytes(block, workload, MEGATRON_LM_2021, configs).saved[0])
        log_sums = 4.0 * heads * seq * batch  # of flash attention, kept all the same
        assert got == pytest.approx(seq * batch * hidden * (34 + scores * heads * seq / hidden) + log_sums)
