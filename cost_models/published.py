"""Published runs: rows of a table of measurements -> what Meshwright would predict for them.

``read_published`` translates, ``grouped`` puts runs together that one call of ``estimate_batch`` can price, and
``predict`` prices them; names of clusters and targets are resolved then, so that the same runs can be priced again on
changed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.margin import margin_of, needed_bytes
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.published_config import config_of
from meshwright.cost_models.published_hardware import cluster_named, cluster_of, target_of
from meshwright.cost_models.published_measured import Measured, measured_of
from meshwright.cost_models.published_model import model_of, packed, workload_of
from meshwright.cost_models.published_rows import Malformed, Row, read_rows
from meshwright.cost_models.published_stages import Counts, counts_of
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.record import record

# what a plan is compared within: the columns of a cell
CELL = (
    "family", "model", "layers", "kv_heads", "num_gpus", "gpu_type", "framework", "seq_len", "global_batch", "precision"
)  # fmt: skip


@record
class PublishedRun:
    """One row that can be predicted, with what it took in reality."""

    row_id: str
    family: str
    model: ModelSpec
    workload: Workload
    cluster: str  # a name for published_hardware.cluster_named
    framework: str  # a target's name
    config: ParallelConfig
    placement: Placement = Placement()
    counts: Counts | None = None  # blocks of each stage where they are not the target's default
    scope: str = "dense"  # dense, moe or cp: rows with experts or cp > 1 are scored apart
    num_gpus: int
    status: str = "ok"  # ok, oom, failed_unspecified, memory_only, incomplete
    measured: Measured = Measured()
    cell: tuple[str, ...]
    plan: str = ""  # the schedule as published: two that we cannot tell apart are still two plans
    notes: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        """Nodes of the cluster it ran on; ``1`` also for a part of a node."""
        return int(self.cluster.rpartition(":")[2].partition("x")[0])

    @property
    def has_measurement(self) -> bool:
        """Whether the source says that it ran, and how: blank columns of a row to be predicted say nothing."""
        return self.measured != Measured()

    @property
    def measured_step_s(self) -> float | None:
        """Seconds of a step, ``None`` where the source does not give them for a whole configuration."""
        return self.measured.step_s

    @property
    def measured_peak_bytes(self) -> float | None:
        """Bytes at the peak of the fullest device, as published."""
        return self.measured.peak_bytes


@dataclass(frozen=True, slots=True)
class Published:
    """Rows as runs, and the others as ``(row_id, family, reason)``; ``row_ids`` is the order of the table."""

    row_ids: tuple[str, ...]
    runs: tuple[PublishedRun, ...]
    skipped: tuple[tuple[str, str, str], ...]

    def only(self, family: str) -> Published:
        """The rows of one family. Raises ``InputError`` naming the families there are."""
        runs = tuple(run for run in self.runs if run.family == family)
        skipped = tuple(entry for entry in self.skipped if entry[1] == family)
        if not runs and not skipped:
            known = sorted({run.family for run in self.runs} | {entry[1] for entry in self.skipped})
            raise InputError(f"no row of family {family!r}: there are {', '.join(known)}")
        kept = {run.row_id for run in runs} | {entry[0] for entry in skipped}
        return Published(tuple(row_id for row_id in self.row_ids if row_id in kept), runs, skipped)


def read_published(path: str | Path) -> Published:
    """Translate every row of a table. Raises ``InputError`` for a file that is not such a table."""
    runs, skipped = [], []
    rows = read_rows(path)
    for row in rows:
        try:
            runs.append(run_of(row))
        except Malformed:
            raise
        except InputError as reason:  # beside Skip: sizes that contradict each other, as the records find them
            skipped.append((row.text("id"), row.text("family"), str(reason)))
    return Published(tuple(row.text("id") for row in rows), tuple(runs), tuple(skipped))


def run_of(row: Row) -> PublishedRun:
    """One row as a run. Raises ``Skip``, or another ``InputError``, with the reason where it cannot be predicted."""
    framework = target_of(row)
    cluster, cluster_notes = cluster_of(row)
    model, model_notes = model_of(row)
    workload, workload_notes = workload_of(row)
    config, config_notes = config_of(row, model, workload, framework)
    trained, packed_notes = packed(row, model)
    return PublishedRun(
        row_id=row.text("id"),
        family=row.text("family"),
        model=trained,
        workload=workload,
        cluster=cluster,
        framework=framework,
        config=config,
        counts=counts_of(row, model, config, framework_named(framework), workload.seq_len),
        scope="moe" if model.moe else "cp" if config.cp > 1 else "dense",
        num_gpus=config.world_size,
        status=row.text("status") or "ok",
        measured=measured_of(row, model, workload, config, cluster),
        cell=tuple(row.text(name) for name in CELL),
        plan=row.text("schedule"),
        notes=(*cluster_notes, *model_notes, *packed_notes, *workload_notes, *config_notes),
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their config alone: ``positions`` are theirs in the sequence that was grouped."""

    model: ModelSpec
    workload: Workload
    cluster: str
    framework: str
    placement: Placement
    batch: ConfigBatch
    counts: NDArray[np.float64] | None
    positions: NDArray[np.int64]


def grouped(runs: Iterable[PublishedRun]) -> tuple[Group, ...]:
    """Runs by all but their config, and by schedule: one that has no cost model should not take others with it."""
    keys: dict[tuple[object, ...], list[int]] = {}
    runs = list(runs)
    for position, run in enumerate(runs):
        key = (id(run.model), run.workload, run.cluster, run.framework, run.placement, run.counts, run.config.schedule)
        keys.setdefault(key, []).append(position)
    groups = []
    for positions in keys.values():
        first = runs[positions[0]]
        batch = ConfigBatch.from_configs(runs[position].config for position in positions)
        groups.append(
            Group(
                first.model,
                first.workload,
                first.cluster,
                first.framework,
                first.placement,
                batch,
                None if first.counts is None else np.array(first.counts, dtype=np.float64),
                np.array(positions, dtype=np.int64),
            )
        )
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class Predictions:
    """One entry a run, in the order of the runs: NaN, 0 and a reason where the model has no answer.

    ``recommended`` is with the margin of the run's target.
    """

    step_s: NDArray[np.float64]
    peak_bytes: NDArray[np.int64]
    fragmentation_bytes: NDArray[np.int64]
    fits: NDArray[np.bool_]
    recommended: NDArray[np.bool_]
    reasons: tuple[str | None, ...]


def predict(
    groups: Iterable[Group],
    clusters: Callable[[str], ClusterProfile] = cluster_named,
    frameworks: Callable[[str], Framework] = framework_named,
    on_group: Callable[[Group], None] | None = None,
) -> Predictions:
    """Price every run of ``groups``; names are resolved now, and no config is refused that a published run had."""
    groups = tuple(groups)
    size = sum(len(group.positions) for group in groups)
    step, peak, on_top = np.full(size, np.nan), np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    fits, recommended = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
    reasons: list[str | None] = [None] * size
    for group in groups:
        try:
            framework = frameworks(group.framework)
            found = estimate_batch(
                group.model,
                group.workload,
                clusters(group.cluster),
                framework,
                group.batch,
                group.placement,
                group.counts,
                tells_waits=False,
            )
        except InputError as error:
            for position in group.positions:
                reasons[position] = str(error)
        else:
            step[group.positions], peak[group.positions] = found.step_s, found.peak_bytes
            on_top[group.positions], fits[group.positions] = found.fragmentation_bytes, found.fits
            needed = needed_bytes(found.peak_bytes, found.fragmentation_bytes, margin_of(framework))
            recommended[group.positions] = needed <= found.capacity_bytes - found.reserved_bytes
        if on_group:
            on_group(group)
    return Predictions(step, peak, on_top, fits, recommended, tuple(reasons))
