"""Laws of the legal space that hold for any model, workload, number of devices and constraint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost_models.framework import Framework, supported
from meshwright.cost_models.strategy import FIELDS, REASONS, Reason, Recompute, Schedule, legal
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.workload import Workload
from meshwright.planner.reasons import why_illegal
from meshwright.planner.space import Space, legal_space
from meshwright.profiler.model import ModelSpec, load_model

MODELS = tuple(load_model(name) for name in ("gpt2", "llama3-8b", "mixtral-8x7b"))
EVERYTHING = replace(
    MESHWRIGHT,
    schedules=tuple(Schedule),
    context_parallel=True,
    expert_parallel=True,
    partial_sharding=True,
    tensor_parallel_moe=True,
)
TARGETS = (MESHWRIGHT, EVERYTHING)

Problem = tuple[ModelSpec, Workload, int, Framework]

problems = st.tuples(
    st.sampled_from(MODELS),
    st.builds(Workload, seq_len=st.sampled_from([96, 1000, 1024]), global_batch_size=st.integers(1, 24)),
    st.integers(1, 12),
    st.sampled_from(TARGETS),
)
few = settings(max_examples=25, deadline=None)


def by_reason(space: Space) -> dict[Reason, int]:
    return {each.reason: each.count for each in space.rejected}


@few
@given(problems)
def test_every_candidate_is_legal_or_counted_and_none_twice(problem: Problem) -> None:
    model, workload, world, framework = problem
    space = legal_space(model, workload, world, framework)
    assert len(space.batch) + sum(by_reason(space).values()) == space.num_candidates
    assert all(count > 0 for count in by_reason(space).values())
    order = [REASONS.index(reason) for reason in by_reason(space)]
    assert order == sorted(order)
    rows = np.stack([getattr(space.batch, name).astype(np.int64) for name in FIELDS])
    assert np.unique(rows, axis=1).shape == rows.shape
    batch = space.batch
    assert (batch.tp * batch.cp * batch.pp * batch.dp == world).all()
    assert (legal(batch, model, workload) == -1).all()
    assert supported(batch, framework, model, workload).all()


@few
@given(problems, st.data())
def test_a_config_of_the_space_is_accepted_one_by_one(problem: Problem, data: st.DataObject) -> None:
    model, workload, world, framework = problem
    space = legal_space(model, workload, world, framework)
    if len(space.batch):
        config = space.batch.config(data.draw(st.integers(0, len(space.batch) - 1)))
        assert why_illegal(config, model, workload, framework) is None


@few
@given(problems, st.sampled_from([("tp", 2), ("pp", 2), ("zero_stage", 1), ("recompute", Recompute.FULL)]))
def test_a_constraint_keeps_what_has_the_value_and_moves_the_rest_to_fixed(
    problem: Problem, constraint: tuple[str, object]
) -> None:
    model, workload, world, framework = problem
    name, value = constraint
    free = legal_space(model, workload, 2 * world, framework)
    fixed = legal_space(model, workload, 2 * world, framework, {name: value})
    codes = list(Recompute).index(value) if isinstance(value, Recompute) else value
    assert len(fixed.batch) == int((getattr(free.batch, name) == codes).sum())
    assert fixed.num_candidates == free.num_candidates
    assert by_reason(fixed)[Reason.FIXED] > 0
    for reason in set(REASONS) - {Reason.FIXED}:
        assert by_reason(fixed).get(reason, 0) <= by_reason(free).get(reason, 0)


@few
@given(problems)
def test_a_target_that_runs_less_loses_to_not_in_framework_only(
    problem: Problem,
) -> None:
    model, workload, world, _ = problem
    ours, all_of_it = (legal_space(model, workload, world, target) for target in TARGETS)
    assert ours.num_candidates == all_of_it.num_candidates
    assert len(ours.batch) <= len(all_of_it.batch)
    lost = set(all_of_it.batch.configs()) - set(ours.batch.configs())
    assert set(ours.batch.configs()) <= set(all_of_it.batch.configs())
    assert not lost or not supported(all_of_it.batch, MESHWRIGHT, model, workload).all()
