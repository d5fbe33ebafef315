"""What targets of FSDP do beside plain kernels and collectives, recomputed by hand."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.compute import block_seconds
from meshwright.cost_models.framework import TRITON_SLOWDOWN, AttentionKernel, PointwiseCost, Selective
from meshwright.cost_models.host import slowest
from meshwright.cost_models.memory_traits import MemoryTraits
from meshwright.cost_models.parts import block_parts
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.saved import block_bytes
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute
from meshwright.cost_models.traffic import block_traffic
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MlpLayer
from meshwright.profiler.model import Block, BlockKind

WORKLOAD = Workload(seq_len=32, global_batch_size=8)
RATE = 0.5e12
ONE_PASS = PointwiseCost(forward_kernels=1, forward_passes=1, backward_kernels=1, backward_passes=1)
SP = {"tp": 4, "sequence_parallel": True, "vocab_parallel": True}


def batch(**changes: Any) -> ConfigBatch:
    return ConfigBatch.from_configs([ParallelConfig(**changes)])


def decoder(*layers: Any) -> Block:
    return Block(kind=BlockKind.DECODER, layers=layers)


def attention(*, bias: bool = False) -> AttentionLayer:
    return AttentionLayer(
        attention_kind=AttentionKind.MHA,
        hidden=64,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        value_head_dim=8,
        rotary=False,
        qkv_bias=bias,
        out_bias=bias,
    )


def with_float8(toy: Any, **changes: Any) -> Any:
    """The toy device, as fast in float8."""
    device = toy.device(**changes)
    more = tuple(replace(curve, dtype="float8") for curve in device.efficiencies if curve.dtype == "bfloat16")
    return replace(device, efficiencies=device.efficiencies + more)


def pointwise_seconds(toy: Any, table: dict[str, PointwiseCost], block: Block, **config: Any) -> tuple[float, float]:
    """Forward and backward seconds that entries of the table add, at 1 byte a second."""
    found = []
    for entries in (table, {}):
        device = toy.device(memory_bytes_per_s=1.0)
        plain = toy.framework()
        framework = replace(plain, fused_projections=True, pointwise=replace(plain.pointwise, **entries))
        # matmuls are bound by memory too, the same in both
        found.append(block_seconds(block, WORKLOAD, device, framework, batch(**config)))
    return tuple(float(getattr(found[0], n)[0] - getattr(found[1], n)[0]) for n in ("forward", "backward_input"))  # type: ignore[return-value]


def test_gradients_of_biases_pass_over_what_projections_put_out(toy: Any) -> None:
    # 32 tokens of bf16: q, k, v of 192, out of 64; up of 128, down of 64
    blocks = decoder(attention(bias=True), MlpLayer(hidden=64, ffn_size=128, gated=False, bias=True))
    assert pointwise_seconds(toy, {"bias": ONE_PASS}, blocks) == pytest.approx([2 * 32 * (192 + 64 + 128 + 64)] * 2)
    without = decoder(attention(), MlpLayer(hidden=64, ffn_size=128, gated=False))
    assert pointwise_seconds(toy, {"bias": ONE_PASS}, without) == (0.0, 0.0)


def test_fused_projections_are_parted(toy: Any) -> None:
    assert pointwise_seconds(toy, {"split": ONE_PASS}, decoder(attention())) == pytest.approx([2 * 32 * 192] * 2)


def test_tritons_attention_is_slower_than_flash_attention_2(toy: Any) -> None:
    device = toy.device(memory_bytes_per_s=1e18)
    flash, triton = (
        block_seconds(decoder(attention()), WORKLOAD, device, replace(toy.framework(), attention=kernel), batch())
        for kernel in (AttentionKernel.FLASH, AttentionKernel.TRITON)
    )
    scores = 2 * 8 * (32 * 33 / 2) * 16 / RATE
    assert triton.forward - flash.forward == pytest.approx([(TRITON_SLOWDOWN[0] - 1) * scores])
    assert triton.backward_input - flash.backward_input == pytest.approx([(TRITON_SLOWDOWN[1] - 1) * 2.5 * scores])


@pytest.mark.parametrize(
    ("recipe", "gathers", "forward", "backward"),
    [
        # the input of gate and up once, cast on its quarter; that of down, whose gradient is gathered, is a rank's own
        ("fp8", True, 32 * 64 / 4 + 32 * 32, 2 * 32 * 32 + 32 * 64 / 4),
        ("fp8", False, 32 * 64 + 32 * 32, 2 * 32 * 32 + 32 * 64),
        ("fp8-rowwise", True, 32 * 64 + 32 * 32, 2 * 32 * 32 + 32 * 64),
    ],
)
def test_casts_to_float8(toy: Any, recipe: str, gathers: bool, forward: float, backward: float) -> None:
    device = with_float8(toy, memory_bytes_per_s=1.0)
    workload = replace(WORKLOAD, recipe=RECIPES[recipe])
    plain = toy.framework()
    free, spent = (
        block_seconds(
            decoder(MlpLayer(hidden=64, ffn_size=128)),
            workload,
            device,
            replace(plain, float8_gathers=gathers, pointwise=replace(plain.pointwise, quantize=cost)),
            batch(**SP),
        )
        for cost in (
            PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0),
            ONE_PASS,
        )
    )
    assert spent.forward - free.forward == pytest.approx([2 * forward])
    assert spent.backward_input - free.backward_input == pytest.approx([2 * backward])


@pytest.mark.parametrize(
    ("kind", "recipe", "factor"),
    [
        ("H100-SXM5-80GB", "fp8-rowwise", 1.5 * 1.2),
        ("H100-SXM5-80GB", "fp8", 1.2),
        ("A100-SXM4-80GB", "bf16", 1.0),
        ("GB200-186GB", "mxfp8", 1.1),
    ],
)
def test_factors_of_a_targets_matmuls(toy: Any, kind: str, recipe: str, factor: float) -> None:
    device = with_float8(toy, kind=kind, memory_bytes_per_s=1e18)
    workload = replace(WORKLOAD, recipe=RECIPES[recipe])
    framework = replace(toy.framework(), row_scaled_factor=1.5, block_scaled_factor=1.1, hopper_factor=1.2)
    got = block_seconds(decoder(MlpLayer(hidden=64, ffn_size=128)), workload, device, framework, batch())
    assert got.forward == pytest.approx([factor * 3 * 2 * 32 * 64 * 128 / RATE])


@pytest.mark.parametrize(("activation", "passes"), [("relu2", 4 + 10), ("gelu", 2)])
def test_a_squared_relu_may_cost_more_than_another_activation(toy: Any, activation: str, passes: int) -> None:
    squared = PointwiseCost(forward_kernels=2, forward_passes=4, backward_kernels=4, backward_passes=10)
    once = replace(toy.framework().pointwise.activation, forward_passes=1, backward_passes=1)
    device = toy.device(memory_bytes_per_s=1.0)
    block = decoder(MlpLayer(hidden=64, ffn_size=128, gated=False, activation=activation))

    def spent(**table: Any) -> float:
        plain = toy.framework()
        framework = replace(plain, pointwise=replace(plain.pointwise, **table))
        seconds = block_seconds(block, WORKLOAD, device, framework, batch())
        return float((seconds.forward + seconds.backward_input)[0])

    free = PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0)
    found = spent(activation=once, squared_relu=squared) - spent(activation=free, squared_relu=free)
    assert found == pytest.approx(passes * 32 * 128 * 2)  # bf16


def test_a_step_waits_for_the_slowest_of_its_devices(toy: Any) -> None:
    device = toy.device("gpu", variation=0.02)
    eight, many = (slowest(device, batch(dp=ranks))[0] for ranks in (8, 512))
    assert (eight, slowest(device, batch())[0]) == (1.0, 1.0)
    normal = NormalDist()
    expected = normal.inv_cdf(511.625 / 512.25) - normal.inv_cdf(7.625 / 8.25)
    assert many == pytest.approx(1 + 0.02 * expected)
    assert many == pytest.approx(1.033, abs=0.002)  # the mean of the largest of 512 lies 3.04 deviations up, of 8 1.42
    assert np.array_equal(slowest(toy.device("gpu"), batch(dp=512)), [1.0])


def test_float8_halves_what_is_gathered_and_selective_recompute_may_gather_again(toy: Any) -> None:
    model, kinds = toy.model(), block_kinds(toy.model())
    framework = replace(toy.framework(), float8_gathers=True, selective=Selective(gathers=True))
    config = batch(**SP, dp=2, zero_stage=3, dp_shard=2, recompute=Recompute.SELECTIVE)
    weights, tokens = 36992 / 4, 32 * 64  # weights in a block of the toy are cut by 4 but for its norms
    found = {}
    for recipe in ("bf16", "fp8", "fp8-rowwise", "mxfp8"):
        entries = block_traffic(kinds, 1, model, replace(WORKLOAD, recipe=RECIPES[recipe]), config, framework)
        found[recipe] = {
            (entry.axis, entry.op, entry.phase): (float(entry.calls[0]), float(entry.message_bytes[0]))
            for entry in entries
            if entry.calls[0]
        }
    assert found["bf16"] == found["fp8-rowwise"]
    assert found["fp8"]["tp", "all_gather", "forward"] == (2.0, tokens)
    assert found["bf16"]["tp", "all_gather", "forward"] == (2.0, 2 * tokens)
    assert found["bf16"]["tp", "all_gather", "recompute"] == (2.0, 2 * tokens)
    assert ("tp", "reduce_scatter", "recompute") not in found["bf16"]
    assert found["fp8"]["tp", "reduce_scatter", "forward"] == (2.0, 2 * tokens)
    assert found["bf16"]["dp", "all_gather", "forward"][1] == pytest.approx(2 * weights, rel=0.02)
    assert found["fp8"]["dp", "all_gather", "forward"][1] == found["bf16"]["dp", "all_gather", "forward"][1] / 2
    # scaled in blocks, weights are cast where they arrive
    assert found["mxfp8"]["tp", "all_gather", "forward"] == (2.0, tokens)
    assert found["mxfp8"]["dp", "all_gather", "forward"] == found["bf16"]["dp", "all_gather", "forward"]


def parts(toy: Any, framework: Any, config: ConfigBatch) -> Any:
    """Of a decoder block, on links and matmuls that take no time but copies over memory of 1 byte a second."""
    device = toy.device("gpu", memory_bytes_per_s=1.0)
    cluster = toy.cluster(device=device, node=(0.0, 1e30), network=(0.0, 1e30))
    model = toy.model()
    return block_parts(block_kinds(model), model, WORKLOAD, cluster, framework, config, Placement())[1]


def test_copies_among_the_kernels_are_exposed(toy: Any) -> None:
    config = batch(dp=4, zero_stage=3, dp_shard=4)
    framework = replace(toy.framework(), gather_copies=2.0, reduce_copies=1.5, copies_exposed=True)
    got = parts(toy, framework, config)
    assert got.dp_forward == pytest.approx([2 * 2 * 36992])
    assert got.dp_backward == pytest.approx([2 * 2 * 36992 + 1.5 * 4 * 36992])
    beside = parts(toy, replace(framework, copies_exposed=False), config)
    assert beside.dp_forward == pytest.approx([0.0])  # the kernels move more bytes than the copies
    both = got.dp_forward + got.dp_backward
    assert beside.hidden + beside.dp_forward + beside.dp_backward == pytest.approx(both)


@pytest.mark.parametrize(("micro_batch_size", "copies"), [(1, 0.0), (2, 1.0)])
def test_shards_of_several_sequences_are_copied_around_collectives(
    toy: Any, micro_batch_size: int, copies: float
) -> None:
    config = batch(**SP, micro_batch_size=micro_batch_size)
    got = parts(toy, replace(toy.framework(), sequence_copies=2.0), config)
    # forward two gathers and two scatters of 2 bytes * 64 tokens * 64, each read and written
    assert got.tp_forward == pytest.approx([copies * 4 * 2 * 2 * 64 * 64])


def test_a_fused_loss_makes_no_float32_copies_of_the_logits(toy: Any) -> None:
    head = toy.model().blocks[-1]
    plain, fused = (
        block_bytes(head, WORKLOAD, toy.framework(fused_loss=choice, memory=MemoryTraits()), batch())
        for choice in (False, True)
    )
    logits = 32 * 256
    assert plain.saved - fused.saved == pytest.approx([2 * logits])  # float32 log-softmax, bf16 logits
    assert plain.working == pytest.approx([10 * logits])
    assert fused.working == pytest.approx([2 * logits])


def test_selective_recompute_may_drop_outputs_of_projections(toy: Any) -> None:
    block = toy.model().blocks[1]
    config = batch(recompute=Recompute.SELECTIVE)
    kept = [
        float(block_bytes(block, WORKLOAD, toy.framework(selective=choice, memory=MemoryTraits()), config).saved[0])
        for choice in (Selective(), Selective(outputs=0.5), Selective(outputs=1.0))
    ]
    outputs = 64 + 32 + 32 + 64 + 128 + 128 + 64  # of q, k, v, out, gate, up and down, a token
    assert kept[0] - kept[1] == pytest.approx(0.5 * 32 * outputs * 2)
    assert kept[2] == pytest.approx(32 * (64 * 2 + 64 * 2 + 8 * 4))  # the block's input, attention's output and sums
