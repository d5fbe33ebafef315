"""Seconds of operators by hand: tiles and waves, splits of k, heads, groups, factors of measured steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meshwright import InputError, load_cluster
from meshwright.cost_models.roofline import operator_seconds
from meshwright.profiler.cluster import Device, Efficiency, Provenance, Source

SOURCE = Source(provenance=Provenance.ASSUMED, reference="round figures of a test")
PEAK = 8e12
FAST_MEMORY = 1e30


def device(op: Any = "matmul", memory_bytes_per_s: float = FAST_MEMORY, **fields: Any) -> Device:
    """Eight multiprocessors of 1 TFLOP/s."""
    curve = Efficiency(op=op, dtype="bfloat16", peak_flops_per_s=PEAK, source=SOURCE, **({"max_share": 1.0} | fields))
    return Device(
        kind="gpu",
        memory_bytes=2**34,
        reserved_bytes=0,
        memory_bytes_per_s=memory_bytes_per_s,
        launch_s=0.0,
        communication_slowdown=0.0,
        efficiencies=(curve,),
        num_multiprocessors=8,
        source=SOURCE,
    )


def matmul_s(chip: Device, m: float, n: float, k: float, num_bytes: float = 0.0) -> float:
    return float(operator_seconds(chip, "matmul", "bfloat16", 2.0 * m * n * k, num_bytes, m, n, k))


def test_whole_waves_run_at_the_limit() -> None:
    """1024 x 512 is 16 tiles of 256 x 128: two full waves of eight."""
    chip = device(tile_exponent=1.0, max_share=0.5, overhead_s=1e-6)
    assert matmul_s(chip, 1024, 512, 1000) == pytest.approx(1e-6 + 2 * 1024 * 512 * 1000 / (0.5 * PEAK))


def test_a_wave_that_is_not_full_takes_as_long_as_a_full_one() -> None:
    """1152 x 512: 4.5 x 4 tiles make 20 of 256 x 128, three waves, though 2.25 would do."""
    chip = device("grouped_matmul", tile_exponent=1.0)  # whose k is not split
    three_waves = 3 * 2 * 256 * 128 * 1000 / 1e12
    # dearer: 9 x 4 = 36 tiles of 128 x 128, five waves at 3/4 of the rate
    assert three_waves < 5 * 2 * 128 * 128 * 1000 / 0.75e12
    flops = 2.0 * 1152 * 512 * 1000
    seconds = operator_seconds(chip, "grouped_matmul", "bfloat16", flops, 0.0, 1152, 512, 1000)
    assert float(seconds) == pytest.approx(three_waves)
    # a matmul's k in two: 40 tiles in five waves of half the length
    assert matmul_s(device(tile_exponent=1.0), 1152, 512, 1000) <= 5 * 256 * 128 * 1000 / 1e12


def test_small_tiles_cost_their_reading_only_where_the_exponent_says_so() -> None:
    """320 x 256 is 20 tiles of 64 x 64: without an exponent the finest tiles lose least to the last wave."""

    def one_group_s(exponent: float) -> float:
        chip = device("grouped_matmul", tile_exponent=exponent)  # whose k is not split
        flops = 2.0 * 320 * 256 * 64
        return float(operator_seconds(chip, "grouped_matmul", "bfloat16", flops, 0.0, 320, 256, 64))

    assert one_group_s(0.0) == pytest.approx(3 * 2 * 64 * 64 * 64 / 1e12)
    # with one: 6 tiles of 128 x 128 in one wave, at 3/4 of the rate
    assert one_group_s(1.0) == pytest.approx(2 * 128 * 128 * 64 / 0.75e12)


def test_a_long_k_is_split_over_idle_multiprocessors_and_its_sums_are_moved() -> None:
    chip = device(tile_exponent=1.0)
    # one tile of 128 x 128 at 3/4 of the rate, k in eight parts
    split = 2 * 128 * 128 * (16384 / 8) / 0.75e12
    assert matmul_s(chip, 128, 128, 16384) == pytest.approx(split)
    # where memory is slow, moving eight partial sums of 128 x 128 numbers costs more than splitting brings
    slow = replace(chip, memory_bytes_per_s=8 * 128 * 128 / split / 2)
    assert split < matmul_s(slow, 128, 128, 16384) < 2 * 128 * 128 * 16384 / 0.75e12


def test_half_k_is_a_prologue_of_each_tile() -> None:
    chip = device(tile_exponent=0.0, half_k=1000.0)
    assert matmul_s(chip, 1024, 512, 1000) == pytest.approx(2 * 2 * 1024 * 512 * 1000 / PEAK)


def test_bytes_bound_what_flops_do_not() -> None:
    chip = device(tile_exponent=0.0, memory_bytes_per_s=1e9, overhead_s=1e-6)
    assert matmul_s(chip, 1024, 512, 1000, num_bytes=1e9) == pytest.approx(1.0 + 1e-6)


def test_groups_fill_the_multiprocessors_together() -> None:
    """Eight experts are a wave of the largest tile, sixteen two; a single one is cut into eight small tiles."""
    chip = device("grouped_matmul", tile_exponent=1.0)
    m, n, k = 256.0, 128.0, 1000.0
    seconds = operator_seconds(
        chip, "grouped_matmul", "bfloat16", np.array([1.0, 8.0, 16.0]) * 2 * m * n * k, 0.0, m, n, k
    )
    wave = 2 * m * n * k / 1e12
    assert seconds == pytest.approx([2 * 64 * 64 * k / 0.375e12, wave, 2 * wave])


def test_attention_by_hand() -> None:
    """16 heads of 1024 queries on 8 multiprocessors are 16 waves; heads of 64 at the exponent of a half."""
    chip = device("attention_forward", max_share=0.8, half_k=1024.0, half_waves=4.0, head_exponent=0.5)
    flops = 1e9
    wide, narrow, wider = operator_seconds(
        chip, "attention_forward", "bfloat16", flops, 0.0, 1024, 16, 1024, np.array([128.0, 64.0, 192.0])
    )
    assert wide == pytest.approx(flops / (PEAK * 0.8 * 0.5 * 16 / 20))
    assert narrow == pytest.approx(wide * 2**0.5)
    assert wider == wide  # no faster than 128


def test_without_multiprocessors_the_curve_is_hyperbolic_in_every_size() -> None:
    chip = replace(device(half_m=10, half_n=20, half_k=30), num_multiprocessors=None)
    assert matmul_s(chip, 10, 20, 30) == pytest.approx(8 * 2 * 10 * 20 * 30 / PEAK)


def test_factors_of_measured_steps_slow_the_work_and_not_the_floor() -> None:
    chip = device(tile_exponent=0.0, overhead_s=1e-6)
    busy = matmul_s(chip, 1024, 512, 1000) - 1e-6
    slowed = replace(chip, matmul_factor=1.2, attention_factor=9.0)
    assert matmul_s(slowed, 1024, 512, 1000) == pytest.approx(1e-6 + 1.2 * busy)


def test_shapes_broadcast() -> None:
    chip = device(tile_exponent=0.3, half_k=100.0)
    m, k = np.array([256.0, 512.0, 4096.0]), np.array([[128.0], [4096.0]])
    seconds = operator_seconds(chip, "matmul", "bfloat16", 2 * m * 1024 * k, 0.0, m, 1024.0, k)
    assert seconds.shape == (2, 3)
    assert seconds[1, 2] == matmul_s(chip, 4096, 1024, 4096)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"no float32 rate for matmul.*meshwright profile"):
        operator_seconds(device(), "matmul", "float32", 1.0, 1.0, 1, 1, 1)
    with pytest.raises(InputError, match="say num_multiprocessors"):
        replace(device(tile_exponent=0.5), num_multiprocessors=None)


@pytest.mark.parametrize(
    ("preset", "m", "n", "k", "measured_s", "tolerance"),
    [  # aiconfigurator-core 0.12.0, gemm_perf, bfloat16, TensorRT-LLM: FLOPs over the share of peak they reached
        ("a100-sxm", 1024, 4096, 4096, 2 * 1024 * 4096 * 4096 / (0.54 * 312e12), 0.12),  # 128 tiles on 108
        ("a100-sxm", 4096, 4096, 4096, 2 * 4096**3 / (0.86 * 312e12), 0.12),
        ("a100-sxm", 8192, 1024, 8192, 2 * 8192**2 * 1024 / (0.82 * 312e12), 0.12),
        ("h100-sxm", 4096, 4096, 4096, 2 * 4096**3 / (0.80 * 989.5e12), 0.12),
        ("h100-sxm", 2048, 1024, 4096, 2 * 2048 * 1024 * 4096 / (0.71 * 989.5e12), 0.25),
        ("b200-sxm", 8192, 8192, 8192, 2 * 8192**3 / (0.66 * 2250e12), 0.12),
    ],
)
def test_presets_give_the_times_that_were_measured(
    preset: str, m: int, n: int, k: int, measured_s: float, tolerance: float
) -> None:
    chip = replace(load_cluster(preset).device, matmul_factor=1.0)  # of kernels alone, as the tables
    assert matmul_s(chip, m, n, k, 2.0 * (m * k + k * n + m * n)) == pytest.approx(measured_s, rel=tolerance)


def test_flash_attention_2_on_hopper_is_as_published() -> None:
    """Causal, head size 128, 8192 tokens: flash-attention's pull request 1791, 284.1 and 287.1 TFLOP/s on H100."""
    chip = load_cluster("h100-sxm").device
    flops = 4 * 32 * 128 * 8192 * 8193 / 2
    for op, passes, rate in (("attention_forward", 1.0, 284.1e12), ("attention_backward", 2.5, 287.1e12)):
        seconds = float(operator_seconds(chip, op, "bfloat16", passes * flops, 0.0, 8192, 32, 8192, 128.0))
        assert passes * flops / seconds == pytest.approx(rate, rel=0.01)
    newer = float(operator_seconds(chip, "attention_forward_fa3", "bfloat16", flops, 0.0, 8192, 32, 8192, 128.0))
    assert flops / newer == pytest.approx(630e12, rel=0.1)  # the same source's FlashAttention-3, fitted elsewhere
