"""Laws of expert parallelism in time, over configs and layers drawn at random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost_models import expert_exchange
from meshwright.cost_models.expert_traffic import expert_traffic
from meshwright.cost_models.routing import skew_of
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import Block, BlockKind, ModelSpec

FRAMEWORK = replace(
    MESHWRIGHT, expert_parallel=True, tensor_parallel_moe=True, context_parallel=True, expert_chunks=(1, 2, 4)
)
WORKLOAD = Workload(seq_len=64, global_batch_size=64)
LAYER = MoeLayer(hidden=64, num_experts=16, top_k=2, expert_ffn_size=128)
POWERS = (1, 2, 4, 8)


@st.composite
def configs(draw: st.DrawFn) -> ParallelConfig:
    """At most 32 ranks, folded in any way; experts are cut as attention is where the sequence is not."""
    tp, cp, dp = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((1, 2))), draw(st.sampled_from(POWERS))
    sequence_parallel = tp > 1 and draw(st.booleans())
    etp = draw(st.sampled_from((1, 2))) if sequence_parallel or tp == 1 else tp
    room = [ep for ep in POWERS if tp * cp * dp % (ep * etp) == 0] or [1]
    etp = etp if tp * cp * dp % etp == 0 else 1
    ep = draw(st.sampled_from(room))
    return ParallelConfig(
        tp=tp, cp=cp, cp_ring=cp, dp=dp, ep=ep, etp=etp, sequence_parallel=sequence_parallel, vocab_parallel=tp > 1,
        ep_chunks=draw(st.sampled_from((1, 2, 4))) if ep > 1 else 1,
        zero_stage=1 if dp * cp > 1 else 0, dp_shard=dp * cp,
    )  # fmt: skip


def moe(toy: Any) -> ModelSpec:
    model: ModelSpec = toy.model()
    blocks = [
        replace(block, layers=(*block.layers[:-1], LAYER)) if block.kind is BlockKind.DECODER else block
        for block in model.blocks
    ]
    return replace(model, blocks=tuple(blocks))


@given(config=configs())
@settings(max_examples=25, deadline=None)
def test_no_row_is_lost_and_none_is_worked_on_twice(config: ParallelConfig) -> None:
    """Rows of all ranks of a stage, each cut over etp, are all tokens times the experts that each takes."""
    rows = expert_exchange.rows_of(LAYER, WORKLOAD, ConfigBatch.from_configs([config]))
    ranks = config.tp * config.cp * config.dp
    everything = WORKLOAD.seq_len * config.micro_batch_size * config.dp * LAYER.top_k
    assert ranks * rows.here[0] / config.etp == everything
    distinct = ranks if config.sequence_parallel else ranks / config.tp
    assert distinct * rows.sent[0] == everything


@given(config=configs())
@settings(max_examples=25, deadline=None)
def test_what_goes_out_comes_back_whatever_the_chunks(config: ParallelConfig) -> None:
    block = Block(kind=BlockKind.DECODER, layers=(LAYER,))
    sums: dict[tuple[str, str, str], float] = {}
    for chunks in (1, config.ep_chunks):
        batch = ConfigBatch.from_configs([replace(config, ep_chunks=chunks)])
        found: dict[tuple[str, str, str], float] = {}
        for entry in expert_traffic(block, WORKLOAD, batch, replace(FRAMEWORK, experts=NO_SIZES)):
            key = (entry.axis, entry.op, entry.phase)
            found[key] = found.get(key, 0.0) + float(entry.calls[0] * entry.message_bytes[0])
        assert not sums or sums == found
        sums = found
    for axis, op, back in (
        ("ep", "all_to_all", "all_to_all"),
        ("etp", "all_gather", "reduce_scatter"),
        ("etp", "reduce_scatter", "all_gather"),
    ):
        assert sums[axis, op, "forward"] == sums[axis, back, "backward"]


NO_SIZES = replace(FRAMEWORK.experts, reads_counts=False)


@given(
    config=configs(),
    load=st.lists(st.floats(0.01, 10.0), min_size=16, max_size=16),
    share=st.floats(0.0, 1.0),
)
@settings(max_examples=25, deadline=None)
def test_more_skew_is_never_faster(config: ParallelConfig, load: list[float], share: float, toy: Any) -> None:
    """Between an even load and a measured one, step and exchange grow; on one rank nothing changes."""
    batch, model = ConfigBatch.from_configs([config]), moe(toy)
    cluster = toy.cluster(num_nodes=8, device=toy.device("gpu"))
    even = np.full(16, np.mean(load))
    steps = []
    for measured in (even, even + share * (np.array(load) - even), np.array(load)):
        workload = replace(WORKLOAD, routing=skew_of(measured))
        steps.append(float(estimate_batch(model, workload, cluster, FRAMEWORK, batch).step_s[0]))
    balanced = float(estimate_batch(model, WORKLOAD, cluster, FRAMEWORK, batch).step_s[0])
    assert steps[0] == balanced
    assert steps[0] <= steps[1] * (1 + 1e-12) and steps[1] <= steps[2] * (1 + 1e-12)
    if config.ep == 1:
        assert steps[2] == balanced


@given(config=configs().filter(lambda config: config.ep == 1))
@settings(max_examples=15, deadline=None)
def test_a_model_without_experts_knows_nothing_of_routing(config: ParallelConfig, toy: Any) -> None:
    config = replace(config, etp=1)
    batch = ConfigBatch.from_configs([config])
    cluster = toy.cluster(num_nodes=8, device=toy.device("gpu"))
    skewed = replace(WORKLOAD, routing=skew_of([1, 2, 3, 4]))
    one, other = (estimate_batch(toy.model(), workload, cluster, FRAMEWORK, batch) for workload in (WORKLOAD, skewed))
    assert one.step_s[0] == other.step_s[0] and one.ep_s[0] == 0.0


@given(x=st.floats(1e-6, 1.0), y=st.floats(0.0, 1.0), chunks=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_chunks_never_lengthen_nor_hide_more_than_there_is(x: float, y: float, chunks: int) -> None:
    whole, compute = np.array([x]), np.array([y])
    alone = expert_exchange.exposed(whole, compute, np.array([1.0]))[0]
    cut = expert_exchange.exposed(whole, compute, np.array([float(chunks)]))[0]
    assert np.isclose(alone, x)
    assert cut <= alone * (1 + 1e-9)
    assert cut >= max(x / chunks, x - y) * (1 - 1e-9)  # the first dispatch and the last combine are never hidden
