"""The entry: a model, a workload and a cluster in, a plan out, with what came next and why the rest was rejected."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from meshwright import InfeasibleError, InputError
from meshwright.cost_models.estimate import Estimate
from meshwright.cost_models.framework import Framework, refuse_dtypes
from meshwright.cost_models.margin import MemoryMargin, margin_of
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.step import assumptions, estimate_batch
from meshwright.cost_models.strategy import REASONS, ConfigBatch, ParallelConfig, Reason
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload
from meshwright.planner.bounds import Bounds
from meshwright.planner.exhaustive import EXHAUSTIVE, Ranking, Scored, rank
from meshwright.planner.nothing_fits import nothing_recommended
from meshwright.planner.plan import Plan, RejectedCount, SearchReport, default_stages
from meshwright.planner.pruned import Pruned
from meshwright.planner.reasons import SENTENCES, why_illegal
from meshwright.planner.space import Space, legal_space
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.model import ModelSpec

WHOLE = 2000  # spaces up to so many legal configs are scored whole, which is as fast as ruling most of them out


@dataclass(frozen=True, slots=True)
class Search:
    """A finished search: of the legal space at least one config is recommended, and the best of all are known."""

    model: ModelSpec
    workload: Workload
    cluster: ClusterProfile
    framework: Framework
    margin: MemoryMargin | None
    space: Space
    scored: Scored
    started: float  # time.perf_counter() at its start

    @property
    def ranking(self) -> Ranking:
        """What was scored."""
        return self.scored.ranking

    def plan(self, top: int = 10) -> Plan:
        """The best plan, its report naming the next ``top - 1`` and the Pareto front of time and memory."""
        scored = self._with(max(top, 1))
        ranking = scored.ranking
        best = ranking.estimates(ranking.best(max(top, 1)))
        report = SearchReport(
            method=scored.method,
            num_legal=self.space.num_legal,
            num_scored=scored.num_scored,
            num_too_slow=scored.num_too_slow,
            num_too_large=scored.num_too_large,
            num_feasible=len(ranking.order),
            rejected=(*self.space.rejected, *scored.unfit),
            runners_up=best[1:],
            pareto=ranking.estimates(ranking.pareto()),
            optimality_gap=0.0,
            seconds=time.perf_counter() - self.started,
        )
        return self._as_plan(best[0], report)

    def candidates(self, count: int) -> tuple[Plan, ...]:
        """The ``count`` best plans in order (fewer when fewer are recommended), each without a report."""
        ranking = self._with(count).ranking
        return tuple(self._as_plan(each, None) for each in ranking.estimates(ranking.best(count)))

    def _with(self, count: int) -> Scored:
        """The same search, or one that knows so many of the best."""
        if count <= self.scored.wanted:
            return self.scored
        return scored_best(
            self.space, self.model, self.workload, self.cluster, self.framework, margin=self.margin, wanted=count
        )

    def _as_plan(self, estimate: Estimate, report: SearchReport | None) -> Plan:
        return _plan(estimate, self.model, self.workload, self.cluster, self.framework, report, margin=self.margin)


def search(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    *,
    framework: str | Framework = "meshwright",
    constraints: Mapping[str, Any] | None = None,
    memory_margin: float | None = None,
    gpus: int | None = None,
    wanted: int = 10,
    on_progress: Callable[[str], None] = lambda words: None,
) -> Search:
    """Find the ``wanted`` best of all that is legal on ``gpus`` devices (default: all of the cluster).

    A small space is scored whole; of a larger one what can be proven to be slower, or too large, is not scored
    (``planner.pruned``): the best are the same. ``constraints`` fixes fields of the config (``{"tp": 8}``);
    ``memory_margin`` stands in for the target's own share (``cost_models.margin``), and with 0 what fits is enough.
    ``on_progress`` is told what a longer search is at.

    Raises:
        InputError: a constraint, the margin or ``gpus`` makes no sense for this cluster, or a rate is not known.
        InfeasibleError: nothing is legal (with the counts by reason), or nothing fits or is recommended (with the
            nearest miss).
    """
    started = time.perf_counter()
    target = framework_named(framework) if isinstance(framework, str) else framework
    margin = margin_of(target, memory_margin)
    check_length(model, workload)
    refuse_dtypes(target, workload)
    num_devices = whole_nodes(cluster, gpus)
    space = legal_space(model, workload, num_devices, target, constraints)
    if not space.num_legal:
        raise InfeasibleError(_nothing_legal(model, num_devices, space))
    scored = scored_best(space, model, workload, cluster, target, margin=margin, wanted=wanted, on_progress=on_progress)
    if not len(scored.ranking.order):
        raise InfeasibleError(nothing_recommended(scored, margin, constraints or {}))
    return Search(
        model=model,
        workload=workload,
        cluster=cluster,
        framework=target,
        margin=margin,
        space=space,
        scored=scored,
        started=started,
    )


def scored_best(
    space: Space,
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    *,
    margin: MemoryMargin | None,
    wanted: int,
    on_progress: Callable[[str], None] = lambda words: None,
) -> Scored:
    """Score what may be among the ``wanted`` best of a space; where nothing is recommended, what is nearest."""
    scorer = partial(_score, model, workload, cluster, framework)
    if space.num_legal <= WHOLE:
        ranking = rank(space.batch, partial(scorer, tells_waits=False), margin=margin)
        ranking = replace(ranking, scorer=scorer)  # the few that are shown, with everything told
        return Scored(
            ranking=ranking,
            method=EXHAUSTIVE,
            wanted=space.num_legal,
            num_scored=space.num_legal,
            unfit=_without_memory(ranking),
        )
    bounds = Bounds(model, workload, cluster, framework)
    return Pruned(space, bounds, margin, wanted, on_progress).run(scorer)


def make_plan(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    *,
    framework: str | Framework = "meshwright",
    constraints: Mapping[str, Any] | None = None,
    top: int = 10,
    memory_margin: float | None = None,
    gpus: int | None = None,
) -> Plan:
    """The fastest recommended plan, with the ``top - 1`` next in its report.

    Recommended is what fits with a margin for what predictions of memory have been seen to miss (``Plan.memory_margin``
    says how much and from what); ``memory_margin`` is another share (0 up to 1) to keep in its place, and with 0 what
    fits is enough. ``framework`` is what will run the plan; ``constraints`` fixes fields of the config (``{"tp": 8}``);
    ``gpus`` takes that many devices, whole nodes, instead of all.

    Raises:
        InputError: a constraint, the margin, the framework or ``gpus`` makes no sense here, or a rate is not known.
        InfeasibleError: nothing is legal (with the counts by reason), or nothing fits or is recommended (with the
            nearest miss).
    """
    found = search(
        model,
        workload,
        cluster,
        framework=framework,
        constraints=constraints,
        memory_margin=memory_margin,
        gpus=gpus,
        wanted=top,
    )
    return found.plan(top)


def plan_for(
    config: ParallelConfig,
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    *,
    framework: str | Framework = "meshwright",
    memory_margin: float | None = None,
) -> Plan:
    """The plan of a given config, priced; also when it does not fit (``plan.memory.headroom_bytes`` is negative then).

    ``memory_margin`` is as in ``make_plan``; it only says what is recommended (``planner.summary``).
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
    return _plan(estimate, model, workload, cluster, target, None, margin=margin_of(target, memory_margin))


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
    margin: MemoryMargin | None,
) -> Plan:
    config = estimate.config
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
        memory_margin=margin,
        search=report,
        assumptions=assumptions(model, workload, cluster, framework),
    )


def _without_memory(ranking: Ranking) -> tuple[RejectedCount, ...]:
    """What does not fit, and what fits without the margin."""
    fits = int(ranking.fits.sum())
    counts = {
        Reason.OUT_OF_MEMORY: len(ranking.batch) - fits,
        Reason.MEMORY_MARGIN: fits - len(ranking.order),
    }
    return tuple(RejectedCount(reason=reason, count=count) for reason, count in counts.items() if count)


def _nothing_legal(model: ModelSpec, num_devices: int, space: Space) -> str:
    counts = sorted(space.rejected, key=lambda rejected: (-rejected.count, REASONS.index(rejected.reason)))
    reasons = "; ".join(f"{each.count:,} because {SENTENCES[each.reason]}" for each in counts)
    return f"no legal way to split {model.name} over {num_devices} devices: of {space.num_candidates:,} ways, {reasons}"
