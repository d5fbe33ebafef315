"""Laws that every prediction obeys, whatever the machine, the model and the config."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost_models.collectives import groups_of, seconds
from meshwright.cost_models.estimate import BYTES, SECONDS, CostBreakdown
from meshwright.cost_models.framework import Framework, supported
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import LOOPED, V_SHAPED, ConfigBatch, ParallelConfig, Recompute, Schedule, legal
from meshwright.cost_models.targets import FRAMEWORKS, framework_named
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.cluster import CollectiveCurve

LAWS = settings(max_examples=25, deadline=None)

DEGREES = st.sampled_from([1, 2, 4, 8])
BYTE_COUNTS = st.floats(1.0, 1e9)
LATENCIES = st.floats(1e-7, 1e-3)
RATES = st.floats(1e6, 1e12)
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


@st.composite
def configs(draw: Any) -> ParallelConfig:
    """Configs of up to 64 ranks that meshwright may run."""
    tp, pp, dp = draw(DEGREES), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    zero = draw(st.sampled_from([0, 1, 2, 3])) if dp > 1 else 0
    schedule = draw(st.sampled_from(list(Schedule)))
    schedule = schedule if pp > 1 else Schedule.ONE_F_ONE_B
    return ParallelConfig(
        tp=tp,
        pp=pp,
        dp=dp,
        vpp=2 if schedule in (*LOOPED, *V_SHAPED) else 1,
        dp_shard=dp if zero else 1,
        zero_stage=zero,
        micro_batch_size=draw(st.sampled_from([1, 2, 4])),
        sequence_parallel=tp > 1 and draw(st.booleans()),
        vocab_parallel=tp > 1,
        schedule=schedule,
        recompute=draw(st.sampled_from(list(Recompute))),
    )


def batches() -> Any:
    return st.lists(configs(), min_size=1, max_size=12).map(ConfigBatch.from_configs)


@st.composite
def clusters(draw: Any, toy: Any) -> Any:
    inside, across = (draw(LATENCIES), draw(RATES)), (draw(LATENCIES), draw(RATES))
    kind = draw(st.sampled_from(["cpu", "gpu"]))
    device = toy.device(
        kind,
        half_m=draw(st.floats(0, 100)),
        half_n=draw(st.floats(0, 100)),
        overhead_s=draw(st.floats(0, 1e-4)),
        launch_s=draw(st.floats(0, 1e-4)),
        communication_slowdown=draw(st.floats(0, 1)),
    )
    return toy.cluster(num_nodes=16, devices_per_node=8, device=device, node=inside, network=across)


WORKLOAD = Workload(seq_len=64, global_batch_size=32)


TARGETS = st.sampled_from(sorted(FRAMEWORKS)).map(framework_named)


def runnable(batch: ConfigBatch, model: Any, target: Framework) -> ConfigBatch:
    return batch.take((legal(batch, model, WORKLOAD) < 0) & supported(batch, target, model, WORKLOAD))


@LAWS
@given(data=st.data(), batch=batches(), target=TARGETS)
def test_the_breakdown_sums_exactly_and_nothing_is_negative(
    toy: Any, data: Any, batch: ConfigBatch, target: Framework
) -> None:
    model, cluster = toy.model(num_layers=9, tied=data.draw(st.booleans())), data.draw(clusters(toy))
    batch = runnable(batch, model, target)
    found = estimate_batch(model, WORKLOAD, cluster, target, batch)
    exposed = [field.name for field in fields(CostBreakdown) if field.name != "hidden_s"]
    for index in range(len(batch)):
        cost = found.estimate(index, batch).cost
        assert cost.step_s == sum(getattr(cost, name) for name in exposed) == found.step_s[index]
        assert all(getattr(cost, name) >= -1e-12 * cost.step_s for name in SECONDS)
    assert all((getattr(found, name) >= 0).all() for name in BYTES)
    assert (found.step_s > 0).all()


@LAWS
@given(data=st.data(), batch=batches(), target=TARGETS)
def test_a_degree_of_one_costs_nothing_on_its_axis(toy: Any, data: Any, batch: ConfigBatch, target: Framework) -> None:
    model, cluster = toy.model(num_layers=9), data.draw(clusters(toy))
    batch = runnable(batch, model, target)
    found = estimate_batch(model, WORKLOAD, cluster, target, batch)
    assert not found.tp_s[batch.tp == 1].any()
    assert not found.dp_s[batch.dp == 1].any()
    assert not (found.pp_s + found.bubble_s)[batch.pp == 1].any()
    assert not found.recompute_s[batch.is_recompute(Recompute.NONE)].any()
    assert not found.cp_s.any() and not found.ep_s.any()


@LAWS
@given(data=st.data(), batch=batches(), target=TARGETS)
def test_many_at_once_equal_each_alone(toy: Any, data: Any, batch: ConfigBatch, target: Framework) -> None:
    model, cluster = toy.model(num_layers=9), data.draw(clusters(toy))
    batch = runnable(batch, model, target)
    found = estimate_batch(model, WORKLOAD, cluster, target, batch)
    for index in range(len(batch)):
        one = batch.take(np.array([index]))
        alone = estimate_batch(model, WORKLOAD, cluster, target, one)
        assert alone.estimate(0, one) == found.estimate(index, batch)


@LAWS
@given(data=st.data(), batch=batches(), target=TARGETS, factor=st.floats(1.0, 100.0), tier=st.sampled_from([0, 1]))
def test_a_faster_link_never_slows_a_step(
    toy: Any, data: Any, batch: ConfigBatch, target: Framework, factor: float, tier: int
) -> None:
    model, cluster = toy.model(num_layers=9), data.draw(clusters(toy))
    batch = runnable(batch, model, target)
    link = cluster.tiers[tier]
    faster = replace(
        link,
        latency_s=link.latency_s / factor,
        bytes_per_s=link.bytes_per_s * factor,
        contended_bytes_per_s=link.contended_bytes_per_s * factor,
    )
    tiers = tuple(faster if position == tier else other for position, other in enumerate(cluster.tiers))
    before = estimate_batch(model, WORKLOAD, cluster, target, batch).step_s
    after = estimate_batch(model, WORKLOAD, replace(cluster, tiers=tiers), target, batch).step_s
    assert (after <= before * (1 + 1e-9)).all()


@LAWS
@given(
    data=st.data(), batch=batches(), small=BYTE_COUNTS, factor=st.floats(1.0, 1e3), op=st.sampled_from(OPS),
    axis=st.sampled_from(["tp", "dp", "pp"]), measured=st.booleans(),
)  # fmt: skip
def test_more_bytes_are_never_faster(
    toy: Any, data: Any, batch: ConfigBatch, small: float, factor: float, op: Any, axis: str, measured: bool
) -> None:
    cluster = data.draw(clusters(toy))
    if measured:
        times = sorted(data.draw(st.lists(LATENCIES, min_size=3, max_size=3)))
        shape = data.draw(st.sampled_from([(2, 2), (4, 4), (8, 8), (8, 4), (16, 8), (4, 1)]))
        curve = CollectiveCurve(
            op=op, num_ranks=shape[0], ranks_per_node=shape[1], message_bytes=(1e3, 1e5, 1e7), seconds=tuple(times),
            spread=(0.0, 0.0, 0.0), source=toy.source,
        )  # fmt: skip
        cluster = replace(cluster, collectives=(curve,))
    groups = groups_of(batch, cluster, Placement(), axis)
    less, more = (seconds(cluster, op, groups, num_bytes) for num_bytes in (small, small * factor))
    assert (more >= less * (1 - 1e-12)).all()


@LAWS
@given(data=st.data(), batch=batches(), num_bytes=BYTE_COUNTS, axis=st.sampled_from(["tp", "dp", "pp"]))
def test_all_reduce_costs_at_most_its_two_halves(
    toy: Any, data: Any, batch: ConfigBatch, num_bytes: float, axis: str
) -> None:
    cluster = data.draw(clusters(toy))
    groups = groups_of(batch, cluster, Placement(), axis)
    whole, scatter, gather = (
        seconds(cluster, op, groups, num_bytes) for op in ("all_reduce", "reduce_scatter", "all_gather")
    )
    assert (whole <= (scatter + gather) * (1 + 1e-12)).all()


@LAWS
@given(batch=batches(), recipe=st.sampled_from(["bf16", "fp32"]), target=TARGETS)
def test_zero_and_recompute_only_save_memory(toy: Any, batch: ConfigBatch, recipe: str, target: Framework) -> None:
    model, workload = toy.model(num_layers=9), replace(WORKLOAD, recipe=RECIPES[recipe])
    batch = runnable(batch, model, target)
    batch = batch.take(batch.pp == 1)  # with a pipeline the fullest stage may be another one

    def held(**columns: Any) -> Any:
        cluster = toy.cluster(num_nodes=16, devices_per_node=8)
        return estimate_batch(model, workload, cluster, target, replace_all(batch, **columns))

    full, none = (held(recompute=list(Recompute).index(choice)) for choice in (Recompute.FULL, Recompute.NONE))
    assert (full.activations_bytes <= none.activations_bytes).all()
    stages = [
        held(zero_stage=np.where(batch.dp > 1, zero, 0), dp_shard=np.where(zero > 0, batch.dp, 1))
        for zero in (0, 1, 2, 3)
    ]
    assert (stages[1].optimizer_bytes <= stages[0].optimizer_bytes).all()
    for less, more in zip(stages[2:], stages[1:-1], strict=True):
        assert (less.optimizer_bytes == more.optimizer_bytes).all()
        assert (less.grads_bytes <= more.grads_bytes).all()
        assert (less.params_bytes <= more.params_bytes).all()


def replace_all(batch: ConfigBatch, **columns: Any) -> ConfigBatch:
    every = {field.name: getattr(batch, field.name) for field in fields(ConfigBatch)}
    return ConfigBatch.from_columns(every | columns, len(batch))
