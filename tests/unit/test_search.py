from __future__ import annotations

import io
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from meshwright import InfeasibleError, InputError
from meshwright.cost_models.estimate import CostBreakdown, Estimate, MemoryBreakdown, Moment
from meshwright.cost_models.flops import model_flops
from meshwright.cost_models.margin import MemoryMargin
from meshwright.cost_models.step import estimate
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Reason, Recompute, Schedule
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.targets import FRAMEWORKS
from meshwright.cost_models.workload import Workload
from meshwright.planner import exhaustive
from meshwright.planner import search as search_module
from meshwright.planner.exhaustive import rank
from meshwright.planner.given import complete_config
from meshwright.planner.nothing_fits import nothing_recommended
from meshwright.planner.plan import Plan
from meshwright.planner.search import make_plan, plan_for, search, whole_nodes
from meshwright.planner.space import legal_space
from meshwright.planner.summary import summarize
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import load_model
from meshwright.terminal.plan_view import show_plan

LLAMA = load_model("llama3-8b")
MIXTRAL = load_model("mixtral-8x7b")
CLUSTER = load_cluster("h100-sxm:2")
WORKLOAD = Workload(seq_len=4096, global_batch_size=64)


@dataclass(frozen=True)
class FakeScores:
    """Step and peak of config ``i`` are given; the tp of a config names it."""

    step_s: Any
    peak_bytes: Any
    fragmentation_bytes: Any
    capacity_bytes: Any
    reserved_bytes: Any

    def estimate(self, index: int, batch: ConfigBatch) -> Estimate:
        zero = dict.fromkeys(CostBreakdown.__dataclass_fields__, 0.0)
        return Estimate(
            config=batch.config(index),
            cost=CostBreakdown(**{**zero, "compute_s": float(self.step_s[index])}),
            memory=MemoryBreakdown(
                stage=0,
                params_bytes=int(self.peak_bytes[index]),
                grads_bytes=0,
                optimizer_bytes=0,
                activations_bytes=0,
                gathered_bytes=0,
                working_bytes=0,
                communication_bytes=0,
                fragmentation_bytes=int(self.fragmentation_bytes[index]),
                moment=Moment.BACKWARD,
                reserved_bytes=int(self.reserved_bytes[index]),
                capacity_bytes=int(self.capacity_bytes[index]),
            ),
        )


def ranking(
    steps: list[float],
    peaks: list[int],
    *,
    margin: MemoryMargin | None = None,
    fragmentation: int = 0,
    **fields: list[int],
) -> exhaustive.Ranking:
    """Configs ``micro_batch_size`` 1, 2, 3 ... with those scores on a device of 100 bytes, 10 of them reserved."""
    count = len(steps)
    batch = ConfigBatch.from_columns({"micro_batch_size": np.arange(1, count + 1), **fields}, count)

    def scorer(part: ConfigBatch) -> FakeScores:
        places = part.micro_batch_size - 1
        return FakeScores(
            step_s=np.array(steps)[places],
            peak_bytes=np.array(peaks)[places],
            fragmentation_bytes=np.full(len(part), fragmentation),
            capacity_bytes=np.full(len(part), 100),
            reserved_bytes=np.full(len(part), 10),
        )

    return rank(batch, scorer, margin=margin)


def margin(share: float) -> MemoryMargin:
    return MemoryMargin(share=share, source="a test")


def test_ranking_goes_by_step_time_and_leaves_out_what_does_not_fit() -> None:
    found = ranking([3.0, 1.0, 2.0, 0.5], [50, 90, 89, 91])
    assert found.best(10).tolist() == [1, 2, 0]
    assert found.best(2).tolist() == [1, 2]


def test_a_margin_is_kept_on_tensors_and_fragmentation() -> None:
    steps, peaks = [3.0, 1.0, 2.0, 0.5], [50, 90, 80, 81]
    assert ranking(steps, peaks, margin=margin(0.0)).best(10).tolist() == [3, 1, 2, 0]
    assert ranking(steps, peaks, margin=margin(0.0), fragmentation=9).best(10).tolist() == [3, 2, 0]
    assert ranking(steps, peaks, margin=margin(0.1), fragmentation=1).best(10).tolist() == [2, 0]  # 81 * 1.1 = 89.1
    assert ranking(steps, peaks, fragmentation=99).best(10).tolist() == [3, 1, 2, 0]  # what fits is enough
    found = ranking(steps, peaks, margin=margin(0.1), fragmentation=1)
    assert found.fits.all() and found.needed_bytes.tolist() == pytest.approx([56.1, 100.1, 89.1, 90.2])


def test_equal_steps_go_by_free_memory_then_simplicity() -> None:
    # 1.0009 is within 0.1 % of 1.0, 1.0011 is not, though it is within 0.1 % of 1.0009
    assert ranking([1.0, 1.0009, 1.0011, 1.0005], [60, 50, 10, 70]).best(4).tolist() == [1, 0, 3, 2]
    # equal in time and memory: fewer axes, then fewer chunks, then a lower ZeRO stage
    assert ranking([1.0] * 3, [50] * 3, dp=[4, 4, 4], zero_stage=[2, 0, 1]).best(3).tolist() == [1, 2, 0]
    assert ranking([1.0] * 3, [50] * 3, tp=[2, 2, 4], pp=[2, 2, 1], vpp=[2, 1, 1]).best(3).tolist() == [2, 1, 0]


def test_pareto_front_holds_what_nothing_beats_in_both() -> None:
    found = ranking([1.0, 2.0, 3.0, 4.0, 2.0, 0.1], [80, 60, 70, 20, 55, 95])
    # 2 is slower and larger than 1; 1 is as fast as 4 but larger; 5 does not fit
    assert found.pareto().tolist() == [0, 4, 3]


def test_nearest_miss_lacks_least() -> None:
    found = ranking([1.0, 2.0, 3.0], [120, 95, 99])
    assert (found.nearest_miss(), found.best(5).tolist(), found.pareto().tolist()) == (1, [], [])
    # of those that fit but for the margin, if there are any
    assert ranking([1.0, 2.0, 3.0], [120, 89, 85], margin=margin(0.2)).nearest_miss() == 2


def test_scoring_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search(LLAMA, WORKLOAD, CLUSTER)
    monkeypatch.setattr(exhaustive, "CHUNK", 1000)
    pieces = search(LLAMA, WORKLOAD, CLUSTER)
    assert np.array_equal(whole.ranking.step_s, pieces.ranking.step_s)
    assert np.array_equal(whole.ranking.order, pieces.ranking.order)


def rejected_for(plan: Plan, reason: Reason) -> int:
    assert plan.search is not None
    return sum(each.count for each in plan.search.rejected if each.reason is reason)


def test_the_funnel_tells_what_fits_without_the_margin_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "WHOLE", 10**6)
    plans = {share: make_plan(LLAMA, WORKLOAD, CLUSTER, memory_margin=share, gpus=8) for share in (0.0, 0.1, 0.3)}
    unfit = {rejected_for(plan, Reason.OUT_OF_MEMORY) for plan in plans.values()}
    narrow = [rejected_for(plan, Reason.MEMORY_MARGIN) for plan in plans.values()]
    assert len(unfit) == 1 and unfit.pop() > 0
    assert narrow[0] == 0 < narrow[1] < narrow[2]
    assert plans[0.0].memory_margin is None
    assert plans[0.1].memory_margin == MemoryMargin(share=0.1, source="asked for")
    assert len({plan.digest for plan in plans.values()}) == len({plan.config for plan in plans.values()})


def test_the_margin_of_a_target_is_kept_by_default() -> None:
    wide = replace(MESHWRIGHT, memory=replace(MESHWRIGHT.memory, margin=0.3, margin_source="eleven peaks"))
    plan = make_plan(LLAMA, WORKLOAD, CLUSTER, framework=wide, gpus=8)
    assert plan.memory_margin == MemoryMargin(share=0.3, source="eleven peaks")
    assert plan.config == make_plan(LLAMA, WORKLOAD, CLUSTER, memory_margin=0.3, gpus=8).config


def test_plan_is_the_fastest_that_fits_and_counts_everything() -> None:
    plan = make_plan(LLAMA, WORKLOAD, CLUSTER, top=4)
    report, memory, cost = plan.search, plan.memory, plan.cost
    assert report is not None and memory is not None and cost is not None
    assert plan.config.world_size == 16 and sum(plan.micro_batches_per_data_rank) * plan.config.micro_batch_size == 64
    assert (len(report.runners_up), report.method, report.optimality_gap) == (3, "branch and bound", 0.0)
    assert all(each.cost.step_s >= cost.step_s * (1 - exhaustive.TIE) for each in report.runners_up)
    without_memory = (Reason.OUT_OF_MEMORY, Reason.MEMORY_MARGIN)
    legal = legal_space(LLAMA, WORKLOAD, 16, FRAMEWORKS["meshwright"])
    assert report.num_scored + report.num_too_slow + report.num_too_large == report.num_legal == legal.num_legal
    assert report.num_feasible >= 4
    assert report.num_feasible + sum(rejected_for(plan, reason) for reason in without_memory) <= report.num_scored
    assert plan.memory_margin is not None and plan.memory_margin.share == FRAMEWORKS["meshwright"].memory.margin
    held = memory.peak_bytes + memory.fragmentation_bytes
    assert held * (1 + plan.memory_margin.share) <= memory.capacity_bytes - memory.reserved_bytes
    assert plan.assumptions and plan.cluster_digest == CLUSTER.digest


def test_the_pick_beats_configs_priced_one_by_one() -> None:
    workload = Workload(seq_len=4096, global_batch_size=8)
    found = search(LLAMA, workload, CLUSTER, gpus=8, memory_margin=0.0)
    best = found.plan(1).cost
    assert best is not None
    batch = found.space.batch
    some = list(batch.take(np.arange(0, len(batch), len(batch) // 101)).configs())
    every = [estimate(LLAMA, workload, CLUSTER, config) for config in some]
    fastest = min(each.cost.step_s for each in every if each.memory.headroom_bytes >= 0)
    assert len(every) > 100 and best.step_s <= fastest * (1 + exhaustive.TIE)


def test_a_large_space_is_searched_by_bounds_and_says_so() -> None:
    said: list[str] = []
    found = search(MIXTRAL, WORKLOAD, CLUSTER, constraints={"tp": 1}, on_progress=said.append)
    plan = found.plan(3)
    report = plan.search
    assert report is not None and report.method == "branch and bound" and plan.config.tp == 1
    assert report.num_scored < report.num_legal / 50
    assert said[0] == f"{report.num_legal:,} legal configs: a first good one" and "families that may be" in said[-1]
    console = Console(file=io.StringIO(), width=160, highlight=False)
    show_plan(plan, CLUSTER, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{report.num_legal:,} legal configs in" in shown and f"{report.num_scored:,} scored; ruled out" in shown
    config = plan.config
    layout = (
        f"attention tp {config.tp} x cp {config.cp} x dp {config.dp} beside experts etp {config.etp} x ep {config.ep}"
    )
    assert (layout in shown) == (config.ep * config.etp > 1)


def test_more_than_was_wanted_is_searched_again() -> None:
    found = search(LLAMA, WORKLOAD, CLUSTER, wanted=1)
    again = found.plan(12)
    assert again.search is not None and len(again.search.runners_up) == 11
    once = search(LLAMA, WORKLOAD, CLUSTER, wanted=12).plan(12)
    assert once.search is not None and once.search.runners_up == again.search.runners_up


def test_pareto_front_runs_from_the_fastest_to_the_smallest() -> None:
    plan = make_plan(LLAMA, WORKLOAD, CLUSTER)
    assert plan.search is not None
    steps = [each.cost.step_s for each in plan.search.pareto]
    peaks = [each.memory.peak_bytes for each in plan.search.pareto]
    assert len(steps) > 1 and steps == sorted(steps) and peaks == sorted(peaks, reverse=True)


def test_candidates_are_ranked_plans_starting_with_the_pick() -> None:
    plans = search(LLAMA, WORKLOAD, CLUSTER).candidates(25)
    assert len(plans) == 25 and len({plan.digest for plan in plans}) == 25
    assert plans[0].config == make_plan(LLAMA, WORKLOAD, CLUSTER).config
    steps = [plan.cost.step_s for plan in plans if plan.cost]
    assert all(later >= earlier * (1 - exhaustive.TIE) for earlier, later in pairwise(steps))


def test_constraints_and_fewer_devices_are_kept_to() -> None:
    plan = make_plan(LLAMA, WORKLOAD, CLUSTER, constraints={"tp": 4, "recompute": Recompute.FULL}, gpus=8)
    assert (plan.config.tp, plan.config.recompute, plan.config.world_size) == (4, Recompute.FULL, 8)


def test_nothing_fits_names_the_nearest_miss_and_by_how_much() -> None:
    gpt3 = load_model("gpt3-175b")
    with pytest.raises(
        InfeasibleError, match=r"nothing fits: the nearest miss is .* zero3 .* needs \d+ GiB of .* too much"
    ):
        make_plan(gpt3, Workload(seq_len=2048, global_batch_size=64), CLUSTER, gpus=8)


def test_a_margin_that_leaves_nothing_says_so_and_how_to_take_what_fits() -> None:
    constraints = {"dp": 16, "zero_stage": 2, "recompute": Recompute.NONE, "micro_batch_size": 1}
    with pytest.raises(InfeasibleError) as caught:
        make_plan(LLAMA, WORKLOAD, CLUSTER, memory_margin=0.99, constraints=constraints)
    said = str(caught.value)
    assert "nothing is recommended, though " in said and "a margin of 99.0%" in said and "drop a --fix" in said
    assert "--memory-margin 0." in said
    share = float(said.partition("--memory-margin ")[2].split()[0])
    taken = make_plan(LLAMA, WORKLOAD, CLUSTER, memory_margin=share, constraints=constraints)
    assert taken.config.describe() in said
    with pytest.raises(InfeasibleError, match="nothing is recommended"):
        make_plan(LLAMA, WORKLOAD, CLUSTER, memory_margin=share + 0.002, constraints=constraints)
    with pytest.raises(InputError, match="a share from 0 up to 1, found 1"):
        make_plan(LLAMA, WORKLOAD, CLUSTER, memory_margin=1.0)


def test_what_fits_without_fragmentation_alone_needs_no_margin_at_all() -> None:
    found = ranking([1.0, 2.0], [85, 88], margin=margin(0.1), fragmentation=6)
    scored = exhaustive.Scored(ranking=found, method=exhaustive.EXHAUSTIVE, wanted=2, num_scored=2)
    said = nothing_recommended(scored, margin(0.1), {})
    assert said.startswith("nothing is recommended, though 2 configs fit: nearest is ")
    assert "85 B, 6 B of fragmentation and a margin of 10.0%, 100 B of 90 B on stage 0, 10.1 B too much" in said
    assert "--memory-margin 0 would take it at your risk" in said


def test_nothing_legal_counts_the_reasons() -> None:
    with pytest.raises(
        InfeasibleError, match=r"no legal way to split llama3-8b over 16 devices: of .* ways, .* divide"
    ):
        make_plan(LLAMA, Workload(seq_len=4096, global_batch_size=1), CLUSTER, constraints={"dp": 16})


def test_devices_fill_whole_nodes() -> None:
    assert [whole_nodes(CLUSTER, gpus) for gpus in (None, 1, 3, 8, 16)] == [16, 1, 3, 8, 16]
    with pytest.raises(InputError, match="12 devices do not fill whole nodes of h100-sxm:2: take 8 or 16"):
        whole_nodes(CLUSTER, 12)
    for gpus in (0, 17):
        with pytest.raises(InputError, match=f"has 16 devices, asked for {gpus}"):
            whole_nodes(CLUSTER, gpus)


def test_learned_positions_bound_the_sequence() -> None:
    with pytest.raises(InputError, match="learned positions for 1024 tokens, seq_len=2048 is longer"):
        make_plan(load_model("gpt2"), Workload(seq_len=2048, global_batch_size=16), CLUSTER)


def test_a_given_config_is_priced_as_the_search_prices_it() -> None:
    pick = make_plan(LLAMA, WORKLOAD, CLUSTER)
    given = plan_for(pick.config, LLAMA, WORKLOAD, CLUSTER)
    assert (given.cost, given.memory, given.digest) == (pick.cost, pick.memory, pick.digest)
    assert given.search is None


def test_a_given_config_that_does_not_fit_is_still_priced() -> None:
    plan = plan_for(ParallelConfig(dp=16), LLAMA, WORKLOAD, CLUSTER)
    assert plan.memory is not None and plan.memory.headroom_bytes < 0


def test_a_given_config_that_is_not_legal_is_refused_with_the_rule() -> None:
    with pytest.raises(InputError, match="tp=3 does not divide 32 heads"):
        plan_for(ParallelConfig(tp=3), LLAMA, WORKLOAD, CLUSTER)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ParallelConfig(dp=16)),
        ({"tp": 4, "zero_stage": 2}, ParallelConfig(tp=4, dp=4, dp_shard=4, zero_stage=2, vocab_parallel=True)),
        (
            {"pp": 4, "schedule": Schedule.INTERLEAVED},
            ParallelConfig(pp=4, dp=4, vpp=2, schedule=Schedule.INTERLEAVED),
        ),
        ({"cp": 4, "cp_ulysses": 2}, ParallelConfig(cp=4, cp_ring=2, cp_ulysses=2, dp=4)),
        ({"cp_ulysses": 2, "dp": None}, ParallelConfig(cp=2, cp_ulysses=2, dp=8)),
    ],
)
def test_what_is_left_open_follows_from_the_rest(given: dict[str, Any], expected: ParallelConfig) -> None:
    assert complete_config(given, 16, MESHWRIGHT) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tp": 3}, "tp=3 does not divide 16 devices"),
        ({"tp": 4, "pp": 8}, "tp=4 * pp=8 is 32, which does not divide 16 devices"),
        ({"tp": 2, "dp": 4}, "tp=2 * dp=4 is 8 ranks, not 16 devices"),
        ({"cp": 3, "cp_ulysses": 2}, "cp_ulysses=2 does not divide cp=3"),
        ({"tp": 0}, "tp must be at least 1, found 0"),
        ({"zero_stage": -1}, "zero_stage must be at least 0, found -1"),
    ],
)
def test_degrees_that_do_not_make_the_devices_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        complete_config(given, 16, MESHWRIGHT)
    assert sentence in str(caught.value)


def test_model_flops_of_llama_by_hand() -> None:
    # matmul weights a token meets: 32 * (4096*(4096+2*1024) + 4096*4096 + 3*4096*14336) + 4096*128256
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * 128256
    attention = 32 * 12 * 4096 * 4096  # 12 * layers * hidden * seq_len (arXiv 2204.02311, appendix B)
    assert model_flops(LLAMA, WORKLOAD) == pytest.approx((6 * weights + attention) * 64 * 4096, rel=1e-12)


def test_model_flops_of_experts_by_hand() -> None:
    mixtral = load_model("mixtral-8x7b")  # 8 experts, of which a token takes 2; router 4096 x 8; window off
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 2 * 3 * 4096 * 14336 + 4096 * 8) + 4096 * 32000
    attention = 32 * 12 * 4096 * 4096
    assert model_flops(mixtral, WORKLOAD) == pytest.approx((6 * weights + attention) * 64 * 4096, rel=1e-12)


def test_summary_by_hand() -> None:
    plan = make_plan(LLAMA, WORKLOAD, CLUSTER)
    assert plan.cost is not None and plan.memory is not None
    summary = summarize(plan, CLUSTER)
    step_s = plan.cost.step_s
    assert summary.tokens_per_s == pytest.approx(64 * 4096 / step_s)
    assert summary.tokens_per_s_per_device == pytest.approx(64 * 4096 / step_s / 16)
    peak = CLUSTER.device.efficiency("matmul", "bfloat16").peak_flops_per_s
    assert summary.mfu == pytest.approx(model_flops(LLAMA, WORKLOAD) / step_s / 16 / peak)
    assert 0.05 < (summary.mfu or 0) < 0.9
    assert summary.headroom_bytes == summary.usable_bytes - summary.peak_bytes
    assert summary.fits and summary.recommended
    held = plan.memory.peak_bytes + plan.memory.fragmentation_bytes
    tight = replace(plan, memory_margin=margin(summary.usable_bytes / held - 0.999))  # a thousandth more than there is
    assert summarize(tight, CLUSTER).fits and not summarize(tight, CLUSTER).recommended
    assert summarize(tight, CLUSTER).needed_bytes == pytest.approx(summary.usable_bytes + 0.001 * held, rel=1e-9)
    assert summarize(replace(plan, memory_margin=None), CLUSTER).needed_bytes == summary.peak_bytes
    bare: Plan = replace(plan, cost=None, memory=None)
    with pytest.raises(InputError, match="carries no prediction"):
        summarize(bare, CLUSTER)
