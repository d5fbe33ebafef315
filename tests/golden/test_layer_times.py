"""Seconds of one layer of GPT-22B on 8 A100, as Korthikanti et al. measured them (arXiv 2205.05198, table 4).

Tensor parallelism over 8 ranks, 4 sequences of 2,048 tokens, half precision; milliseconds forward and backward.
"""

from __future__ import annotations

import pytest

from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.parts import block_parts
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.published_fit import uncalibrated_cluster
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute
from meshwright.cost_models.target_megatron import MEGATRON_LM_2022
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    HeadLayer,
    MlpLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.model import Block, BlockKind, ModelSpec

NORM = NormLayer(norm_kind=NormKind.LAYER, hidden=6144)
ATTENTION = AttentionLayer(
    attention_kind=AttentionKind.MHA, hidden=6144, num_heads=64, num_kv_heads=64, head_dim=96, value_head_dim=96,
    qkv_bias=True, out_bias=True, rotary=False,
)  # fmt: skip
MLP = MlpLayer(hidden=6144, ffn_size=4 * 6144, gated=False, bias=True, activation="gelu")
GPT_22B = ModelSpec(
    name="gpt-22b",
    architecture="gpt",
    max_seq_len=2048,
    blocks=(
        Block(
            kind=BlockKind.EMBEDDING, layers=(EmbeddingLayer(vocab_size=51200, hidden=6144, num_positions=2048),)
        ),
        Block(kind=BlockKind.DECODER, layers=(NORM, ATTENTION, NORM, MLP), repeat=48),
        Block(kind=BlockKind.HEAD, layers=(NORM, HeadLayer(hidden=6144, vocab_size=51200, tied=True))),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "forward_ms", "backward_ms"),
    [
        (False, Recompute.NONE, 7.7, 11.9),
        (True, Recompute.NONE, 7.2, 11.8),
        (False, Recompute.FULL, 7.7, 19.5),
        (False, Recompute.SELECTIVE, 7.7, 13.2),
        (True, Recompute.SELECTIVE, 7.2, 13.1),
    ],
)
def test_a_layer_takes_what_it_took(
    sequence_parallel: bool, recompute: Recompute, forward_ms: float, backward_ms: float
) -> None:
    config = ParallelConfig(
        tp=8, micro_batch_size=4, vocab_parallel=True, sequence_parallel=sequence_parallel, recompute=recompute
    )
    workload = Workload(seq_len=2048, global_batch_size=4, recipe=RECIPES["fp16"])
    batch = ConfigBatch.from_configs([config])
    kinds = block_kinds(GPT_22B)
    # a layer alone runs in short bursts, as kernels of the tables do: without the factors of whole steps
    layer = block_parts(
        kinds, GPT_22B, workload, uncalibrated_cluster("a100-sxm:1"), MEGATRON_LM_2022, batch, Placement()
    )[1]  # fmt: skip
    forward = layer.compute_forward + layer.host_forward + layer.tp_forward
    backward = layer.compute_backward + layer.recompute + layer.host_backward + layer.tp_backward
    assert forward[0] * 1e3 == pytest.approx(forward_ms, rel=0.1)
    assert backward[0] * 1e3 == pytest.approx(backward_ms, rel=0.1)
