"""Published runs: rows of a table of measurements -> what Meshwright would predict for them.

``read_published`` translates, ``grouped`` puts runs together that one call of ``estimate_batch`` can price, and
``predict`` prices them; names of clusters and targets are resolved then, so that the same runs can be priced again on
changed ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.published_hardware import cluster_named, cluster_of, target_of
from meshwright.cost_models.published_model import model_of, workload_of
from meshwright.cost_models.published_rows import Row, Skip, read_rows
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute, Schedule
from meshwright.cost_models.targets import FRAMEWORKS, MESHWRIGHT
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.record import record
from meshwright.profiler.units import GIB

# what a plan is compared within: the columns of a cell
CELL = (
    "family", "model", "layers", "kv_heads", "num_gpus", "gpu_type", "framework", "seq_len", "global_batch", "precision"
)  # fmt: skip

# targets that cut activations by sequence whenever tp > 1, where a source does not say
SEQUENCE_PARALLEL = ("nanotron", "megatron-bridge", "torchtitan", "meshwright")


@record
class PublishedRun:
    """One row that can be predicted. ``measured_*`` are ``None`` where the source does not have them."""

    row_id: str
    family: str
    model: ModelSpec
    workload: Workload
    cluster: str  # a name for published_hardware.cluster_named
    framework: str  # a target's name
    config: ParallelConfig
    placement: Placement = Placement()
    counts: tuple[tuple[tuple[float, ...], ...], ...] | None = None  # blocks by stage, chunk and kind, where published
    scope: str = "dense"  # dense, moe or cp: rows with experts or cp > 1 are scored apart
    num_gpus: int
    status: str = "ok"  # ok, oom, failed_unspecified, memory_only, incomplete
    measured_step_s: float | None = None
    measured_flops_per_s: float | None = None  # of one GPU, in the source's own count
    measured_mfu: float | None = None
    measured_peak_bytes: float | None = None
    cell: tuple[str, ...]
    dup_group: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Published:
    """Rows as runs, and the others as ``(row_id, family, reason)``; both in the order of the table."""

    runs: tuple[PublishedRun, ...]
    skipped: tuple[tuple[str, str, str], ...]


def read_published(path: str | Path) -> Published:
    """Translate every row of a table. Raises ``InputError`` for a file that is not such a table."""
    runs, skipped = [], []
    for row in read_rows(path):
        try:
            runs.append(run_of(row))
        except Skip as reason:
            skipped.append((row.text("id"), row.text("family"), str(reason)))
    return Published(tuple(runs), tuple(skipped))


def run_of(row: Row) -> PublishedRun:
    """One row as a run. Raises ``Skip`` with the reason where it cannot be predicted."""
    framework = target_of(row)
    cluster, cluster_notes = cluster_of(row)
    model, model_notes = model_of(row)
    workload, workload_notes = workload_of(row)
    config, config_notes = config_of(row, model, workload, framework)
    step = row.number("step_time_s_derived") or row.number("step_time_s")
    peak, mfu, tflops = row.number("peak_mem_gb"), row.number("mfu_pct"), row.number("tflops_per_gpu")
    return PublishedRun(
        row_id=row.text("id"),
        family=row.text("family"),
        model=model,
        workload=workload,
        cluster=cluster,
        framework=framework,
        config=config,
        scope="moe" if model.moe else "cp" if config.cp > 1 else "dense",
        num_gpus=config.world_size,
        status=row.text("status") or "ok",
        measured_step_s=step if _usable(row, "time") else None,
        measured_flops_per_s=tflops * 1e12 if tflops else None,
        measured_mfu=mfu / 100 if mfu else None,
        measured_peak_bytes=peak * GIB if peak else None,
        cell=tuple(row.text(name) for name in CELL),
        dup_group=row.text("dup_group"),
        source=row.text("source_path"),
        notes=(*cluster_notes, *model_notes, *workload_notes, *config_notes),
    )


def _usable(row: Row, what: str) -> bool:
    said = row.text("usable_for")
    return not said or any(word.startswith(what) for word in said.split(";"))


def config_of(row: Row, model: ModelSpec, workload: Workload, framework: str) -> tuple[ParallelConfig, tuple[str, ...]]:
    """How the run was split, and what had to be assumed. Raises ``Skip``."""
    notes: list[str] = []
    tp, pp, dp, cp = (row.integer(name, 1) for name in ("tp", "pp", "dp", "cp"))
    if tp * pp * dp * cp != row.integer("num_gpus"):
        raise Skip(f"tp*cp*pp*dp={tp * pp * dp * cp} is not num_gpus={row.integer('num_gpus')}")
    ep = row.integer("ep", 1) if model.moe else 1
    etp = row.integer("etp", tp if (dp * cp) % ep == 0 else 1) if model.moe else 1
    if (dp * cp * tp) % (ep * etp):
        raise Skip(f"ep*etp={ep * etp} does not divide dp*cp*tp={dp * cp * tp}")
    micro, micro_notes = _micro_batch(row, dp)
    if workload.global_batch_size % (dp * micro):
        raise Skip(f"dp*micro_batch={dp * micro} does not divide global_batch={workload.global_batch_size}")
    schedule, vpp, schedule_notes = _schedule(row, pp, model.num_layers)
    stage, shard = _sharding(row, dp * cp)
    recompute = row.text("recompute").lower()
    if not recompute:
        notes.append("recompute not published: none assumed")
    sp = row.text("sp").lower()
    if tp > 1 and not sp:
        notes.append(f"sequence parallelism not published: {framework}'s own")
    kinds = {"full": Recompute.FULL, "none": Recompute.NONE, "": Recompute.NONE}
    config = ParallelConfig(
        tp=tp,
        cp=cp,
        pp=pp,
        dp=dp,
        ep=ep,
        etp=etp,
        vpp=vpp,
        cp_ring=cp,
        dp_shard=shard,
        micro_batch_size=micro,
        zero_stage=stage,
        sequence_parallel=tp > 1 and (sp == "true" if sp else framework in SEQUENCE_PARALLEL),
        vocab_parallel=tp > 1,
        schedule=schedule,
        recompute=kinds.get(recompute, Recompute.SELECTIVE),
    )
    return config, (*notes, *micro_notes, *schedule_notes)


def _micro_batch(row: Row, dp: int) -> tuple[int, tuple[str, ...]]:
    if row.number("micro_batch") is not None:
        return row.integer("micro_batch"), ()
    if row.number("grad_accum") is not None:
        share, left = divmod(row.integer("global_batch"), dp * row.integer("grad_accum"))
        if share and not left:
            return share, ()
    return 1, ("micro batch not published: 1 assumed",)


def _schedule(row: Row, pp: int, num_layers: int) -> tuple[Schedule, int, tuple[str, ...]]:
    said, vpp = row.text("schedule").lower(), row.integer("vpp", 1)
    if pp == 1:
        return Schedule.ONE_F_ONE_B, 1, ()
    if "2p" in said and "zb" in said:
        raise Skip("no model of the schedule ZB-2p")
    if "dualpipe" in said or "zb-v" in said or "zbv" in said:
        raise Skip(f"no model of the schedule {row.text('schedule')}")
    if "custom" in said:
        raise Skip(f"no model of the schedule {row.text('schedule')}")
    if "zb" in said:
        return Schedule.ZB_H1, 1, ()
    notes: tuple[str, ...] = ()
    if row.number("vpp") is None:
        only = "interleaved" in said and "1f1b/" not in said
        vpp = 2 if only else 1
        notes = (f"vpp not published: {vpp} assumed",)
    if num_layers < pp * vpp:
        raise Skip(f"{num_layers} layers cannot fill pp*vpp={pp * vpp} stages")
    return (Schedule.INTERLEAVED if vpp > 1 else Schedule.ONE_F_ONE_B), vpp, notes


def _sharding(row: Row, ranks: int) -> tuple[int, int]:
    """``zero_stage`` and the ranks of a shard group; a group of one shards nothing."""
    stage = int(row.number("zero_stage") or 0)
    said, notes = row.text("optimizer_sharding").lower(), row.text("notes").lower()
    shard = ranks
    group = re.search(r"over (\d+) gpus|fsdp (\d+)$", said) or re.search(r"fsdp sharding group = (\d+)", notes)
    if group:
        wanted = int(next(text for text in group.groups() if text))
        shard = wanted if wanted > 1 and ranks % wanted == 0 else ranks
    elif "hsdp" in said:
        node = row.integer("gpus_per_node", 8)
        shard = node if ranks % node == 0 else ranks
    return (stage, shard) if stage and shard > 1 else (0, 1)


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their config alone: ``positions`` are theirs in the sequence that was grouped."""

    model: ModelSpec
    workload: Workload
    cluster: str
    framework: str
    placement: Placement
    batch: ConfigBatch
    positions: NDArray[np.int64]


def grouped(runs: Iterable[PublishedRun]) -> tuple[Group, ...]:
    """Runs by (model, workload, cluster, framework, placement), in order of appearance."""
    keys: dict[tuple[object, ...], list[int]] = {}
    runs = list(runs)
    for position, run in enumerate(runs):
        key = (id(run.model), run.workload, run.cluster, run.framework, run.placement, run.counts)
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
                np.array(positions, dtype=np.int64),
            )
        )
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class Predictions:
    """One entry a run, in the order of the runs: NaN, 0 and a reason where the model has no answer."""

    step_s: NDArray[np.float64]
    peak_bytes: NDArray[np.int64]
    fits: NDArray[np.bool_]
    reasons: tuple[str | None, ...]


def framework_or_default(name: str) -> Framework:
    """The target of that name, ``meshwright``'s traits where it is unknown."""
    return FRAMEWORKS.get(name, MESHWRIGHT)


def predict(
    groups: Iterable[Group],
    clusters: Callable[[str], ClusterProfile] = cluster_named,
    frameworks: Callable[[str], Framework] = framework_or_default,
    on_group: Callable[[Group], None] | None = None,
) -> Predictions:
    """Price every run of ``groups``; names are resolved now, and no config is refused that a published run had."""
    groups = tuple(groups)
    size = sum(len(group.positions) for group in groups)
    step, peak = np.full(size, np.nan), np.zeros(size, dtype=np.int64)
    fits, reasons = np.zeros(size, dtype=np.bool_), [None] * size  # type: list[str | None]
    for group in groups:
        try:
            found = estimate_batch(
                group.model,
                group.workload,
                clusters(group.cluster),
                frameworks(group.framework),
                group.batch,
                group.placement,
            )
        except InputError as error:
            for position in group.positions:
                reasons[position] = str(error)
        else:
            step[group.positions], peak[group.positions] = found.step_s, found.peak_bytes
            fits[group.positions] = found.fits
        if on_group:
            on_group(group)
    return Predictions(step, peak, fits, tuple(reasons))
