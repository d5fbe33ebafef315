"""Parameters, gradients and optimizer bytes of models with experts, counted by hand from their public configs.

Sizes are those of each model's ``config.json`` on the hub (deepseek-ai/DeepSeek-V3, Qwen/Qwen3-235B-A22B,
mistralai/Mixtral-8x22B-v0.1). How they are cut is Megatron-Core's: attention and shared experts by tp, routed experts
by ep and etp, routers and norms whole, of MLA the projections down to a latent whole and those up from it by tp; its
distributed optimizer shards dense parameters over dp * cp ranks and experts over those that hold the same ones,
dp * cp * tp / (ep * etp) (its guides "Multi-Latent Attention", "Mixture of Experts" and "Distributed Optimizer").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from meshwright.cost_models.blocks import block_kinds, stage_counts
from meshwright.cost_models.estimate import BatchEstimate
from meshwright.cost_models.residency import Numbers, StateBytes, block_numbers, state_bytes
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.cost_models.targets import FRAMEWORKS
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import load_model

# DeepSeek-V3: hidden 7168, 61 layers (3 dense), 128 heads of 128 and 64 rotary, latents of 1536 and 512, vocabulary
# 129280
D_LATENT = 7168 * 1536 + 1536 + 7168 * (512 + 64) + 512  # down to the latents, and the latents' norms
D_HEADS = 1536 * 128 * (128 + 64) + 512 * 128 * (128 + 128) + 128 * 128 * 7168  # up to the heads, and the way out
D_NORMS = 2 * 7168
D_MLP = 3 * 7168 * 18432
D_ROUTER = 256 * 7168
D_SHARED = 3 * 7168 * 2048
D_EXPERTS = 256 * 3 * 7168 * 2048
D_TABLE = 129280 * 7168
# Qwen3-235B-A22B: hidden 4096, 94 layers, 64 heads and 4 key/value heads of 128, 128 experts of 1536, vocabulary 151936
Q_QUERY_OUT = 2 * 64 * 128 * 4096
Q_KEY_VALUE = 2 * 4 * 128 * 4096
Q_WHOLE = 128 * 4096 + 2 * 4096 + 2 * 128  # router, norms, norms of queries and keys
Q_EXPERTS = 128 * 3 * 4096 * 1536
Q_TABLE = 151936 * 4096
# Mixtral-8x22B: hidden 6144, 56 layers, 48 heads and 8 key/value heads of 128, 8 experts of 16384, vocabulary 32000
M_QUERY_OUT = 2 * 48 * 128 * 6144
M_KEY_VALUE = 2 * 8 * 128 * 6144
M_WHOLE = 8 * 6144 + 2 * 6144  # router, norms
M_EXPERTS = 8 * 3 * 6144 * 16384
M_TABLE = 32000 * 6144

# bytes a parameter: weights, gradients, optimizer states with the master weights (Megatron's guide: 2, 4 and 12 in bf16
# with gradients in fp32; 4, 4 and 8 in fp32)
RECIPE_BYTES = {
    "bf16": (2, 4, 12),
    "bf16-grads": (2, 2, 12),
    "bf16-pure": (2, 2, 4),
    "fp16": (2, 2, 12),
    "fp8": (2, 4, 12),
    "fp8-rowwise": (2, 4, 12),
    "mxfp8": (2, 4, 12),
    "nvfp4": (2, 4, 12),
    "fp32": (4, 4, 8),
}


@dataclass(frozen=True)
class Case:
    """A layout; ``stages``: pipeline rank -> its dense and expert parameters; ``dense``, ``expert``: ranks of ZeRO."""

    model: str
    layout: dict[str, Any]
    stages: dict[int, tuple[int, int]]
    dense: int
    expert: int


def deepseek(layout: dict[str, Any], stages: dict[int, tuple[int, int]], dense: int, expert: int) -> Case:
    return Case("deepseek-v3", layout, stages, dense, expert)


def qwen3(layout: dict[str, Any], stages: dict[int, tuple[int, int]], dense: int, expert: int) -> Case:
    return Case("qwen3-235b-a22b", layout, stages, dense, expert)


def mixtral(layout: dict[str, Any], stages: dict[int, tuple[int, int]], dense: int, expert: int) -> Case:
    return Case("mixtral-8x22b", layout, stages, dense, expert)


D_ATTENTION = D_LATENT + D_HEADS + D_NORMS
D_MOE = D_ATTENTION + D_ROUTER + D_SHARED
D_ATTENTION_2 = D_LATENT + D_HEADS // 2 + D_NORMS
D_MOE_2 = D_ATTENTION_2 + D_ROUTER + D_SHARED // 2
D_ATTENTION_8 = D_LATENT + D_HEADS // 8 + D_NORMS
D_MOE_8 = D_ATTENTION_8 + D_ROUTER + D_SHARED // 8
CASES = [
    # its own layout (arXiv 2412.19437, section 3.2): pp 16, ep 64, ZeRO 1 over dp 128; 61 layers in 16 stages: 3 on the
    # first and the last two, 4 on the others
    deepseek(
        {"pp": 16, "dp": 128, "ep": 64},
        {
            0: (D_TABLE + 3 * (D_ATTENTION + D_MLP), 0),
            1: (4 * D_MOE, 4 * D_EXPERTS // 64),
            13: (4 * D_MOE, 4 * D_EXPERTS // 64),
            14: (3 * D_MOE, 3 * D_EXPERTS // 64),
            15: (D_TABLE + 7168 + 3 * D_MOE, 3 * D_EXPERTS // 64),
        },
        128,
        128 // 64,
    ),
    # Megatron's: tp 2, ep 64, etp 1 on 1,024 GPUs
    deepseek(
        {"tp": 2, "pp": 16, "dp": 32, "ep": 64},
        {
            0: (D_TABLE // 2 + 3 * (D_ATTENTION_2 + D_MLP // 2), 0),
            1: (4 * D_MOE_2, 4 * D_EXPERTS // 64),
            15: (D_TABLE // 2 + 7168 + 3 * D_MOE_2, 3 * D_EXPERTS // 64),
        },
        32,
        32 * 2 // 64,
    ),
    # the same with experts' own matrices halved
    deepseek(
        {"tp": 2, "pp": 16, "dp": 32, "ep": 32, "etp": 2},
        {2: (4 * D_MOE_2, 4 * D_EXPERTS // (32 * 2))},
        32,
        1,
    ),
    deepseek(
        {"tp": 2, "pp": 8, "dp": 64, "ep": 8, "etp": 2},  # 8 stages: 7, 8, 8, 8, 8, 8, 7, 7
        {
            0: (D_TABLE // 2 + 3 * (D_ATTENTION_2 + D_MLP // 2) + 4 * D_MOE_2, 4 * D_EXPERTS // 16),
            1: (8 * D_MOE_2, 8 * D_EXPERTS // 16),
            7: (D_TABLE // 2 + 7168 + 7 * D_MOE_2, 7 * D_EXPERTS // 16),
        },
        64,
        64 * 2 // (8 * 2),
    ),
    # context parallelism: its ranks are data ranks to ZeRO
    deepseek(
        {"pp": 16, "dp": 32, "cp": 4, "cp_ring": 4, "ep": 32},
        {1: (4 * D_MOE, 4 * D_EXPERTS // 32)},
        128,
        4,
    ),
    deepseek(
        # 4 stages: 15, 16, 15, 15; 16,160 rows of the vocabulary are padded to 16,256, a multiple of 128
        {"tp": 8, "pp": 4, "dp": 8, "ep": 64},
        {
            0: (16256 * 7168 + 3 * (D_ATTENTION_8 + D_MLP // 8) + 12 * D_MOE_8, 12 * D_EXPERTS // 64),
            1: (16 * D_MOE_8, 16 * D_EXPERTS // 64),
        },
        8,
        1,
    ),
    deepseek(
        {"dp": 512, "ep": 64},
        {0: (2 * D_TABLE + 7168 + 3 * (D_ATTENTION + D_MLP) + 58 * D_MOE, 58 * D_EXPERTS // 64)},
        512,
        8,
    ),
    # two copies of the shards (HSDP): experts are sharded over as many times fewer ranks
    deepseek(
        {"pp": 16, "dp": 128, "ep": 16, "dp_shard": 64},
        {1: (4 * D_MOE, 4 * D_EXPERTS // 16)},
        64,
        4,
    ),
    # Qwen3: 94 layers in 8 stages: 11, then 12 six times, then 11; at tp 4 a key/value head each, and 38,016 rows of
    # the vocabulary: a quarter of it, padded to a multiple of 128
    qwen3(
        {"tp": 4, "pp": 8, "dp": 32, "ep": 32},
        {
            0: (38016 * 4096 + 11 * (Q_QUERY_OUT // 4 + Q_KEY_VALUE // 4 + Q_WHOLE), 11 * Q_EXPERTS // 32),
            3: (12 * (Q_QUERY_OUT // 4 + Q_KEY_VALUE // 4 + Q_WHOLE), 12 * Q_EXPERTS // 32),
            7: (38016 * 4096 + 4096 + 11 * (Q_QUERY_OUT // 4 + Q_KEY_VALUE // 4 + Q_WHOLE), 11 * Q_EXPERTS // 32),
        },
        32,
        32 * 4 // 32,
    ),
    # more ranks than key/value heads: each keeps one
    qwen3(
        {"tp": 8, "pp": 8, "dp": 16, "ep": 8, "etp": 8},
        {1: (12 * (Q_QUERY_OUT // 8 + Q_KEY_VALUE // 4 + Q_WHOLE), 12 * Q_EXPERTS // 64)},
        16,
        2,
    ),
    qwen3(
        {"tp": 4, "pp": 8, "dp": 32, "ep": 8, "etp": 4},
        {1: (12 * (Q_QUERY_OUT // 4 + Q_KEY_VALUE // 4 + Q_WHOLE), 12 * Q_EXPERTS // 32)},
        32,
        4,
    ),
    qwen3(
        {"tp": 2, "pp": 8, "dp": 64, "ep": 128},
        {1: (12 * (Q_QUERY_OUT // 2 + Q_KEY_VALUE // 2 + Q_WHOLE), 12 * Q_EXPERTS // 128)},
        64,
        1,
    ),
    qwen3(
        {"pp": 2, "dp": 64, "ep": 32},  # 47 layers each
        {
            0: (Q_TABLE + 47 * (Q_QUERY_OUT + Q_KEY_VALUE + Q_WHOLE), 47 * Q_EXPERTS // 32),
            1: (Q_TABLE + 4096 + 47 * (Q_QUERY_OUT + Q_KEY_VALUE + Q_WHOLE), 47 * Q_EXPERTS // 32),
        },
        64,
        2,
    ),
    qwen3(
        {"dp": 256},
        {0: (2 * Q_TABLE + 4096 + 94 * (Q_QUERY_OUT + Q_KEY_VALUE + Q_WHOLE), 94 * Q_EXPERTS)},
        256,
        256,
    ),
    qwen3(
        {"pp": 2, "dp": 64, "ep": 16, "dp_shard": 32},
        {0: (Q_TABLE + 47 * (Q_QUERY_OUT + Q_KEY_VALUE + Q_WHOLE), 47 * Q_EXPERTS // 16)},
        32,
        2,
    ),
    qwen3(
        {"tp": 2, "pp": 2, "dp": 16, "cp": 2, "cp_ring": 2, "ep": 64},
        {0: (76032 * 4096 + 47 * (Q_QUERY_OUT // 2 + Q_KEY_VALUE // 2 + Q_WHOLE), 47 * Q_EXPERTS // 64)},
        32,
        1,
    ),
    # Mixtral: 56 layers
    mixtral(
        {"tp": 2, "pp": 8, "dp": 8, "ep": 8},
        {
            0: (M_TABLE // 2 + 7 * (M_QUERY_OUT // 2 + M_KEY_VALUE // 2 + M_WHOLE), 7 * M_EXPERTS // 8),
            1: (7 * (M_QUERY_OUT // 2 + M_KEY_VALUE // 2 + M_WHOLE), 7 * M_EXPERTS // 8),
            7: (M_TABLE // 2 + 6144 + 7 * (M_QUERY_OUT // 2 + M_KEY_VALUE // 2 + M_WHOLE), 7 * M_EXPERTS // 8),
        },
        8,
        2,
    ),
    mixtral(
        {"tp": 2, "pp": 8, "dp": 8, "ep": 8, "etp": 2},
        {1: (7 * (M_QUERY_OUT // 2 + M_KEY_VALUE // 2 + M_WHOLE), 7 * M_EXPERTS // 16)},
        8,
        1,
    ),
    mixtral(
        {"tp": 8, "pp": 4, "dp": 8, "ep": 4, "etp": 8},
        {1: (14 * (M_QUERY_OUT // 8 + M_KEY_VALUE // 8 + M_WHOLE), 14 * M_EXPERTS // 32)},
        8,
        2,
    ),
    # more ranks than key/value heads; 32,000 rows over 16 ranks are 2,000, padded to 2,048
    mixtral(
        {"tp": 16, "pp": 2, "dp": 4, "ep": 8},
        {0: (2048 * 6144 + 28 * (M_QUERY_OUT // 16 + M_KEY_VALUE // 8 + M_WHOLE), 28 * M_EXPERTS // 8)},
        4,
        8,
    ),
    mixtral(
        {"dp": 64},
        {0: (2 * M_TABLE + 6144 + 56 * (M_QUERY_OUT + M_KEY_VALUE + M_WHOLE), 56 * M_EXPERTS)},
        64,
        64,
    ),
    mixtral(
        {"dp": 64, "ep": 8},
        {0: (2 * M_TABLE + 6144 + 56 * (M_QUERY_OUT + M_KEY_VALUE + M_WHOLE), 56 * M_EXPERTS // 8)},
        64,
        8,
    ),
    mixtral(
        {"dp": 64, "ep": 8, "dp_shard": 16},
        {0: (2 * M_TABLE + 6144 + 56 * (M_QUERY_OUT + M_KEY_VALUE + M_WHOLE), 56 * M_EXPERTS // 8)},
        16,
        2,
    ),
    # 8,000 rows are padded to 8,064
    mixtral(
        {"tp": 4, "pp": 4, "dp": 4, "cp": 2, "cp_ulysses": 2, "ep": 4},
        {3: (8064 * 6144 + 6144 + 14 * (M_QUERY_OUT // 4 + M_KEY_VALUE // 4 + M_WHOLE), 14 * M_EXPERTS // 4)},
        8,
        8,
    ),
]
CASE_IDS = [f"{case.model}-" + "-".join(f"{name}{degree}" for name, degree in case.layout.items()) for case in CASES]


def config_of(case: Case, zero_stage: int) -> ParallelConfig:
    layout = dict(case.layout)
    layout["dp_shard"] = case.dense if zero_stage else 1
    tp = layout.get("tp", 1)
    return ParallelConfig(**layout, zero_stage=zero_stage, sequence_parallel=tp > 1, vocab_parallel=tp > 1)


def held(model: str, config: ParallelConfig, rank: int, framework: str, recipe: str) -> StateBytes:
    spec, batch = load_model(model), ConfigBatch.from_configs([config])
    target = FRAMEWORKS[framework]
    workload = Workload(seq_len=4096, global_batch_size=config.dp * 64, recipe=RECIPES[recipe])
    kinds, numbers = block_kinds(spec), Numbers.zeros(1)
    for count, block in zip(stage_counts(kinds, config.pp, 1)[rank, 0], kinds.kinds, strict=True):
        numbers = numbers + block_numbers(block, target, batch) * float(count)
    return state_bytes(numbers, workload, target, batch)


def test_the_tables_make_up_the_models() -> None:
    assert 2 * D_TABLE + 7168 + 3 * (D_ATTENTION + D_MLP) + 58 * (D_MOE + D_EXPERTS) == 671_026_404_352
    assert 2 * Q_TABLE + 4096 + 94 * (Q_QUERY_OUT + Q_KEY_VALUE + Q_WHOLE + Q_EXPERTS) == 235_093_634_560
    assert 2 * M_TABLE + 6144 + 56 * (M_QUERY_OUT + M_KEY_VALUE + M_WHOLE + M_EXPERTS) == 140_620_634_112


@pytest.mark.parametrize("recipe", RECIPE_BYTES)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_what_megatron_holds(case: Case, recipe: str) -> None:
    weight, grad, states = RECIPE_BYTES[recipe]
    for rank, (dense, expert) in case.stages.items():
        whole, own = dense + expert, Fraction(dense, case.dense) + Fraction(expert, case.expert)
        expected = {
            0: (whole * weight, whole * grad, whole * states),
            1: (whole * weight, whole * grad, own * states),  # 6 + 12 / d bytes in bf16
            3: (own * weight, own * grad, own * states),  # Megatron-FSDP
        }
        for zero_stage, table in expected.items():
            found = held(case.model, config_of(case, zero_stage), rank, "megatron-bridge", recipe)
            figures = (found.params[0], found.grads[0], found.optimizer[0])
            assert figures == pytest.approx([float(entry) for entry in table], rel=1e-12), (rank, zero_stage)
            assert found.gathered[0] == 0


# what FSDP2 gives a rank of each tensor: rows over the ranks that share it, rounded up
def rows(count: int, ranks: int) -> int:
    return -(-count // ranks)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("recipe", ["bf16", "bf16-grads", "bf16-pure", "fp8", "fp32"])
def test_what_fsdp2_holds_of_deepseek_v3(recipe: str, zero_stage: int) -> None:
    # torchtitan, stage 1 of pp 16 with tp 2, ep 32 over 96 data ranks (dp 96): experts over 96 * 2 / 32 = 6 ranks that
    # share 8 experts, which are more than 6 (6 * 32 <= 256): cut by experts, 2 on the fullest rank
    attention = (
        rows(1536, 96) * 7168  # 16 rows
        + rows(1536, 96)
        + rows(512 + 64, 96) * 7168
        + rows(512, 96)
        + rows(128 * 192 // 2, 96) * 1536
        + rows(128 * 256 // 2, 96) * 512
        + rows(7168, 96) * 128 * 128 // 2  # 75 rows for 74.67
        + 2 * rows(7168, 96)
    )
    router, shared = rows(256, 96) * 7168, 2 * rows(2048 // 2, 96) * 7168 + rows(7168, 96) * 2048 // 2
    experts = rows(8, 6) * 3 * 7168 * 2048
    own = 4 * (attention + router + shared + experts)
    gathered = 4 * (96 * (attention + router + shared) + 6 * experts)
    whole = 4 * (D_MOE_2 + D_EXPERTS // 32)
    assert 1 < gathered / whole < 1.5  # 12 experts gathered for 8
    layout: dict[str, Any] = {"tp": 2, "pp": 16, "dp": 96, "ep": 32, "dp_shard": 96, "zero_stage": zero_stage}
    found = held("deepseek-v3", ParallelConfig(**layout, vocab_parallel=True), 1, "torchtitan", recipe)
    master, weight, grad, states = {
        "bf16": (4, 2, 4, 8),
        "bf16-grads": (4, 2, 2, 8),
        "bf16-pure": (2, 2, 2, 4),
        "fp8": (4, 2, 4, 8),
        "fp32": (4, 4, 4, 8),
    }[recipe]
    assert found.params[0] == own * master
    assert found.optimizer[0] == own * states
    assert found.grads[0] == (whole if zero_stage == 1 else own) * grad
    assert found.gathered[0] == (gathered * weight if zero_stage < 3 else 0)


def test_fsdp2_pads_few_experts_over_many_ranks() -> None:
    # Mixtral over 64 ranks without ep: a stack of 8 experts is cut along its first dimension, so that every rank keeps
    # (and all of them gather) a whole expert of each layer, eight times too much
    dense = (
        2 * (rows(32000, 64) * 6144)
        + rows(6144, 64)
        + 56 * (2 * rows(6144, 64) * 6144 + 2 * rows(1024, 64) * 6144 + 1 * 6144 + 2 * rows(6144, 64))
    )
    found = held("mixtral-8x22b", ParallelConfig(dp=64, dp_shard=64, zero_stage=3), 0, "torchtitan", "bf16")
    assert found.params[0] == 4 * (dense + 56 * 3 * 6144 * 16384)
    # with ep 8 one expert is left on each rank: torchtitan cuts it along its next dimension
    config = ParallelConfig(dp=64, ep=8, dp_shard=64, zero_stage=3)
    found = held("mixtral-8x22b", config, 0, "torchtitan", "bf16")
    assert found.params[0] == 4 * (dense + 56 * 3 * 6144 * 16384 // 8)


def test_a_published_count_of_deepseek_v3() -> None:
    # arXiv 2502.07846: 6,250,364,928 parameters a device (11.64 GiB in bf16) on stages 1 to 14 of pp 16 with tp 2,
    # ep 8, etp 1, dp 32. It keeps the shared expert and the queries' rotary rows whole, which Megatron-Core cuts by tp.
    published = 6_250_364_928
    rotary_rows = 128 * 64 * 1536
    config = ParallelConfig(tp=2, pp=16, dp=32, ep=8, sequence_parallel=True, vocab_parallel=True)
    found = held("deepseek-v3", config, 1, "megatron-bridge", "bf16")
    assert found.params[0] == 2 * (published - 4 * D_SHARED // 2 - 4 * rotary_rows // 2)


def test_figures_of_two_layouts() -> None:
    # DeepSeek-V3's own layout, a middle stage: four layers of 233.0 million dense parameters and 4 experts of 44.0
    published = held("deepseek-v3", config_of(CASES[0], 1), 1, "megatron-bridge", "bf16")
    dense, expert = 931_987_456, 704_643_072
    assert (dense, expert) == CASES[0].stages[1]
    assert published.params[0] == 3_273_261_056
    assert published.grads[0] == 6_546_522_112
    assert published.optimizer[0] == 87_373_824 + 4_227_858_432
    whole = held("mixtral-8x22b", ParallelConfig(), 0, "megatron-bridge", "bf16")
    assert (whole.params[0], whole.grads[0], whole.optimizer[0]) == tuple(140_620_634_112 * size for size in (2, 4, 12))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[8], CASES[16]], ids=lambda case: str(case.model))
def test_estimates_hold_the_same(case: Case) -> None:
    config = config_of(case, 1)
    workload = Workload(seq_len=4096, global_batch_size=config.dp * 64)
    batch, cluster = ConfigBatch.from_configs([config]), load_cluster("h100-sxm:2048")
    target = FRAMEWORKS["megatron-bridge"]
    found: BatchEstimate = estimate_batch(load_model(case.model), workload, cluster, target, batch)
    rank = int(found.stage[0])
    dense, expert = case.stages[rank]
    assert found.params_bytes[0] == 2 * (dense + expert)
    assert found.grads_bytes[0] == 4 * (dense + expert)
    assert found.optimizer_bytes[0] == round(12 * dense / case.dense + 12 * expert / case.expert)


def test_latent_biases_and_expert_gates(toy: Any) -> None:
    # biases belong to the projections down to a latent, which every tp rank holds whole
    spec = load_model("deepseek-v3")
    biased = replace(spec.attention, qkv_bias=True)
    batch = ConfigBatch.from_configs([ParallelConfig(tp=2, vocab_parallel=True, sequence_parallel=True)])
    target = FRAMEWORKS["megatron-bridge"]
    counts = [
        block_numbers(replace(spec.blocks[1], layers=(layer,)), target, batch).whole[0]
        for layer in (spec.attention, biased)
    ]
    assert np.diff(counts) == [1536 + 512 + 64]
    # Qwen2-57B-A14B: the gate on the shared expert is one row of 3584, the shared expert (20480) is cut by tp
    qwen2 = load_model("qwen2-57b-a14b")
    assert qwen2.moe is not None
    block = replace(qwen2.blocks[1], layers=(qwen2.moe,))
    expected = 64 * 3 * 3584 * 2560 + 64 * 3584 + 3 * 3584 * 20480 // 2 + 3584
    assert block_numbers(block, target, batch).whole[0] == expected
