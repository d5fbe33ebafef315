"""What attention under context parallelism and a layer of experts leave and need, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshwright.cost_models.eager import block_lifetimes
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute
from meshwright.cost_models.tape import Lifetimes
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MoeLayer, NormKind, NormLayer
from meshwright.profiler.model import Block, BlockKind

SEQUENCE, HIDDEN = 1024, 64
NORM = NormLayer(norm_kind=NormKind.RMS, hidden=HIDDEN)
NORMED = HIDDEN * (4 + 2)  # bytes a token that a norm keeps: its input in float32, what it multiplies with its weight
GROUPED = AttentionLayer(
    attention_kind=AttentionKind.GQA, hidden=HIDDEN, num_heads=8, num_kv_heads=2, head_dim=16, value_head_dim=16
)
LATENT = AttentionLayer(
    attention_kind=AttentionKind.MLA, hidden=HIDDEN, num_heads=8, num_kv_heads=8, head_dim=16, value_head_dim=16,
    q_lora_rank=32, kv_lora_rank=24, rope_head_dim=8, extra_params=32 + 24,
)  # fmt: skip
EXPERTS = MoeLayer(hidden=HIDDEN, num_experts=16, top_k=4, expert_ffn_size=48)


def lifetimes(layer: Any, **axes: Any) -> Lifetimes:
    axes["cp"] = axes.get("cp_ring", 1) * axes.get("cp_ulysses", 1)
    workload = Workload(seq_len=SEQUENCE, global_batch_size=8, recipe=RECIPES["bf16"])
    block = Block(kind=BlockKind.DECODER, layers=(NORM, layer))
    return block_lifetimes(block, workload, ConfigBatch.from_configs([ParallelConfig(**axes)]))


def saved(layer: Any, **axes: Any) -> float:
    return float(lifetimes(layer, **axes).saved[0])


def test_a_ring_keeps_its_own_queries_keys_and_values() -> None:
    # normed input; queries, keys, values, output; log-sum-exp of 8 heads
    token = NORMED + HIDDEN * 2 + (128 + 32 + 32 + 128) * 2 + 8 * 4
    assert saved(GROUPED) == SEQUENCE * token
    assert saved(GROUPED, cp_ring=4) == SEQUENCE / 4 * token


def test_ulysses_keeps_what_it_exchanged_and_repeats_heads() -> None:
    # over 4 ranks two heads of keys and values are made four; a rank has two of queries and one of each of these, for
    # the whole sequence, and the exchanged output besides
    token = NORMED + HIDDEN * 2 + (128 + 64 + 64 + 128) * 2 + 8 * 4 + 128 * 2
    assert saved(GROUPED, cp_ulysses=4) == SEQUENCE / 4 * token
    assert saved(GROUPED, cp_ulysses=2) == SEQUENCE / 2 * (token - 64 * 2)


def test_the_backward_of_a_ring_at_its_fullest() -> None:
    # the first step: float32 gradients of queries, keys and values; the block that leaves and the one that comes; what
    # the kernel gives, and takes: the gradient of queries in float32, of heads padded to 32, a number a row, and
    # gradients of keys and values for all heads
    tokens, queries, message = SEQUENCE / 2, 128, 64
    most = 4 * (queries + message) + 2 * 2 * message + 2 * (queries + message)
    most += (8 * 32 + 8) * 4 + 2 * 128 * 2
    both = lifetimes(GROUPED, cp_ring=2)
    around = NORMED + 128 * 2  # what is left of the norm, and the gradient of the output
    kept = HIDDEN * 2 + (128 + 32 + 32 + 128) * 2 + 8 * 4
    assert float(both.backward.total[0] - both.backward.weights[0]) == pytest.approx(
        tokens * (most + around + kept + HIDDEN * 2), rel=1e-9
    )


def test_latent_attention_keeps_latents_twice_and_the_whole_expansion() -> None:
    latents = (32 + 24) * (4 + 2 + 2)  # each norm's input in float32, what it multiplies, what comes out
    heads = 8 * (24 + 24 + (16 + 16) + 16) * 2  # queries, keys, the product of which values are a view, the output
    assert saved(LATENT) == SEQUENCE * (NORMED + HIDDEN * 2 + latents + heads + 8 * 4)


def test_experts_keep_rows_that_came_and_rows_that_came_back() -> None:
    # router: normed input (also its own), softmax in float32; a row in, gate and up, activated, product, a row back
    row = HIDDEN * 2 + 48 * (2 + 1 + 1) * 2 + HIDDEN * 2
    token = NORMED + HIDDEN * 2 + 16 * 4
    assert saved(EXPERTS) == saved(EXPERTS, dp=4, ep=4) == SEQUENCE * (token + 4 * row)
    # etp: rows of both ranks, each half the width; what came back is one's own
    gathered = 2 * HIDDEN * 2 + 48 * (2 + 1 + 1) * 2 + HIDDEN * 2
    assert saved(EXPERTS, dp=8, ep=4, etp=2) == SEQUENCE * (token + 4 * gathered)
    # with sequence parallelism of its own tokens alone
    own = saved(EXPERTS, tp=2, dp=2, ep=4, sequence_parallel=True)
    assert own == SEQUENCE / 2 * (token + 4 * row)


def test_selective_recompute_keeps_what_collectives_and_products_put_out() -> None:
    axes = {"dp": 8, "ep": 4, "etp": 2, "recompute": Recompute.SELECTIVE}
    # the block's input, logits; dispatched, gathered (of two), gate and up (half, of two), reduced, back; not the
    # partial sums, which leave
    rows = HIDDEN * (1 + 2 + 1 + 1) + 2 * 48
    assert saved(EXPERTS, **axes) == SEQUENCE * (HIDDEN * 2 + 16 * 2 + 4 * rows * 2)


@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_leave_the_same_and_need_less(chunks: int) -> None:
    whole, cut = (lifetimes(EXPERTS, dp=4, ep=4, ep_chunks=number) for number in (1, chunks))
    assert cut.saved == whole.saved
    assert np.all(cut.forward <= whole.forward)
    assert np.all(cut.backward.total < whole.backward.total)


def test_full_recompute_leaves_the_input() -> None:
    for layer in (GROUPED, LATENT, EXPERTS):
        assert saved(layer, recompute=Recompute.FULL) == SEQUENCE * HIDDEN * 2
