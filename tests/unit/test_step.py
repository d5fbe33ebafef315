"""The composition: hand-computed steps, and what they are made of."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from meshwright import InputError
from meshwright.cost_models.estimate import SECONDS, CostBreakdown
from meshwright.cost_models.exchanges import hops
from meshwright.cost_models.framework import PointwiseCost
from meshwright.cost_models.parts import BlockParts
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.player import play
from meshwright.cost_models.stage_seconds import edges
from meshwright.cost_models.stages import Stages
from meshwright.cost_models.step import assumptions, estimate, estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute, Schedule
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import RECIPES, Optimizer, Workload

WORKLOAD = Workload(seq_len=32, global_batch_size=8)
RATE = 0.5e12
SCORES = 2 * 8 * (32 * 33 / 2) * 16  # forward FLOPs of one block's attention scores
BLOCK = 2 * 32 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)  # of its projections, one sequence
HEAD = 2 * 32 * 64 * 256


def cost(toy: Any, config: ParallelConfig, *, cluster: Any = None, framework: Any = None, model: Any = None) -> Any:
    """With memory so fast that only matmuls, attention and communication take time."""
    device = toy.device(memory_bytes_per_s=1e18)
    cluster = cluster or toy.cluster(device=device)
    batch = ConfigBatch.from_configs([config])
    found = estimate_batch(model or toy.model(), WORKLOAD, cluster, framework or toy.framework(), batch)
    return found.estimate(0, batch).cost


def test_one_device_computes_and_nothing_else(toy: Any) -> None:
    got = cost(toy, ParallelConfig())
    expected = 8 * (4 * (3 * BLOCK + 3.5 * SCORES) + 3 * HEAD) / RATE
    assert got.compute_s == pytest.approx(expected)
    assert got.step_s == pytest.approx(expected, rel=1e-6)
    assert [got.tp_s, got.pp_s, got.dp_s, got.bubble_s, got.recompute_s, got.hidden_s] == [0.0] * 6


def test_full_recompute_is_the_forward_without_the_last_projection(toy: Any) -> None:
    got = cost(toy, ParallelConfig(recompute=Recompute.FULL))
    assert got.recompute_s == pytest.approx(8 * 4 * (BLOCK + SCORES - 2 * 32 * 64 * 128) / RATE)


def test_tensor_parallel_sums(toy: Any) -> None:
    # a micro-batch: 18 sums of 32 * 64 bf16 numbers over 2 ranks, and the loss's of 32 and 64 float32 numbers
    got = cost(toy, ParallelConfig(tp=2, vocab_parallel=True))
    message, maxima, sums = 32 * 64 * 2, 32 * 4, 64 * 4
    assert got.tp_s == pytest.approx(
        8 * sum(times * (2e-6 + n / 1e10) for times, n in ((18, message), (1, maxima), (1, sums)))
    )
    assert got.compute_s == pytest.approx(8 * (4 * (3 * BLOCK + 3.5 * SCORES) + 3 * HEAD) / 2 / RATE)


def test_sums_wait_for_the_last_of_their_ranks(toy: Any) -> None:
    target = toy.framework()
    late = replace(target, host=replace(target.host, skew_s=1e-3))
    config = ParallelConfig(tp=2, vocab_parallel=True)
    more = cost(toy, config, framework=late).tp_s - cost(toy, config, framework=target).tp_s
    assert more == pytest.approx(8 * 20 * 1e-3)  # 18 sums in blocks, embedding and head, 2 in the loss


@pytest.mark.parametrize(("splits", "sp"), [(False, False), (True, False), (True, True)])
def test_peers_send_a_share_each_between_stages_and_gather_it(toy: Any, splits: bool, sp: bool) -> None:
    config = ParallelConfig(tp=2, pp=2, vocab_parallel=True, sequence_parallel=sp)
    stages = Stages(
        batch=ConfigBatch.from_configs([config]),
        counts=np.ones((2, 1, 3)),
        schedule=config.schedule,
        model=toy.model(),
        workload=WORKLOAD,
        cluster=toy.cluster(),
        placement=Placement(),
        framework=replace(toy.framework(), splits_hops=splits),
    )
    message = 32 * 64 * 2
    share = 1e-6 + message / 2 / 1e10  # one latency, and half of the message
    expected = 2 * share if splits and not sp else share if sp else 1e-6 + message / 1e10
    assert hops(stages) == pytest.approx(np.array([[expected]]))


def test_a_pipeline_of_equal_stages_has_the_textbook_bubble(toy: Any) -> None:
    # no head to speak of: 4 stages of one block; 8 micro-batches; links that cost nothing
    cluster = toy.cluster(device=toy.device(memory_bytes_per_s=1e18), node=(0.0, 1e30), network=(0.0, 1e30))
    got = cost(toy, ParallelConfig(pp=4), cluster=cluster, model=toy.model(vocab_size=1))
    stage = (3 * BLOCK + 3.5 * SCORES) / RATE
    assert got.step_s == pytest.approx(11 * stage, rel=1e-2)
    assert got.bubble_s == pytest.approx(3 * stage, rel=1e-2)
    assert got.pp_s == pytest.approx(0.0, abs=1e-12)


def test_transfers_of_a_pipeline_are_told_from_its_bubble(toy: Any) -> None:
    model = toy.model(vocab_size=1)
    device = toy.device(memory_bytes_per_s=1e18)
    free = toy.cluster(device=device, node=(0.0, 1e30), network=(0.0, 1e30))
    slow = toy.cluster(device=device, node=(1e-4, 1e30), network=(1e-4, 1e30))
    without, with_transfers = (
        cost(toy, ParallelConfig(pp=4), cluster=cluster, model=model) for cluster in (free, slow)
    )
    assert with_transfers.bubble_s == pytest.approx(without.bubble_s)
    assert with_transfers.pp_s == pytest.approx(with_transfers.step_s - without.step_s - (with_transfers.overhead_s))


def test_replicas_without_master_weights_sum_their_gradients_after_the_last_backward(toy: Any) -> None:
    cluster = toy.cluster(device=toy.device("gpu", memory_bytes_per_s=1e18))
    batch = ConfigBatch.from_configs([ParallelConfig(dp=4)])
    workload = replace(WORKLOAD, recipe=RECIPES["fp32"])
    got = estimate_batch(toy.model(), workload, cluster, toy.framework(), batch)
    units = [numbers * 4 for numbers in (36992, 36992, 36992, 36992, 2 * 256 * 64 + 64)]
    assert got.dp_s == pytest.approx([sum(min(6e-6 + 1.5 * n / 1e10, 4e-6 + 2 * n / 1e10) for n in units)])
    assert got.hidden_s == [0.0]
    mixed = estimate_batch(toy.model(), WORKLOAD, cluster, toy.framework(), batch)
    assert mixed.hidden_s + mixed.dp_s == pytest.approx(got.dp_s)  # FSDP2 reduces them as the backward goes
    assert mixed.hidden_s > 0


def test_a_gpu_hides_reductions_behind_compute_and_a_cpu_does_not(toy: Any) -> None:
    # FSDP on 4 devices: 5 gathers and 5 reductions; compute is much longer than one of them
    config = ParallelConfig(dp=4, zero_stage=1, dp_shard=4)
    slow = {"memory_bytes_per_s": 1e18, "efficiencies": toy.device(half_k=1e4).efficiencies}
    on_cpu = cost(toy, config, cluster=toy.cluster(device=toy.device(**slow)))
    on_gpu = cost(toy, config, cluster=toy.cluster(device=toy.device("gpu", **slow)))
    numbers = [36992] * 4 + [2 * 256 * 64 + 64]
    spent = sum(3e-6 + 0.75 * n * width / 1e10 for n in numbers for width in (2, 4))
    assert on_cpu.dp_s == pytest.approx(spent)
    assert on_cpu.hidden_s == 0.0
    assert on_gpu.dp_s == pytest.approx(0.0, abs=1e-11)  # but for local copies, over memory that costs next to nothing
    assert on_gpu.hidden_s == pytest.approx(spent)


@pytest.mark.parametrize(
    ("each_s", "exposed_s"),
    [
        (1.5, 0.5),  # the second chunk's hides behind the first one's round, the first one's behind its last backward
        (5.0, 7.0),  # 10 s of reductions in the 3 s from the second chunk's last backward on
    ],
)
def test_reductions_of_a_chunk_hide_behind_the_chunks_after_it(toy: Any, each_s: float, exposed_s: float) -> None:
    config = ParallelConfig(pp=2, vpp=2, dp=2, schedule=Schedule.INTERLEAVED)  # 4 micro-batches in rounds of 2
    stages = Stages(
        batch=ConfigBatch.from_configs([config]),
        counts=np.ones((2, 2, 1)),
        schedule=config.schedule,
        model=toy.model(),
        workload=WORKLOAD,
        cluster=toy.cluster(device=toy.device("gpu")),
        placement=Placement(),
        framework=toy.framework(),
    )
    seconds = {"compute_backward": 1.0, "dp_last": each_s}
    part = BlockParts(**{field.name: np.array([seconds.get(field.name, 0.0)]) for field in fields(BlockParts)})
    _, _, exposed, hidden, _ = edges(stages, [part])
    assert exposed[0] == pytest.approx([exposed_s] * 2)
    assert hidden[0] == pytest.approx([2 * each_s - exposed_s] * 2)


def test_compute_is_slower_beside_a_collective(toy: Any) -> None:
    config = ParallelConfig(dp=4, zero_stage=1, dp_shard=4)
    device = toy.device(
        "gpu", memory_bytes_per_s=1e18, communication_slowdown=0.25, efficiencies=toy.device(half_k=1e4).efficiencies
    )
    got = cost(toy, config, cluster=toy.cluster(device=device))
    sizes = [numbers * width for numbers in (*[36992] * 4, 2 * 256 * 64 + 64) for width in (2, 4)]
    busy = sum(min(size / 1e10, 3e-6 + 0.75 * size / 1e10) for size in sizes)  # while bytes move, not while it waits
    assert got.dp_s == pytest.approx(0.25 * busy)
    assert got.hidden_s == pytest.approx(sum(3e-6 + 0.75 * size / 1e10 for size in sizes))


def test_a_slow_network_slows_compute_by_its_bytes_alone(toy: Any) -> None:
    config = ParallelConfig(dp=8, zero_stage=1, dp_shard=8)
    device = toy.device(
        "gpu", memory_bytes_per_s=1e18, communication_slowdown=0.25, efficiencies=toy.device(half_k=1e6).efficiencies
    )
    near, far = (cost(toy, config, cluster=toy.cluster(device=device, network=(1e-6, rate))) for rate in (1e10, 1e9))
    assert far.hidden_s > 1.5 * near.hidden_s
    assert far.dp_s == pytest.approx(near.dp_s, rel=0.2)


@pytest.mark.parametrize(("optimizer", "passes"), [(Optimizer.ADAMW, 25), (Optimizer.SGD, 3)])
def test_the_optimizer_passes_over_this_ranks_own_parameters(toy: Any, optimizer: Optimizer, passes: int) -> None:
    workload = replace(WORKLOAD, optimizer=optimizer)
    config = ParallelConfig(dp=4, zero_stage=1, dp_shard=4)
    got = estimate(toy.model(), workload, toy.cluster(), config).cost
    num_bytes = toy.model().params / 4 * (passes * 4 + 4 + 2)  # and the bf16 weights out of the float32 master
    assert got.optimizer_s == pytest.approx(num_bytes / 1e11)


def test_gradients_of_later_micro_batches_are_added(toy: Any) -> None:
    add = PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=1, backward_passes=3)
    free, spent = (
        estimate_batch(
            toy.model(), WORKLOAD, toy.cluster(), framework, ConfigBatch.from_configs([ParallelConfig()])
        ).compute_s
        for framework in (toy.framework(), toy.framework(accumulate=add))
    )
    assert spent - free == pytest.approx([7 * 3 * 4 * toy.model().params / 1e11])


def test_the_sum_of_the_parts_is_the_step(toy: Any) -> None:
    batch = ConfigBatch.from_configs([ParallelConfig(tp=2, pp=2, dp=2, vocab_parallel=True, zero_stage=2, dp_shard=2)])
    many = estimate_batch(toy.model(), WORKLOAD, toy.cluster(), MESHWRIGHT, batch)
    one = many.estimate(0, batch)
    assert one.cost.step_s == many.step_s[0]
    assert one.memory.peak_bytes == many.peak_bytes[0]
    assert tuple(field.name for field in fields(CostBreakdown)) == SECONDS
    assert one.config == batch.config(0)


def test_what_fits_is_capacity_less_reserved(toy: Any) -> None:
    batch = ConfigBatch.from_configs([ParallelConfig()])
    peak = int(estimate_batch(toy.model(), WORKLOAD, toy.cluster(), MESHWRIGHT, batch).peak_bytes[0])
    for spare, fits in ((0, True), (-1, False)):
        device = toy.device(memory_bytes=peak + 2**30 + spare)
        found = estimate_batch(toy.model(), WORKLOAD, toy.cluster(device=device), MESHWRIGHT, batch)
        assert found.fits.tolist() == [fits]
        assert found.estimate(0, batch).memory.headroom_bytes == spare


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ParallelConfig(tp=16, vocab_parallel=True), "HEADS"),
        (ParallelConfig(dp=8, zero_stage=1, dp_shard=4), "does not run"),
        (ParallelConfig(dp=16), "BATCH"),
        (ParallelConfig(tp=4, dp=4, vocab_parallel=True), "needs 16 devices, toy has 8"),
    ],
)
def test_what_cannot_run_is_not_priced(toy: Any, config: ParallelConfig, said: str) -> None:
    with pytest.raises(InputError, match=said):
        estimate(toy.model(), WORKLOAD, toy.cluster(), config)


def test_a_head_split_over_stages_adds_exchanges_and_a_micro_batch_of_fill(toy: Any) -> None:
    batch = ConfigBatch.from_configs([ParallelConfig(pp=2)])
    halves = np.array([[[0.5, 2.0, 0.5]], [[0.5, 2.0, 0.5]]])  # of embedding and head, and two of four blocks
    both = (2 * (3 * BLOCK + 3.5 * SCORES) + 1.5 * HEAD) / RATE
    device = toy.device(memory_bytes_per_s=1e18)
    for hop in (0.0, 1e-6):
        cluster = toy.cluster(device=device, node=(hop, 1e18), network=(hop, 1e18))
        found = estimate_batch(toy.model(), WORKLOAD, cluster, toy.framework(), batch, counts=halves)
        got = found.estimate(0, batch).cost
        exchanges = (2 * 2.5 + 2 * 2) * hop  # of two ranks: broadcasts over one slower hop, all_reduces over two
        waits = 10 * hop  # a micro-batch there and back, and of every second one around
        assert got.compute_s == pytest.approx(8 * both, rel=0.01)
        assert got.step_s == pytest.approx((8 + 2 - 1 + 1) * (both + exchanges) + waits, rel=0.01)


def test_backward_exchanges_hide_behind_gradients_of_weights(toy: Any) -> None:
    cluster = toy.cluster(device=toy.device("gpu", memory_bytes_per_s=1e18))
    config = ParallelConfig(tp=2, vocab_parallel=True)
    exposed, half = (
        cost(toy, config, cluster=cluster, framework=toy.framework(overlap_tp_backward=share)) for share in (0.0, 0.5)
    )
    hidden = exposed.tp_s - half.tp_s
    # of 8 micro-batches: 4 blocks' two sums and the head's one backward, as many forward and the embedding's, and the
    # loss's two small ones
    assert 0.22 * exposed.tp_s < hidden < 0.25 * exposed.tp_s
    assert half.hidden_s == pytest.approx(hidden)


def test_transfers_that_block_hold_both_ranks(toy: Any) -> None:
    hop = 5e-6  # of a pass of some 25
    cluster = toy.cluster(device=toy.device(memory_bytes_per_s=1e18), node=(hop, 1e18), network=(hop, 1e18))
    framework = toy.framework(blocking_hops=(Schedule.ONE_F_ONE_B,))
    got = cost(toy, ParallelConfig(pp=2), cluster=cluster, framework=framework)
    stages, head = np.full(2, 2.0), np.array([0.0, HEAD])
    forward, by_input = ((stages * (BLOCK + share * SCORES) + head) / RATE for share in (1.0, 2.5))
    by_weight = (stages * BLOCK + head) / RATE
    work = (forward[None], by_input[None], by_weight[None])
    played = play(Schedule.ONE_F_ONE_B, 2, 8, *work, np.full((1, 1), hop), blocking_sends=True)
    assert got.step_s == pytest.approx(float(played.makespan[0]), rel=0.03)
    assert got.pp_s == pytest.approx(8 * hop)  # of each exchange half with the forward, half with the backward


@pytest.mark.parametrize(("schedule", "vpp"), [(Schedule.ZB_H1, 1), (Schedule.ZBV, 2), (Schedule.DUALPIPEV, 2)])
def test_gradients_of_weights_fill_bubbles(toy: Any, schedule: Schedule, vpp: int) -> None:
    free = toy.cluster(device=toy.device(memory_bytes_per_s=1e18), node=(0.0, 1e18), network=(0.0, 1e18))
    got = cost(toy, ParallelConfig(pp=2, vpp=vpp, schedule=schedule), cluster=free)
    stages = np.full(2 * vpp, 4 / (2 * vpp))  # layers of each stage in order; the last of all has the head too
    head = np.eye(2 * vpp)[-1] * HEAD
    forward, by_input = ((stages * (BLOCK + share * SCORES) + head) / RATE for share in (1.0, 2.5))
    by_weight = (stages * BLOCK + head) / RATE
    played = play(schedule, 2, 8, forward[None], by_input[None], by_weight[None], np.zeros((1, 2 * vpp - 1)))
    assert got.step_s == pytest.approx(float(played.makespan[0]), rel=0.01)
    assert got.compute_s + got.bubble_s == pytest.approx(got.step_s)


def test_assumptions_say_what_was_not_measured(toy: Any) -> None:
    said = assumptions(toy.model(window=16), WORKLOAD, toy.cluster(), MESHWRIGHT)
    assert said[0] == "rates of attention_backward, attention_forward, grouped_matmul, matmul on cpu are not measured"
    assert "latency and bandwidth of links (node, cluster) are not measured" in said
    assert any("sliding window" in words for words in said)


@pytest.mark.parametrize("name", ["meshwright", "megatron-lm", "nanotron", "torchtitan"])
def test_no_config_at_all_is_an_answer_of_nothing(toy: Any, name: str) -> None:
    batch = ConfigBatch.from_configs([ParallelConfig()]).take(np.array([], dtype=np.int64))
    found = estimate_batch(toy.model(), WORKLOAD, toy.cluster(), framework_named(name), batch)
    assert len(found.step_s) == len(found.peak_bytes) == 0
