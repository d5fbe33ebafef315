"""Seconds of operators and blocks, recomputed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meshwright import InputError
from meshwright.cost_models.attention import attended_pairs
from meshwright.cost_models.compute import block_seconds
from meshwright.cost_models.framework import HostCost, PointwiseCost
from meshwright.cost_models.host import host_wait
from meshwright.cost_models.operators import UNALIGNED
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MlpLayer, MoeLayer
from meshwright.profiler.model import Block, BlockKind

WORKLOAD = Workload(seq_len=32, global_batch_size=8)
RATE = 0.5e12  # FLOP/s that the toy device reaches without half sizes


def batch(**changes: Any) -> ConfigBatch:
    return ConfigBatch.from_configs([ParallelConfig(**changes)])


def decoder(*layers: Any) -> Block:
    return Block(kind=BlockKind.DECODER, layers=layers)


def test_a_feed_forward_layer_is_three_matmuls_forward_and_six_backward(toy: Any) -> None:
    # memory so fast that FLOPs bind; tokens = 2 * 32; gate, up and down of 64 x 128, each 2 m n k
    device = toy.device(memory_bytes_per_s=1e15)
    block = decoder(MlpLayer(hidden=64, ffn_size=128))
    seconds = block_seconds(block, WORKLOAD, device, toy.framework(), batch(micro_batch_size=2))
    one = 2 * 64 * 64 * 128 / RATE
    assert seconds.forward == pytest.approx([3 * one])
    assert seconds.backward_input == pytest.approx([3 * one])
    assert seconds.backward_weight == pytest.approx([3 * one])


def test_a_cut_matmul_is_less_efficient_than_its_share(toy: Any) -> None:
    # tp 4 leaves 32 columns: share n/(n + 32) falls from 128/160 to 32/64 for gate and up; down keeps n = 64
    device = toy.device(memory_bytes_per_s=1e15, half_n=32.0)
    block = decoder(MlpLayer(hidden=64, ffn_size=128))
    whole = block_seconds(block, WORKLOAD, device, toy.framework(), batch())
    cut = block_seconds(block, WORKLOAD, device, toy.framework(), batch(tp=4))
    flops = 2 * 32 * 64 * 128
    assert whole.forward == pytest.approx([flops / RATE * (2 * 160 / 128 + 96 / 64)])
    assert cut.forward == pytest.approx([flops / 4 / RATE * (2 * 64 / 32 + 96 / 64)])


def test_a_matmul_never_beats_the_memory(toy: Any) -> None:
    # bf16: 2 bytes * (m k + k n + m n), and the call's overhead on top
    device = toy.device(memory_bytes_per_s=1e6, overhead_s=0.25)
    block = decoder(MlpLayer(hidden=8, ffn_size=16, gated=False))
    seconds = block_seconds(block, WORKLOAD, device, toy.framework(), batch())
    num_bytes = 2 * (32 * 8 + 8 * 16 + 32 * 16)
    assert seconds.forward == pytest.approx([2 * (num_bytes / 1e6 + 0.25)])


def test_attention_with_grouped_heads(toy: Any) -> None:
    device = toy.device(memory_bytes_per_s=1e15)
    layer = toy.model().attention  # 8 query heads and 4 key/value heads of 8
    seconds = block_seconds(decoder(layer), WORKLOAD, device, toy.framework(), batch(tp=2))
    projections = 2 * 32 * 64 * (32 + 16 + 16 + 32)  # queries, keys, values, output on one of two ranks
    scores = 2 * 4 * (32 * 33 / 2) * (8 + 8)  # 4 heads on this rank
    assert seconds.forward == pytest.approx([(projections + scores) / RATE])
    assert seconds.backward_input == pytest.approx([(projections + 2.5 * scores) / RATE])
    assert seconds.backward_weight == pytest.approx([projections / RATE])


def test_more_ranks_than_key_value_heads_keep_a_copy_each(toy: Any) -> None:
    device = toy.device(memory_bytes_per_s=1e15)
    layer = toy.model(num_kv_heads=2).attention
    seconds = block_seconds(decoder(layer), WORKLOAD, device, toy.framework(), batch(tp=8))
    projections = 2 * 32 * 64 * (8 + 8 + 8 + 8)  # one head of each on every rank, not a quarter of one
    assert seconds.backward_weight == pytest.approx([projections / RATE])


@pytest.mark.parametrize(
    ("seq_len", "window", "causal", "skips", "pairs"),
    [
        (8, 0, True, True, 36),  # 8 * 9 / 2
        (8, 0, False, True, 64),
        (8, 3, True, True, 21),  # 1 + 2 + 3 * 6
        (8, 3, True, False, 64),  # the window is only a mask
        (8, 8, True, False, 36),  # a window as long as the sequence masks nothing more
    ],
)
def test_pairs_of_query_and_key(seq_len: int, window: int, causal: bool, skips: bool, pairs: int) -> None:
    assert attended_pairs(seq_len, window, causal, skips) == pairs


def test_latent_attention_runs_its_low_rank_projections_whole(toy: Any) -> None:
    layer = AttentionLayer(
        attention_kind=AttentionKind.MLA,
        hidden=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        value_head_dim=8,
        q_lora_rank=24,
        kv_lora_rank=16,
        rope_head_dim=4,
    )
    device = toy.device(memory_bytes_per_s=1e15)
    seconds = block_seconds(decoder(layer), WORKLOAD, device, toy.framework(), batch(tp=2))
    # queries 64 -> 24 -> 2 heads * 12; keys and values 64 -> 20 and 16 -> 2 heads * 16; output 16 -> 64
    flops = 2 * 32 * (64 * 24 + 24 * 24 + 64 * 20 + 16 * 32 + 16 * 64)
    assert seconds.backward_weight == pytest.approx([flops / RATE])


def test_experts_are_grouped_matmuls_over_evenly_spread_tokens(toy: Any) -> None:
    # 32 tokens take 2 of 8 experts: 8 rows each; share m/(m + 8) is a half
    layer = MoeLayer(hidden=16, num_experts=8, top_k=2, expert_ffn_size=32)
    device = toy.device(memory_bytes_per_s=1e15)
    curves = tuple(
        replace(curve, half_m=8.0) if curve.op == "grouped_matmul" else curve for curve in device.efficiencies
    )
    seconds = block_seconds(decoder(layer), WORKLOAD, replace(device, efficiencies=curves), toy.framework(), batch())
    router, experts = 2 * 32 * 16 * 8, 3 * 2 * 64 * 16 * 32
    assert seconds.forward == pytest.approx([router / RATE + experts / (RATE / 2)])


PASS = PointwiseCost(
    forward_kernels=2, forward_passes=3, backward_kernels=4, backward_passes=5, forward_float32_passes=1
)


def test_memory_bound_operators_pass_over_their_tensor(toy: Any) -> None:
    # residual stream: 32 tokens * 64 numbers, 3 passes of 2 bytes and one of 4; two residual additions a block
    device, block = toy.device(), toy.model().blocks[1]
    free = block_seconds(block, WORKLOAD, device, toy.framework(), batch())
    seconds = block_seconds(block, WORKLOAD, device, toy.framework(residual=PASS), batch())
    assert seconds.forward - free.forward == pytest.approx([2 * 32 * 64 * (3 * 2 + 4) / 1e11])
    assert seconds.backward_input - free.backward_input == pytest.approx([2 * 32 * 64 * 5 * 2 / 1e11])
    cut = block_seconds(block, WORKLOAD, device, toy.framework(residual=PASS), batch(tp=2, sequence_parallel=True))
    whole = block_seconds(block, WORKLOAD, device, toy.framework(), batch(tp=2, sequence_parallel=True))
    assert cut.forward - whole.forward == pytest.approx([2 * 16 * 64 * (3 * 2 + 4) / 1e11])


def test_launches_add_on_a_cpu_and_hide_behind_kernels_on_a_gpu(toy: Any) -> None:
    block, framework = toy.model().blocks[1], toy.framework(residual=PASS)
    on_cpu = block_seconds(block, WORKLOAD, toy.device(launch_s=1e-3), framework, batch())
    assert on_cpu.forward_host == pytest.approx([2 * 2 * 1e-3])  # matmuls hold their call in the curve
    assert on_cpu.backward_host == pytest.approx([2 * 4 * 1e-3])
    on_gpu = block_seconds(block, WORKLOAD, toy.device("h100", launch_s=1e-3), framework, batch())
    launches = 2 * 2 + 7 + 1  # additions, seven projections, one attention kernel
    assert on_gpu.forward_host == pytest.approx([launches * 1e-3])


def test_what_of_the_launches_a_device_waits_for(toy: Any) -> None:
    gpu, target = toy.device("h100"), replace(toy.framework(), host=HostCost(run_ahead=2.0))
    kernels, host = np.array([3.0, 3.0, 0.0]), np.array([4.0, 0.0, 2.0])
    assert host_wait(gpu, target, kernels, host) == pytest.approx([2.0, 0.0, 2.0])  # (3^2 + 4^2)^(1/2) - 3
    assert host_wait(toy.device(), target, kernels, host) == pytest.approx(host)  # a CPU waits for every call


def test_full_recompute_stops_at_the_last_tensor_that_backward_needs(toy: Any) -> None:
    device, block = toy.device(memory_bytes_per_s=1e15), toy.model().blocks[1]
    none, selective, full = (
        block_seconds(block, WORKLOAD, device, toy.framework(rms_norm=PASS), batch(recompute=recompute))
        for recompute in (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    )
    down = 2 * 32 * 64 * 128 / RATE
    assert none.recompute == [0.0]
    assert full.forward == none.forward
    assert full.recompute == pytest.approx(full.forward - down)
    assert selective.recompute == pytest.approx([2 * 32 * 64 * (3 * 2 + 4) / 1e15])


def test_embedding_and_head_are_never_recomputed(toy: Any) -> None:
    for block in (toy.model().blocks[0], toy.model().blocks[-1]):
        seconds = block_seconds(
            block, WORKLOAD, toy.device(), toy.framework(rms_norm=PASS), batch(recompute=Recompute.FULL)
        )
        assert seconds.recompute == [0.0]


def test_an_odd_vocabulary_is_padded_on_each_rank(toy: Any) -> None:
    device, head = toy.device(memory_bytes_per_s=1e15), toy.model(vocab_size=257).blocks[-1]
    seconds = block_seconds(head, WORKLOAD, device, toy.framework(), batch(tp=2, vocab_parallel=True))
    assert seconds.forward == pytest.approx([2 * 32 * 64 * 129 / RATE])


def test_rows_that_are_not_aligned_slow_all_three_matmuls_of_a_gpu(toy: Any) -> None:
    device, head = toy.device(memory_bytes_per_s=1e15), toy.model(vocab_size=257).blocks[-1]
    gpu = replace(device, num_multiprocessors=8)
    for multiple, slower, words in ((1, UNALIGNED, 257), (8, 1.0, 264)):
        target = replace(toy.framework(), vocab_multiple=multiple)
        seconds = block_seconds(head, WORKLOAD, gpu, target, batch())
        assert seconds.forward == pytest.approx([slower * 2 * 32 * 64 * words / RATE])
        assert seconds.backward_weight == pytest.approx(seconds.forward)
    alone = replace(toy.framework(), vocab_multiple=8, pads_whole_vocab=False)
    seconds = block_seconds(head, WORKLOAD, device, alone, batch(tp=2, vocab_parallel=True))
    assert seconds.forward == pytest.approx([2 * 32 * 64 * 136 / RATE])
    assert block_seconds(head, WORKLOAD, device, alone, batch()).forward == pytest.approx([2 * 32 * 64 * 257 / RATE])


def test_a_dtype_without_a_rate_is_refused(toy: Any) -> None:
    workload = replace(WORKLOAD, recipe=RECIPES["fp64"])
    with pytest.raises(InputError, match="float64"):
        block_seconds(toy.model().blocks[1], workload, toy.device(), toy.framework(), batch())


def test_each_config_gets_its_own_seconds(toy: Any) -> None:
    configs = [
        ParallelConfig(tp=tp, micro_batch_size=size, sequence_parallel=tp > 1)
        for tp in (4, 1, 2)
        for size in (2, 1)
        for _ in range(2)
    ]
    block, device, framework = toy.model().blocks[1], toy.device(half_n=32.0), toy.framework(residual=PASS)
    many = block_seconds(block, WORKLOAD, device, framework, ConfigBatch.from_configs(configs))
    alone = [
        block_seconds(block, WORKLOAD, device, framework, ConfigBatch.from_configs([config])) for config in configs
    ]
    assert np.array_equal(many.forward, [seconds.forward[0] for seconds in alone])
    assert len(set(many.forward.tolist())) == 6
