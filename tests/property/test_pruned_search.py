"""Branch and bound against scoring everything, and its bounds against the model's values, for any target."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from meshwright.cost_models.framework import Framework
from meshwright.cost_models.margin import margin_of
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.targets import FRAMEWORKS
from meshwright.cost_models.workload import Workload
from meshwright.planner.bounds import Bounds
from meshwright.planner.exhaustive import TIE, rank
from meshwright.planner.families import Families
from meshwright.planner.pruned import Pruned
from meshwright.planner.space import Space, legal_space
from meshwright.profiler.cluster import ClusterProfile, load_cluster
from meshwright.profiler.model import ModelSpec, load_model

MODELS = tuple(load_model(name) for name in ("gpt2", "llama3-8b", "mixtral-8x7b", "deepseek-v2-lite"))
CLUSTERS = tuple(load_cluster(name) for name in ("h100-sxm:1", "h100-sxm:2", "a100-40gb-sxm:2", "a100-sxm:4"))
FULL = replace(
    FRAMEWORKS["meshwright"],
    context_parallel=True,
    expert_parallel=True,
    tensor_parallel_moe=True,
    partial_sharding=True,
    expert_chunks=(1, 2),
)
TARGETS = (*(FRAMEWORKS[name] for name in sorted(FRAMEWORKS)), *[FULL] * len(FRAMEWORKS))  # every second is FULL
LARGEST = 4000  # configs that scoring everything takes a fraction of a second for
some = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])

Problem = tuple[ModelSpec, Workload, ClusterProfile, Framework, Space]


@st.composite
def problems(draw: Any) -> Problem:
    """Spaces of up to ``LARGEST`` configs, on devices with all of their memory or little of it."""
    model, cluster = draw(st.sampled_from(MODELS)), draw(st.sampled_from(CLUSTERS))
    workload = Workload(
        seq_len=draw(st.sampled_from([256, 1024, 4096] if model.max_seq_len > 1024 else [256, 1024])),
        global_batch_size=draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 32])),
    )
    target = draw(st.sampled_from(TARGETS))
    share = draw(st.sampled_from([1.0, 0.5, 0.2]))
    cluster = replace(
        cluster, devices=tuple(replace(each, memory_bytes=int(share * each.memory_bytes)) for each in cluster.devices)
    )
    fixed = draw(st.sampled_from([{}, {"pp": 2}, {"tp": 2}, {"cp_ulysses": 2}, {"micro_batch_size": 1}, {"dp": 2}]))
    gpus = draw(st.sampled_from([4, 8, cluster.num_devices]))
    assume(all(value <= gpus for value in fixed.values()))
    space = legal_space(model, workload, gpus, target, fixed)
    assume(0 < space.num_legal <= LARGEST)
    return model, workload, cluster, target, space


@some
@given(problems(), st.sampled_from([1, 3, 10]))
def test_what_is_ruled_out_is_never_among_the_best(problem: Problem, wanted: int) -> None:
    model, workload, cluster, target, space = problem
    margin = margin_of(target)
    scorer = partial(estimate_batch, model, workload, cluster, target, tells_waits=False)
    every = rank(space.batch, scorer, margin=margin)
    found = Pruned(space, Bounds(model, workload, cluster, target), margin, wanted).run(scorer)
    best, ranking = every.best(wanted), found.ranking
    assert list(ranking.batch.take(ranking.best(wanted)).configs()) == list(space.batch.take(best).configs())
    assert found.num_scored + found.num_too_slow + found.num_too_large == space.num_legal == len(space.batch)
    assert min(found.num_scored, found.num_too_slow, found.num_too_large) >= 0
    if not len(best):
        nearest, true = ranking.nearest_miss(), every.nearest_miss()
        lacking = ranking.needed_bytes[nearest] - ranking.usable_bytes[nearest]
        assert lacking == every.needed_bytes[true] - every.usable_bytes[true]
        return
    front, last = every.pareto(), every.step_s[best].max() / (1 + TIE)
    reached = front[every.step_s[front] <= last]
    assert list(ranking.batch.take(ranking.pareto()[: len(reached)]).configs()) == list(
        space.batch.take(reached).configs()
    )


@some
@given(problems(), st.integers(0, 2**32 - 1))
def test_no_bound_is_above_the_value_it_bounds(problem: Problem, seed: int) -> None:
    model, workload, cluster, target, space = problem
    size = min(300, len(space.batch))
    batch = space.batch.take(np.random.default_rng(seed).choice(len(space.batch), size, replace=False))
    true = estimate_batch(model, workload, cluster, target, batch, tells_waits=False)
    bounds = Bounds(model, workload, cluster, target)
    few, whole = bounds.passes(batch), bounds.whole_passes(bounds.parts(batch))
    without = bounds.mean_step(batch, bounds.passes(batch, exchanges=False))
    assert (without <= bounds.mean_step(batch, few)).all() and (bounds.mean_step(batch, few) <= true.step_s).all()
    state, held = bounds.state(batch), bounds.activations(bounds.held(batch))
    assert (bounds.mean_state(batch, state) <= true.peak_bytes).all()
    assert (bounds.mean_peak(batch, state, held[0]) <= true.peak_bytes).all()
    shapes, of = batch.distinct("pp", "vpp", "schedule")
    for number, shape in enumerate(shapes.configs()):
        rows = np.flatnonzero(of == number)
        own = batch.take(rows)
        for passes in (few, whole):
            assert (bounds.step(own, passes.take(rows), shape.schedule, shape.vpp) <= true.step_s[rows]).all()
        peak = bounds.peak(own, bounds.state(own), (held[0][:, rows], held[1][rows]), shape.schedule, shape.vpp)
        assert (peak <= true.peak_bytes[rows]).all()


@some
@given(problems())
def test_a_cell_takes_least_with_its_largest_or_its_smallest_micro_batch(problem: Problem) -> None:
    model, workload, cluster, target, space = problem
    families = Families(space, Bounds(model, workload, cluster, target))
    least = families.cells_at_least()
    family = families.families(families.sized(np.arange(len(least)), np.inf), np.inf)
    assert (family.least_s >= least[family.cell] * (1 - 1e-9)).all()
