"""How Meta split Llama 3 405B over 16,384 H100 (arXiv 2407.21783, table 4) against every way its framework has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.estimate import BatchEstimate
from meshwright.cost_models.flops import model_flops
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, Schedule
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.planner.space import legal_space
from meshwright.profiler.cluster import load_preset
from meshwright.profiler.model_source import read_model

MODEL, TARGET, GPUS = read_model("llama3.1-405b"), framework_named("llama3-4d"), 16384
ORDER = Placement(order=("tp", "cp", "pp", "dp"))  # section 3.3.2: groups in the order TP, CP, PP, DP
STAGES = MODEL.num_layers + 2  # a layer a chunk, and one chunk for the embedding and one for the head


def score(workload: Workload, batch: ConfigBatch, counts: NDArray[np.float64] | None = None) -> BatchEstimate:
    cluster = load_preset(f"h100-roce-pods:{GPUS // 8}")
    return estimate_batch(MODEL, workload, cluster, TARGET, batch, ORDER, counts, tells_waits=False)


def one_layer_a_chunk(pp: int) -> NDArray[np.float64]:
    """The first chunk has the embedding alone and the last one the head, as the paper balances its stages."""
    counts = np.zeros((pp, STAGES // pp, len(block_kinds(MODEL))))
    for stage in range(1, STAGES - 1):
        counts[stage % pp, stage // pp, 1] = 1
    counts[0, 0, 0] = counts[-1, -1, -1] = 1
    return counts


# tokens of a sequence: sequences of a batch, cp and dp of the paper's choice (tp 8 and pp 16 both times), what is fixed
# Left to choose are tp, pp, dp, micro batch and chunks, and cp at 131,072 tokens: the paper brings cp in for long
# contexts alone. (With cp free at 8,192 tokens tp 4 with cp 4 is ahead by 5.6 %, and the paper's choice rank 20 of
# 27,527.) There is no recompute; gradients are sharded, so ZeRO is 2.
CHOICES = {
    8192: (2048, 1, 128, {"cp": 1}),
    131072: (128, 16, 8, {}),
}


@pytest.mark.parametrize("seq_len", CHOICES)
def test_the_papers_choice_is_within_3_percent_of_our_best(seq_len: int, capsys: pytest.CaptureFixture[str]) -> None:
    sequences, cp, dp, fixed = CHOICES[seq_len]
    workload = Workload(seq_len=seq_len, global_batch_size=sequences, recipe=RECIPES["bf16"])
    constraints = {"sequence_parallel": True, "zero_stage": 2, "recompute": "none", **fixed}
    legal = legal_space(MODEL, workload, GPUS, TARGET, constraints).batch
    batches, found = [legal], [score(workload, legal)]
    # twice the chunks of two layers each: more chunks than layers, which the space does not have
    pairs = legal.take((legal.num_stages == STAGES // 2) & legal.is_schedule(Schedule.INTERLEAVED))
    for pp in np.unique(pairs.pp):
        chunks = pairs.take(pairs.pp == pp)
        batches.append(replace(chunks, vpp=2 * chunks.vpp))
        found.append(score(workload, batches[-1], one_layer_a_chunk(int(pp))))
    batch = ConfigBatch.concatenate(batches)
    fits = np.concatenate([each.fits for each in found])
    step_s = np.where(fits, np.concatenate([each.step_s for each in found]), np.inf)

    chosen = (batch.tp == 8) & (batch.cp == cp) & (batch.pp == 16) & (batch.dp == dp)
    papers_s, rank = float(step_s[chosen].min()), int((step_s < step_s[chosen].min()).sum()) + 1
    degrees = np.unique(np.stack([batch.tp, batch.cp, batch.pp, batch.dp])[:, fits], axis=1).shape[1]
    best = batch.config(int(step_s.argmin())).describe()
    with capsys.disabled():
        print(
            f"\nLlama 3 405B at {seq_len}: the paper's split takes {papers_s:.2f} s, rank {rank} of {fits.sum()} that "
            f"fit ({degrees} sets of degrees; {len(batch)} legal); best {step_s.min():.2f} s, {best}"
        )
    assert papers_s <= 1.03 * step_s.min()


# GPUs, tokens of a sequence, cp, dp -> TFLOP/s a GPU, table 4; attention counted whole
@pytest.mark.parametrize(
    ("gpus", "seq_len", "cp", "dp", "published", "within"),
    [(8192, 8192, 1, 64, 430, 0.04), (16384, 8192, 1, 128, 400, 0.04), (16384, 131072, 16, 8, 380, 0.11)],
)
def test_throughput(gpus: int, seq_len: int, cp: int, dp: int, published: float, within: float) -> None:
    sequences = 2**24 // seq_len  # 16M tokens
    workload = Workload(seq_len=seq_len, global_batch_size=sequences, recipe=RECIPES["bf16"])
    columns = {
        "tp": 8, "cp": cp, "cp_ring": cp, "pp": 16, "vpp": 8, "dp": dp, "dp_shard": dp * cp, "zero_stage": 2,
        "sequence_parallel": True, "vocab_parallel": True, "schedule": list(Schedule).index(Schedule.INTERLEAVED),
    }  # fmt: skip
    found = score(workload, ConfigBatch.from_columns(columns, 1), one_layer_a_chunk(16))
    ours = model_flops(MODEL, workload) / float(found.step_s[0]) / gpus / 1e12
    assert ours == pytest.approx(published, rel=within)
