"""What ZeRO keeps of weights: shards, their padding, and which buffers a target holds whole; counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshwright.cost_models.residency import block_numbers, expert_numbers, expert_shards, reserved_bytes, state_bytes
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.cost_models.targets import FRAMEWORKS
from meshwright.cost_models.weights import layer_weights
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MlpLayer, MoeLayer, NormKind, NormLayer
from meshwright.profiler.model import Block, BlockKind, load_model
from meshwright.profiler.model_presets import model_presets


def one(**changes: Any) -> ConfigBatch:
    return ConfigBatch.from_configs([ParallelConfig(**changes)])


def sharded(ranks: int, **changes: Any) -> ConfigBatch:
    return one(dp=ranks, dp_shard=ranks, zero_stage=3, **changes)


def numbers(block: Block, batch: ConfigBatch, framework: str = "meshwright") -> tuple[float, float, float]:
    found = block_numbers(block, FRAMEWORKS[framework], batch)
    return float(found.whole[0]), float(found.owned[0]), float(found.gathered[0])


def decoder(*layers: Any) -> Block:
    return Block(kind=BlockKind.DECODER, layers=layers)


@pytest.mark.parametrize("preset", [preset.name for preset in model_presets()])
def test_the_tensors_of_a_layer_sum_to_its_parameters(preset: str) -> None:
    for layer in load_model(preset).layers():
        sizes = [
            weight.copies * max(weight.experts, 1) * weight.rows * weight.columns
            for weight in layer_weights(layer)
            if not weight.tied
        ]
        assert sum(sizes) == layer.params


def test_fsdp2_pads_the_first_dimension_of_each_tensor() -> None:
    # Llama 3's table over 1,000 ranks: 128.256 rows each, so 129
    embedding = load_model("llama3-8b").blocks[0]
    assert numbers(embedding, sharded(1000)) == (128256 * 4096, 129 * 4096, 129_000 * 4096)
    # GPT-2's biases: 3 * 768 numbers as three tensors of 768 over 512 ranks, two each where 1.5 are
    layer = AttentionLayer(
        attention_kind=AttentionKind.MHA, hidden=768, num_heads=12, num_kv_heads=12, head_dim=64, value_head_dim=64,
        qkv_bias=True, out_bias=True,
    )  # fmt: skip
    assert numbers(decoder(layer), sharded(512))[1] == 4 * (2 * 768 + 2)
    assert numbers(decoder(layer), sharded(512), "deepspeed")[1] == layer.params / 512  # flat buffers
    # after tp: 2 of 8 heads of 8, of 3 rows each on 6 ranks; the way out keeps 64 rows, 11 each
    small = AttentionLayer(
        attention_kind=AttentionKind.MHA, hidden=64, num_heads=8, num_kv_heads=8, head_dim=8, value_head_dim=8
    )
    assert numbers(decoder(small), sharded(6, tp=4))[1] == 3 * 3 * 64 + 11 * 16


def test_what_fits_is_not_padded() -> None:
    block = load_model("llama3-70b").blocks[1]
    assert numbers(block, sharded(512)) == (block.params, block.params / 512, block.params)


def test_few_experts_over_many_ranks() -> None:
    experts = MoeLayer(hidden=64, num_experts=8, top_k=2, expert_ffn_size=32)
    matrices = 3 * 64 * 32
    # FSDP2 by itself: a stack of 8 over 32 ranks keeps one on each; the router's 8 rows one each
    assert numbers(decoder(experts), sharded(32), "torchtitan")[1:] == (matrices + 64, 32 * (matrices + 64))
    # ours: along the first dimension that the ranks divide, here rows
    assert numbers(decoder(experts), sharded(32))[1:] == (8 * matrices / 32 + 64, 8 * matrices + 32 * 64)
    assert numbers(decoder(experts), sharded(4))[1] == 2 * matrices + 2 * 64
    # 3 shards of 4 experts: two on the fullest rank
    assert numbers(decoder(experts), sharded(6, ep=2), "torchtitan")[1] == 2 * matrices + 2 * 64
    # 16 shards of 4 experts: cut along the next dimension
    assert numbers(decoder(experts), sharded(32, ep=2), "torchtitan")[1] == 4 * matrices / 16 + 64


def test_experts_apart_from_the_rest_of_their_block() -> None:
    experts = MoeLayer(hidden=64, num_experts=8, top_k=2, expert_ffn_size=32)
    block, matrices = decoder(experts), 3 * 64 * 32
    # edp = 8 * 2 / (4 * 2) = 2 ranks share two experts of half a width
    batch = sharded(8, tp=2, ep=4, etp=2, sequence_parallel=True)
    found = expert_numbers(block, FRAMEWORKS["meshwright"], batch)
    assert found is not None
    assert (found.whole[0], found.owned[0], found.gathered[0]) == (matrices, matrices / 2, matrices)
    assert expert_numbers(block, FRAMEWORKS["torchtitan"], batch) is None
    assert numbers(block, batch)[0] == matrices + 8 * 64


def test_biases_of_experts_are_cut_with_their_matrices() -> None:
    # gpt-oss: [8, 2 * 32] and [8, 64] beside the matrices, 8 of the router; ep cuts both, etp the first alone
    moe = MoeLayer(hidden=64, num_experts=8, top_k=2, expert_ffn_size=32, extra_params=8 * (2 * 32 + 64 + 1))
    held = numbers(decoder(moe), one(tp=2, dp=2, ep=2, etp=2, sequence_parallel=True))[0]
    assert held == 4 * 3 * 64 * 16 + 8 * 64 + 4 * 2 * 16 + 4 * 64 + 8


def test_the_gate_of_a_shared_expert_is_one_row() -> None:
    gated = MoeLayer(hidden=64, num_experts=8, top_k=2, expert_ffn_size=32, shared_ffn_size=16, extra_params=64)
    plain = replace(gated, extra_params=0)
    more = [numbers(decoder(gated), sharded(4))[i] - numbers(decoder(plain), sharded(4))[i] for i in range(3)]
    assert more == [64, 64, 4 * 64]


def test_experts_are_sharded_over_those_that_hold_the_same() -> None:
    assert expert_shards(one(tp=2, dp=16, ep=8, etp=2, dp_shard=16, zero_stage=1)) == 2
    assert expert_shards(one(tp=2, dp=16, ep=8, etp=2, dp_shard=8, zero_stage=1)) == 1
    experts = MoeLayer(hidden=64, num_experts=8, top_k=2, expert_ffn_size=32)
    batch = one(dp=16, ep=4, dp_shard=8, zero_stage=1)
    assert numbers(decoder(experts), batch, "megatron-lm")[1] == 8 * 64 / 8 + 2 * 3 * 64 * 32 / 2


def test_megatron_keeps_a_buffer_for_all_gradients() -> None:
    # one micro-batch: FSDP2 reduces each unit's gradients as it goes, Megatron's buffer is there all the time
    block = load_model("llama3-8b").blocks[1]
    workload, batch = Workload(seq_len=64, global_batch_size=8), one(dp=8, dp_shard=8, zero_stage=1)
    grads = {}
    for name in ("meshwright", "megatron-lm", "nanotron"):
        target = FRAMEWORKS[name]
        found = state_bytes(block_numbers(block, target, batch), workload, target, batch)
        grads[name] = float(found.grads[0]) / block.params
    assert grads == {"meshwright": 4 / 8, "megatron-lm": 4, "nanotron": 4}


def test_masters_apart_leave_shards_in_the_weights_own_dtype() -> None:
    block = decoder(NormLayer(norm_kind=NormKind.RMS, hidden=64), MlpLayer(hidden=64, ffn_size=128))
    target, batch = FRAMEWORKS["megatron-bridge"], sharded(8)
    found = state_bytes(block_numbers(block, target, batch), Workload(seq_len=64, global_batch_size=8), target, batch)
    assert (found.params[0], found.grads[0], found.optimizer[0]) == tuple(
        size * block.params / 8 for size in (2, 4, 12)
    )
    pure = Workload(seq_len=64, global_batch_size=8, recipe=RECIPES["bf16-pure"])
    found = state_bytes(block_numbers(block, target, batch), pure, target, batch)
    assert (found.params[0], found.grads[0], found.optimizer[0]) == tuple(size * block.params / 8 for size in (2, 2, 4))


def test_a_communicator_for_each_group_of_a_rank(toy: Any) -> None:
    device = toy.device()
    measured, target = replace(device, communicator_bytes=100), FRAMEWORKS["meshwright"]
    layouts: tuple[dict[str, int], ...] = ({}, {"dp": 4}, {"tp": 2, "pp": 2, "dp": 2})
    batch = ConfigBatch.from_configs([ParallelConfig(**layout) for layout in layouts])  # type: ignore[arg-type]
    assert reserved_bytes(device, target, batch).tolist() == [2**30] * 3
    assert (reserved_bytes(measured, target, batch) - 2**30).tolist() == [0, 200, 400]
    known = replace(target, memory=replace(target.memory, communicators_bytes=7.0))
    assert (reserved_bytes(device, known, batch) - 2**30).tolist() == [7, 7, 7]
    assert (reserved_bytes(measured, known, batch) - 2**30).tolist() == [0, 200, 400]
