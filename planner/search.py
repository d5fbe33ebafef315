"""The entry: a model, a workload and a cluster in, a plan out, with what came next and why the rest was rejected."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from meshwright import InfeasibleError, InputError
from meshwright.cost_models.estimate import Estimate
from meshwright.cost_models.framework import Framework, refuse_dtypes
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.step import assumptions, estimate_batch
from meshwright.cost_models.strategy import REASONS, ConfigBatch, ParallelConfig, Reason
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload
from meshwright.planner.exhaustive import Ranking, rank
from meshwright.planner.plan import Plan, RejectedCount, SearchReport, default_stages
from meshwright.planner.reasons import SENTENCES, why_illegal
from meshwright.planner.space import Space, legal_space
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.units import format_bytes

# Share of a device's usable memory that a plan must leave free. The memory model counts tensors; the caching
# allocator's fragmentation and the libraries' workspaces come on top.
MEMORY_MARGIN = 0.04


@dataclass(frozen=True, slots=True)
class Search:
    """A finished search: the legal space scored and ranked, at least one config of it feasible."""

    model: ModelSpec
    workload: Workload
    cluster: ClusterProfile
    framework: Framework
    memory_margin: float
    space: Space
    ranking: Ranking
    started: float  # time.perf_counter() at its start

    def plan(self, top: int = 10) -> Plan:
        """The best plan, its report naming the next ``top - 1`` and the Pareto front of time and memory."""
        best = self.ranking.estimates(self.ranking.best(max(top, 1)))
        num_feasible = len(self.ranking.order)
        report = SearchReport(
            method="exhaustive",
            num_scored=len(self.space.batch),
            num_feasible=num_feasible,
            rejected=_with_memory(self.space.rejected, len(self.space.batch) - num_feasible),
            runners_up=best[1:],
            pareto=self.ranking.estimates(self.ranking.pareto()),
            optimality_gap=0.0,
            seconds=time.perf_counter() - self.started,
        )
        return self._as_plan(best[0], report)

    def candidates(self, count: int) -> tuple[Plan, ...]:
        """The ``count`` best plans in order (fewer when fewer fit), each without a report."""
        return tuple(self._as_plan(each, None) for each in self.ranking.estimates(self.ranking.best(count)))

    def _as_plan(self, estimate: Estimate, report: SearchReport | None) -> Plan:
        return _plan(
            estimate, self.model, self.workload, self.cluster, self.framework, report, margin=self.memory_margin
        )


def search(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    *,
    framework: str | Framework = "meshwright",
    constraints: Mapping[str, Any] | None = None,
    memory_margin: float = MEMORY_MARGIN,
    gpus: int | None = None,
) -> Search:
    """Enumerate what is legal on ``gpus`` devices (default: all of the cluster), score all of it, rank it.

    ``constraints`` fixes fields of the config (``{"tp": 8}``); ``memory_margin`` is the share of usable memory that
    must stay free by prediction.

    Raises:
        InputError: a constraint, the margin or ``gpus`` makes no sense for this cluster, or a rate is not known.
        InfeasibleError: nothing is legal (with the counts by reason) or nothing fits (with the nearest miss).
    """
    started = time.perf_counter()
    if not 0 <= memory_margin < 1:
        raise InputError(f"the memory margin is a share from 0 up to 1, found {memory_margin}")
    target = framework_named(framework) if isinstance(framework, str) else framework
    check_length(model, workload)
    refuse_dtypes(target, workload)
    num_devices = whole_nodes(cluster, gpus)
    space = legal_space(model, workload, num_devices, target, constraints)
    if not len(space.batch):
        raise InfeasibleError(_nothing_legal(model, num_devices, space))
    scorer = partial(_score, model, workload, cluster, target)
    ranking = rank(space.batch, partial(scorer, tells_waits=False), memory_margin=memory_margin)
    ranking = replace(ranking, scorer=scorer)  # the few that are shown, with everything told
    if not len(ranking.order):
        raise InfeasibleError(_nothing_fits(ranking, memory_margin, constraints or {}))
    return Search(
        model=model,
        workload=workload,
        cluster=cluster,
        framework=target,
        memory_margin=memory_margin,
        space=space,
        ranking=ranking,
        started=started,
    )


def make_plan(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    *,
    framework: str | Framework = "meshwright",
    constraints: Mapping[str, Any] | None = None,
    top: int = 10,
    memory_margin: float = MEMORY_MARGIN,
    gpus: int | None = None,
) -> Plan:
    """The fastest plan that fits, with the ``top - 1`` next in its report.

    ``framework`` is what will run the plan; ``constraints`` fixes fields of the config (``{"tp": 8}``);
    ``memory_margin`` is the share (0 up to 1) of a device's usable memory that must stay free by prediction; ``gpus``
    takes that many devices, whole nodes, instead of all.

    Raises:
        InputError: a constraint, the margin, the framework or ``gpus`` makes no sense here, or a rate is not known.
        InfeasibleError: nothing is legal (with the counts by reason) or nothing fits (with the nearest miss).
    """
    found = search(
        model,
        workload,
        cluster,
        framework=framework,
        constraints=constraints,
        memory_margin=memory_margin,
        gpus=gpus,
    )
    return found.plan(top)


def plan_for(
    config: ParallelConfig,
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    *,
    framework: str | Framework = "meshwright",
) -> Plan:
    """The plan of a given config, priced; also when it does not fit (``plan.memory.headroom_bytes`` is negative then).

    Raises ``InputError`` naming the rule that the config breaks, or when the cluster has no such world size.
    """
    target = framework_named(framework) if isinstance(framework, str) else framework
    check_length(model, workload)
    refuse_dtypes(target, workload)
    whole_nodes(cluster, config.world_size)
    broken = why_illegal(config, model, workload, target)
    if broken:
        raise InputError(broken)
    batch = ConfigBatch.from_configs([config])
    estimate = _score(model, workload, cluster, target, batch).estimate(0, batch)
    return _plan(estimate, model, workload, cluster, target, None, margin=0.0)


def whole_nodes(cluster: ClusterProfile, gpus: int | None) -> int:
    """``gpus``, or all devices of the cluster for ``None``.

    Raises ``InputError`` unless that many devices are there and fill whole nodes, or are a part of the first one.
    """
    if gpus is None:
        return cluster.num_devices
    if not 1 <= gpus <= cluster.num_devices:
        raise InputError(f"{cluster.name} has {cluster.num_devices} devices, asked for {gpus}")
    sizes = [group.devices_per_node for group in cluster.node_groups for _ in range(group.num_nodes)]
    if gpus <= sizes[0]:
        return gpus
    full = np.cumsum(sizes)
    if gpus not in full:
        below, above = full[full < gpus][-1], full[full > gpus][0]
        raise InputError(f"{gpus} devices do not fill whole nodes of {cluster.name}: take {below} or {above}")
    return gpus


def check_length(model: ModelSpec, workload: Workload) -> None:
    """Raise ``InputError`` when the model learned fewer positions than the workload's sequences have tokens."""
    if model.embedding.num_positions and workload.seq_len > model.max_seq_len:
        raise InputError(
            f"{model.name} has learned positions for {model.max_seq_len} tokens, seq_len={workload.seq_len} is longer"
        )


def _score(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
    *,
    tells_waits: bool = True,
) -> Any:
    return estimate_batch(model, workload, cluster, framework, batch, tells_waits=tells_waits)


def _plan(
    estimate: Estimate,
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    report: SearchReport | None,
    *,
    margin: float,
) -> Plan:
    config = estimate.config
    assumed = assumptions(model, workload, cluster, framework)
    if margin:
        assumed += (f"{margin:.1%} of usable memory is left free, for what the memory model does not count",)
    return Plan(
        framework=framework.name,
        model=model,
        workload=workload,
        cluster_name=cluster.name,
        cluster_digest=cluster.digest,
        environment=cluster.environment,
        config=config,
        placement=Placement(),
        stages=default_stages(model, config, cluster.device.kind),
        micro_batches_per_data_rank=(config.num_microbatches(workload.global_batch_size),) * config.dp,
        cost=estimate.cost,
        memory=estimate.memory,
        search=report,
        assumptions=assumed,
    )


def _with_memory(rejected: tuple[RejectedCount, ...], num_out_of_memory: int) -> tuple[RejectedCount, ...]:
    if not num_out_of_memory:
        return rejected
    return (*rejected, RejectedCount(reason=Reason.OUT_OF_MEMORY, count=num_out_of_memory))


def _nothing_legal(model: ModelSpec, num_devices: int, space: Space) -> str:
    counts = sorted(space.rejected, key=lambda rejected: (-rejected.count, REASONS.index(rejected.reason)))
    reasons = "; ".join(f"{each.count:,} because {SENTENCES[each.reason]}" for each in counts)
    return f"no legal way to split {model.name} over {num_devices} devices: of {space.num_candidates:,} ways, {reasons}"


def _nothing_fits(ranking: Ranking, memory_margin: float, constraints: Mapping[str, Any]) -> str:
    position = ranking.nearest_miss()
    nearest = ranking.estimates(np.asarray([position]))[0]
    memory = nearest.memory
    needed, usable = memory.peak_bytes, memory.capacity_bytes - memory.reserved_bytes
    advice = "take more devices or shorter sequences, or a smaller dtype recipe (--dtype-recipe bf16-pure)"
    if constraints:
        advice = "drop a --fix, " + advice
    margin = ""
    if memory_margin:
        margin = f" less a margin of {memory_margin:.0%}"
        if needed <= usable:
            advice = "--memory-margin 0 would take it, or " + advice
    lacking = needed - float(ranking.usable_bytes[position])
    return (
        f"nothing fits: the nearest miss is {nearest.config.describe()}, which needs {format_bytes(needed)} of "
        f"{format_bytes(usable)}{margin} on stage {memory.stage}, {format_bytes(lacking)} too much; {advice}"
    )
