"""A few real steps of one plan or of several, timed: what a prediction is compared with.

Several plans run in one start of the ranks, a step of each in turn, so that drift of the machine hits all alike. Before
a step all ranks meet at a barrier; the step is forward, backward, clipping and AdamW; it ends when the device has done
it. A step's time is the slowest rank's, a plan's the median over its steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from meshwright import InputError, RunError
from meshwright.executors.measured_rank import COUNTED, BuildModel, MeasuredRank, Sample
from meshwright.executors.spec_model import build_spec_model
from meshwright.planner.plan import Plan
from meshwright.profiler.artifact import to_json
from meshwright.profiler.clock import DeviceClock
from meshwright.profiler.environment import capture_environment
from meshwright.profiler.launch import Rank, RankError, run_ranks
from meshwright.profiler.peers import launcher_ranks, lost_a_peer, silent_ranks
from meshwright.profiler.profile import core_shares
from meshwright.profiler.steps import RankMeasurement, StepMeasurement
from meshwright.profiler.units import format_bytes
from meshwright.profiler.virtual_name import DEVICE_VARIABLE

REPLY_S = 50.0  # how long a rank among a launcher's waits for another before it is taken for dead

OnStep = Callable[[tuple[StepMeasurement, ...]], None]


class UnfinishedRun(RunError):
    """A run that ended early; ``measurements`` are those of the plans with a measured step, by what they had."""

    def __init__(self, message: str, measurements: Sequence[StepMeasurement]) -> None:
        super().__init__(message)
        self.measurements = tuple(measurements)


def measure_plans(
    plans: Sequence[Plan],
    *,
    build_model: BuildModel = build_spec_model,
    steps: int = 10,
    warmup: int = 3,
    device: str = "auto",
    timeout_s: float = 600.0,
    on_step: OnStep | None = None,
) -> tuple[StepMeasurement, ...]:
    """Run ``warmup + steps`` steps of each plan and time the last ``steps``, on random tokens.

    The peak of memory is what the device's allocator says; on a CPU, which has none, tensors are counted during the
    first two of the steps to warm up, if there are two.

    Called on ranks that torchrun or Slurm started, or in a process group, it runs on those, and every rank gets the
    result. Else it starts the ranks on this machine, each kept to its own cores where there are enough. ``build_model``
    makes a plan's model, with the same weights on each rank (seeds are set); ``device`` is ``auto``, ``cpu``, ``cuda``
    or a virtual one such as ``virtual:h100/1000``. ``on_step`` is told all measurements so far after each round, on
    rank 0 or in the parent.

    Raises:
        InputError: the plans are for different numbers of ranks or another than there are, or cannot be run here.
        UnfinishedRun: a rank died or hung; the message names it, what was measured is in ``measurements``.
    """
    worlds = {plan.config.world_size for plan in plans}
    if len(worlds) != 1:
        raise InputError(f"plans measured together must be for one number of ranks, found {sorted(worlds)}")
    if steps < 1 or warmup < 0:
        raise InputError(f"steps must be at least 1 and warmup at least 0, found {steps} and {warmup}")
    num_ranks, device, joined = worlds.pop(), _resolved(device), _ranks_here()
    if joined and joined[1] != num_ranks:
        raise InputError(f"{plans[0].config.describe()} is for {num_ranks} ranks, this run has {joined[1]}")
    _check_host_memory(plans, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if joined else num_ranks)
    record = _Record(plans, on_step if not joined or joined[0] == 0 else None)
    job = (plans, build_model, warmup, steps, device)
    try:
        if joined:
            _join_ranks(joined, device)
            _run(*job, tell=record.add)
        else:
            run_ranks(
                _started,
                num_ranks,
                *job,
                timeout_s=timeout_s,
                backend="nccl" if device == "cuda" else "gloo",
                cores=core_shares(num_ranks) if device == "cpu" else None,
                on_report=lambda rank, row: record.add(*row),
            )
    except RankError as error:
        raise UnfinishedRun(str(error), record.measurements()) from None
    return record.measurements()


class _Record:
    """The samples of all ranks, ``[plan][step][rank]``, turned into measurements."""

    def __init__(self, plans: Sequence[Plan], on_step: OnStep | None) -> None:
        self._plans, self._on_step = plans, on_step
        self._rows: list[list[list[Sample]]] = [[] for _ in plans]

    def add(self, plan: int, row: list[Sample]) -> None:
        self._rows[plan].append(row)
        if self._on_step and plan == len(self._plans) - 1:
            self._on_step(self.measurements())

    def measurements(self) -> tuple[StepMeasurement, ...]:
        pairs = zip(self._plans, self._rows, strict=True)
        return tuple(_measurement(plan, rows) for plan, rows in pairs if rows)


def _measurement(plan: Plan, rows: list[list[Sample]]) -> StepMeasurement:
    slowest = [max(sample.seconds for sample in row) for row in rows]
    low, median, high = (float(value) for value in np.percentile(slowest, [10, 50, 90]))
    ranks = []
    for rank, first in enumerate(rows[0]):
        samples = [row[rank] for row in rows]
        stated = [sample.compute_s for sample in samples if sample.compute_s is not None]
        peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
        reserved = [sample.reserved_bytes for sample in samples if sample.reserved_bytes is not None]
        ranks.append(
            RankMeasurement(
                rank=rank,
                host=first.host,
                device=plan.stages[0].device,
                step_s=tuple(sample.seconds for sample in samples),
                peak_bytes=max(peaks) if peaks else None,
                compute_s=float(np.median(stated)) if stated else None,
                reserved_bytes=max(reserved) if reserved else None,
                kinds=first.kinds,
            )
        )
    return StepMeasurement(
        plan_digest=plan.digest,
        framework=plan.framework,
        config=plan.config.describe(),
        step_s=median,
        step_s_spread=(high - low) / median,
        predicted_step_s=plan.cost.step_s if plan.cost else None,
        predicted_peak_bytes=plan.memory.peak_bytes if plan.memory else None,
        losses=tuple(row[0].loss for row in rows),
        ranks=tuple(ranks),
        environment=capture_environment(backend=rows[0][0].backend, hosts=sorted({sample.host for sample in rows[0]})),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=json.loads(to_json(replace(plan, search=None, assumptions=()))),
    )


# -- on a rank ------------------------------------------------------------------------------------------------------


def _started(rank: Rank, plans: Sequence[Plan], build_model: BuildModel, warmup: int, steps: int, device: str) -> None:
    def tell(plan: int, row: list[Sample]) -> None:
        if rank.rank == 0:
            rank.report((plan, row))

    _run(plans, build_model, warmup, steps, device, tell=tell)


def _run(
    plans: Sequence[Plan],
    build_model: BuildModel,
    warmup: int,
    steps: int,
    device_name: str,
    tell: Callable[[int, list[Sample]], None],
) -> None:
    """All steps of all plans on this rank; ``tell`` gets every rank's samples of a measured step."""
    virtual: Any = None
    if device_name.startswith("virtual:"):
        from meshwright.profiler.virtual import virtual_device

        virtual = virtual_device(device_name)
    device = torch.device("cpu")
    if device_name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    clock = DeviceClock(device, virtual)
    ranks = [MeasuredRank(plan, build_model, device) for plan in plans]
    if device.type == "cpu" and warmup >= COUNTED:
        for plan, each in zip(plans, ranks, strict=True):
            with _naming_lost_peers(f"the first steps of {plan.config.describe()}"):
                each.count()
        warmup -= COUNTED
    for number in range(warmup + steps):
        for index, each in enumerate(ranks):
            with _naming_lost_peers(f"step {number + 1} of {plans[index].config.describe()}"):
                sample = each.timed(clock, virtual, alone=len(ranks) == 1)
                row: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(row, sample)
            if number >= warmup:
                tell(index, row)


@contextmanager
def _naming_lost_peers(where: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, InputError) as error:
        cause = error.__cause__ if isinstance(error, InputError) else error
        if not isinstance(cause, RuntimeError) or not lost_a_peer(cause):
            raise
        who = ", ".join(map(str, silent_ranks())) or "none of them"
        raise RankError(f"{where}: rank {dist.get_rank()} lost its peers; no sign of life from rank {who}") from error


# -- where ranks run ------------------------------------------------------------------------------------------------


def _resolved(device: str) -> str:
    """The device by its own name. Raises ``InputError`` for one that is not there."""
    if device == "auto":
        return os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.device_count() else "cpu")
    if device == "cuda" and not torch.cuda.device_count():
        raise InputError("device cuda: torch finds no CUDA device here")
    if device not in ("cpu", "cuda") and not device.startswith("virtual:"):
        raise InputError(f"device must be auto, cpu, cuda or virtual:KIND/DIVISOR, found {device!r}")
    return device


def _ranks_here() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) where a process group is there already, or a launcher's; None else."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    return launcher_ranks()


def _join_ranks(joined: tuple[int, int, int], device: str) -> None:
    rank, size, local_rank = joined
    os.environ["LOCAL_RANK"] = str(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=REPLY_S))


def _check_host_memory(plans: Sequence[Plan], ranks_here: int) -> None:
    """Refuse what would fill this machine: each of its ranks first makes the whole model of a plan."""
    recipe, spec = plans[0].workload.recipe, max((plan.model for plan in plans), key=lambda model: model.params)
    whole = spec.params * (recipe.master or recipe.params).num_bytes
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if ranks_here * whole > there:
        raise InputError(
            f"{ranks_here} ranks would each make {spec.name} whole first, {format_bytes(ranks_here * whole)} "
            f"in all; this machine has {format_bytes(there)}: measure a smaller model or on more machines"
        )
