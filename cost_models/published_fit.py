"""One fit of all constants of devices, links and targets on published runs, for ``benchmarks/calibrate_presets.py``.

Which constants are fitted stands here, with what each starts from; none belongs to a family, a model or a run.

* **Runs.** Dense, cp = 1, with a measured step. Of nanotron not those that may have run either of two versions of its
  pipeline code (``mixed``), which no column tells apart.
* **Weights.** The ``n`` runs of a family on one node, and those on several, count together as ``CAP n / (n + FEW)``
  runs: two families, three quarters of the table, do not decide alone about devices that they share with others, and
  few precise runs count more than once each.
* **Priors.** What the presets say before any fit, bandwidths that were measured staying close, and one guess for the
  host of every target (``STARTS``).
* **Sharing.** Devices of one chip share their factors, but for a lower power limit; a version of a target shares those
  of the target (``Framework.version_of``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.calibration import Fit, fit
from meshwright.cost_models.constants import Owner, Value, on_cluster, on_framework, value_on
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.published import Group, PublishedRun, grouped, predict
from meshwright.cost_models.published_hardware import cluster_named
from meshwright.cost_models.targets import ASSUMED
from meshwright.profiler.cluster import ClusterProfile, Device, LinkTier, Provenance
from meshwright.profiler.cluster_presets import calibrated_figures, uncalibrated_figure

FloatArray = NDArray[np.float64]
Progress = Callable[[str], None]

CAP, FEW = 60.0, 4.0
MIN_RUNS = 8  # a published table tells nothing of a constant that fewer touch
MIN_TOLD = 0.25  # below it the runs say so little of a constant that it stays as assumed

# devices of one chip; the first one names it
CHIPS: tuple[tuple[str, ...], ...] = (
    ("A100-SXM4-80GB", "A100-SXM4-40GB"),
    ("H100-SXM5-80GB", "H200-SXM5-141GB", "H100-SXM5-96GB-500W"),
    ("GB200-186GB", "B200-SXM-180GB"),
    ("GB300-279GB", "B300-SXM-270GB"),
    ("V100-SXM3-32GB", "V100-SXM2-32GB", "V100-SXM2-16GB"),
)
ALONE = {("H100-SXM5-96GB-500W", "matmul_factor")}  # its power limit is lower than its chip's
DEVICE = ("matmul_factor", "attention_factor", "memory_factor", "communication_slowdown", "variation")
LINK = ("bytes_per_s",)  # steps tell nothing of latency and congestion beside what tables of collectives tell

_ANY = (
    "host.launch_factor",
    "host.run_ahead",
    "host.collective_s",
    "host.microbatch_s",
    "host.step_s",
    "pointwise_factor",
    "dp_factor",
)
_OVERLAPS = ("overlap_dp_reduce", "overlap_dp_gather")
TARGET: Mapping[str, tuple[str, ...]] = {
    "megatron-deepspeed": (*_ANY, "host.skew_s", "matmul_factor"),
    "megatron-lm": (*_ANY, "host.hop_s", "matmul_factor"),
    "megatron-lm-2021": ("pointwise_factor",),
    "megatron-lm-2022": ("pointwise_factor",),
    "megatron-bridge": (*_ANY, *_OVERLAPS, "overlap_tp"),
    "nanotron": (  # its kernels are counted one by one
        "host.launch_factor",
        "host.run_ahead",
        "host.collective_s",
        "host.step_s",
        "dp_factor",
        "host.hop_s",
        "host.pipelined_collective_s",
        "matmul_factor",
        "overlap_tp",
        "overlap_dp_reduce",
        "overlap_dp_scatter",
    ),
    "nanotron-2024": ("host.hop_s", "host.checked_collective_s"),
    "torchtitan": (*_ANY, *_OVERLAPS, "row_scaled_factor"),
    "torchtitan-async-tp": ("overlap_tp",),
    "llm-foundry": (*_ANY, *_OVERLAPS, "hopper_factor"),
    "internevo": (*_ANY, *_OVERLAPS),
}
# what a fit starts from, the same for every target: the order of magnitude of Python around kernels. What overlaps is a
# fact about a target's code, which its record tells.
STARTS: dict[str, float] = {
    "host.launch_factor": 6.0,
    "host.run_ahead": 8.0,
    "host.collective_s": 5e-5,
    "host.pipelined_collective_s": 1e-4,
    "host.microbatch_s": 1e-3,
    "host.step_s": 1e-2,
    "host.hop_s": 1e-4,
    "pointwise_factor": 1.0,
    "dp_factor": 1.0,
    "hopper_factor": 1.0,
    "row_scaled_factor": 1.3,
}
# the older code of nanotron waits tenths of a second where others wait not at all
OLD_STARTS: dict[str, float] = {"host.hop_s": 0.1, "host.checked_collective_s": 1e-4}
MEASURED_SPREAD = 1.05


def fitted_on(runs: Iterable[PublishedRun]) -> tuple[PublishedRun, ...]:
    """The runs that constants are fitted on."""
    return tuple(run for run in runs if run.scope == "dense" and run.measured.step_s and not mixed(run))


def mixed(run: PublishedRun) -> bool:
    """Whether a run may have used either version of nanotron's pipeline code: see ``target_megatron.NANOTRON_2024``.

    Pipelines on 32 nodes, and those without ZeRO: the same configuration stands there twice, up to five times apart.
    """
    config = run.config
    return (
        run.framework == "nanotron"
        and config.pp > 1
        and (256 <= run.num_gpus < 512 or (config.zero_stage == 0 and config.dp > 1 and run.num_gpus < 512))
    )


@dataclass(frozen=True, slots=True)
class Prior:
    """A constant before the fit, and how far it may lie from there."""

    value: Value
    spread: float
    upper: float


def expanded(values: Iterable[Value]) -> tuple[Value, ...]:
    """Values with a chip's on each of its devices."""
    own = {(each.of, each.name) for each in values if each.owner == "device"}
    result = []
    for each in values:
        chip = next((kinds for kinds in CHIPS if each.owner == "device" and kinds[0] == each.of), (each.of,))
        result += [replace(each, of=kind) for kind in chip if kind == each.of or (kind, each.name) not in own]
    return tuple(result)


class Problem:
    """Runs to fit on, and the constants that ``min_runs`` of them or more touch."""

    def __init__(self, runs: Sequence[PublishedRun], *, min_runs: int = 1) -> None:
        self.runs = tuple(runs)
        self.groups = grouped(self.runs)
        every = tuple(self._priors())
        self.priors = every  # which constants there are decides which runs each touches
        touched = [self._touched(prior.value) for prior in every]
        kept = [sum(len(group.positions) for group in groups) >= min_runs for groups in touched]
        self.priors = tuple(prior for prior, keep in zip(every, kept, strict=True) if keep)
        self.touched = [groups for groups, keep in zip(touched, kept, strict=True) if keep]

    @cached_property
    def measured_s(self) -> FloatArray:
        """Seconds of each run."""
        return np.array([run.measured.step_s for run in self.runs], dtype=np.float64)

    @cached_property
    def weights(self) -> FloatArray:
        """Of each run's loss: see above."""
        parts = [(run.family, run.num_nodes > 1) for run in self.runs]
        counts = Counter(parts)
        return np.array([CAP / (counts[part] + FEW) for part in parts])

    @cached_property
    def clusters(self) -> dict[str, ClusterProfile]:
        """By name, as they are before any calibration."""
        names = {group.cluster for group in self.groups}
        return {name: uncalibrated_cluster(name) for name in sorted(names)}

    def _priors(self) -> Iterator[Prior]:
        used = {group.framework for group in self.groups}
        used |= {ASSUMED[name].version_of for name in used}
        for target in sorted(used & set(TARGET)):
            for name in TARGET[target]:
                yield _target_prior(ASSUMED[target], name)
        seen: set[tuple[str, str]] = set()
        for cluster in self.clusters.values():
            chip = next((kinds for kinds in CHIPS if cluster.device.kind in kinds), (cluster.device.kind,))
            for kind in {chip[0], cluster.device.kind}:
                names = [n for n in DEVICE if ("device", kind) not in seen and (kind == chip[0] or (kind, n) in ALONE)]
                seen |= {("device", kind)}
                yield from (_prior("device", kind, name, cluster.device) for name in names)
            for tier in cluster.tiers:
                if ("link", tier.kind) not in seen:
                    seen |= {("link", tier.kind)}
                    yield from (_prior("link", tier.kind, name, tier) for name in LINK if getattr(tier, name) > 0)

    def _touched(self, value: Value) -> tuple[Group, ...]:
        if value.owner == "target":
            return tuple(
                group
                for group in self.groups
                if value.of == group.framework
                or (
                    value.of == ASSUMED[group.framework].version_of
                    and value.name not in ASSUMED[group.framework].differs_in
                )
            )
        kinds = {each.of for each in expanded((value,))}
        owned = {(prior.value.of, prior.value.name) for prior in self.priors} - {(value.of, value.name)}
        kinds = {kind for kind in kinds if (kind, value.name) not in owned}
        found = {
            name
            for name, cluster in self.clusters.items()
            if kinds & ({cluster.device.kind} if value.owner == "device" else {tier.kind for tier in cluster.tiers})
        }
        return tuple(group for group in self.groups if group.cluster in found)

    def predict(self, values: tuple[Value, ...], groups: Sequence[Group] | None = None) -> FloatArray:
        """Seconds of each run; NaN for those that are not in ``groups``."""
        clusters, frameworks = resolvers(values, self.clusters.__getitem__)
        result = np.full(len(self.runs), np.nan)
        for group in self.groups if groups is None else groups:
            alone = replace(group, positions=np.arange(len(group.positions)))
            result[group.positions] = predict([alone], clusters, frameworks).step_s
        return result


def resolvers(
    values: tuple[Value, ...], clusters: Callable[[str], ClusterProfile]
) -> tuple[Callable[[str], ClusterProfile], Callable[[str], Framework]]:
    """Names of clusters and of targets -> the same with ``values``, as ``published.predict`` wants them."""
    every = expanded(values)
    return cache(lambda name: on_cluster(clusters(name), every)), cache(lambda name: on_framework(ASSUMED[name], every))


def uncalibrated_cluster(name: str) -> ClusterProfile:
    """The cluster of ``published_hardware.cluster_named`` before any calibration."""
    values = tuple(
        Value(owner=owner, of=of, name=name, value=uncalibrated_figure(owner, of, name))
        for owner, of, name, _ in calibrated_figures()
    )
    return on_cluster(cluster_named(name), values)


def _target_prior(target: Framework, name: str) -> Prior:
    starts = STARTS | (OLD_STARTS if target.name == "nanotron-2024" else {})
    value = starts[name] if name in starts else value_on("target", name, target)
    found = Value(owner="target", of=target.name, name=name, value=value)
    return Prior(found, found.constant.spread, found.constant.upper)


def _prior(owner: Owner, of: str, name: str, record: Device | LinkTier) -> Prior:
    found = Value(owner=owner, of=of, name=name, value=value_on(owner, name, record))
    spread, upper = found.constant.spread, found.constant.upper
    if isinstance(record, LinkTier):
        if record.source.provenance is Provenance.MEASURED:
            spread = MEASURED_SPREAD
        if name == "bytes_per_s" and record.peak_bytes_per_s:
            upper = 0.97 * record.peak_bytes_per_s
    return Prior(found, spread, upper)


def polished(
    problem: Problem,
    values: Sequence[Value],
    *,
    only: Sequence[str] = (),
    max_evaluations: int = 10,
    on_progress: Progress = lambda text: None,
) -> tuple[Value, ...]:
    """The same loss, minimised owner by owner from ``values`` on: each target's constants alone, then each device's.

    ``only`` names the owners, where not all. A search in a hundred directions at once creeps where one in ten does not;
    priors and weights are the problem's.
    """
    now = list(values)
    blocks: dict[tuple[str, str], list[int]] = {}
    for place, prior in enumerate(problem.priors):
        of = prior.value.of
        if prior.value.owner == "target":
            of = ASSUMED[of].version_of or of
        if prior.value.owner != "link":
            blocks.setdefault((prior.value.owner, of), []).append(place)
    for (owner, of), places in sorted(blocks.items(), reverse=True):  # targets first
        if only and of not in only:
            continue
        groups = tuple({id(group): group for place in places for group in problem.touched[place]}.values())
        rows = np.concatenate([group.positions for group in groups])

        def predict_rows(
            moved: tuple[Value, ...],
            places: list[int] = places,
            groups: tuple[Group, ...] = groups,
            rows: NDArray[np.int64] = rows,
        ) -> FloatArray:
            every = list(now)
            for place, value in zip(places, moved, strict=True):
                every[place] = value
            return problem.predict(tuple(every), groups)[rows]

        found = fit(
            predict_rows,
            problem.measured_s[rows],
            [problem.priors[place].value for place in places],
            problem.weights[rows],
            max_evaluations,
            spreads=[problem.priors[place].spread for place in places],
            uppers=[problem.priors[place].upper for place in places],
            start=[now[place].value for place in places],
        )
        for place, value, told in zip(places, found.values, found.told, strict=True):
            kept = value if told >= MIN_TOLD else problem.priors[place].value
            now[place] = replace(kept, value=float(f"{kept.value:.4g}"))
        on_progress(f"{owner} {of}: {len(places)} constants, median error {np.median(np.abs(found.after)):.1%}")
    return tuple(now)


# -- over processes ---------------------------------------------------------------------------------------------------

_problem: Problem | None = None  # of a forked worker


def _column(values: tuple[Value, ...], index: int, moved: Value) -> FloatArray:
    assert _problem is not None
    return _problem.predict((*values[:index], moved, *values[index + 1 :]), _problem.touched[index])


@contextmanager
def _workers(problem: Problem, num_workers: int) -> Iterator[ProcessPoolExecutor]:
    global _problem
    _problem = problem
    with ProcessPoolExecutor(num_workers, mp_context=get_context("fork")) as pool:
        yield pool


def joint_fit(
    problem: Problem,
    *,
    start: Iterable[Value] = (),
    num_workers: int = 2,
    max_evaluations: int = 12,
    on_progress: Progress = lambda text: None,
) -> Fit:
    """All constants of a problem at once; those that the runs tell less of than ``MIN_TOLD`` stay at their priors.

    ``start`` is where to search from, priors elsewhere; it does not change what is minimised.
    One process predicts all runs, ``num_workers`` what changes with each constant.
    """
    priors = tuple(prior.value for prior in problem.priors)
    known = {(each.owner, each.of, each.name): each.value for each in start}
    with _workers(problem, num_workers) as pool:
        count = 0

        def each(values: tuple[Value, ...], moved: tuple[Value, ...]) -> FloatArray:
            nonlocal count
            count += 1
            now = problem.predict(values)
            error = np.abs(now / problem.measured_s - 1.0)
            on_progress(f"round {count}: {len(moved)} constants, median error {np.median(error):.1%}")
            columns = pool.map(_column, [values] * len(moved), range(len(moved)), moved)
            return np.array([np.where(np.isnan(column), now, column) for column in columns])

        found = fit(
            problem.predict,
            problem.measured_s,
            priors,
            problem.weights,
            max_evaluations,
            spreads=[prior.spread for prior in problem.priors],
            uppers=[prior.upper for prior in problem.priors],
            start=[known.get((prior.owner, prior.of, prior.name), prior.value) for prior in priors],
            predict_each=each,
        )
    informed = found.told >= MIN_TOLD
    pairs = zip(found.values, priors, informed, strict=True)
    values = tuple(
        replace(after if tells else before, value=float(f"{(after if tells else before).value:.4g}"))
        for after, before, tells in pairs
    )
    error = problem.predict(values) / problem.measured_s - 1.0
    return Fit(values, found.before, error, found.told, found.loss)
