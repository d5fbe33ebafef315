"""A plan proven without its GPUs: one rank of it, real steps on fake tensors, every byte counted.

    report = meshwright.dry_run(None, plan, rank=0)       # None: the model is built from the plan's own description
    report.peak_bytes, report.module, report.fits

The model is built without memory, ``parallelize`` splits it as on the real rank, under a fake process group of the
plan's world size, and ``ParallelModel.step``, clipping and AdamW run on fake tensors, twice: optimizer states exist
from the first step's end on. ``memory_tracker`` counts. Context, communicators and workspaces are not torch's to hand
out: they are the device's ``reserved_bytes``, shown apart.

Each rank runs in a forked process of its own, since torch keeps one process group and one mesh apiece. A step of many
micro-batches is not run whole where fewer reach the same peak (``shorter_step``).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Literal

import numpy as np
import torch
from torch import nn

from meshwright import InputError
from meshwright.cost_models.estimate import MemoryBreakdown
from meshwright.cost_models.placement import rank_grid
from meshwright.cost_models.residency import reserved_bytes
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.cost_models.targets import framework_named
from meshwright.executors.apply import parallelize
from meshwright.executors.checks import check_cluster
from meshwright.executors.data_parallel import torch_dtype
from meshwright.executors.fake_kernels import cuda_kernels
from meshwright.executors.fake_ranks import fake_tensors, fake_world, give_memory
from meshwright.executors.loss import LossFunction
from meshwright.executors.memory_peak import LiveTensor, Peak, TimePoint
from meshwright.executors.memory_steps import track_steps
from meshwright.executors.shorter_step import enough_microbatches, fewest_microbatches, shortened
from meshwright.executors.spec_model import build_spec_model
from meshwright.executors.trained import Trained
from meshwright.planner.plan import Plan
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.launch import Rank, run_ranks
from meshwright.profiler.record import record

STEPS = 2
NUM_LARGEST = 12
TIMEOUT_S = 1800.0

Kernels = Literal["cuda", "cpu"]
OnProgress = Callable[[float, str], None]


@record
class DryRun:
    """What one rank holds at its peak, and where that is.

    ``phase`` and ``module`` (its dotted name in the model) are those of the tensor whose birth makes the peak. Bytes by
    kind are of that moment. ``reserved_bytes`` and ``capacity_bytes`` are the device's, None when nothing says.
    """

    rank: int
    pp_rank: int
    stages: tuple[int, ...]  # those that this rank holds
    params_bytes: int
    grads_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    gathered_bytes: int
    working_bytes: int
    communication_bytes: int
    reserved_bytes: int | None
    capacity_bytes: int | None
    phase: str
    module: str
    operator: str
    step: int  # from 0
    step_peaks_bytes: tuple[int, ...]
    largest: tuple[LiveTensor, ...]
    timeline: tuple[TimePoint, ...]  # of the step with the peak
    num_microbatches: int  # of a step of this rank ...
    microbatches_run: int  # ... and how many were run
    kernels: Kernels
    predicted: MemoryBreakdown | None  # the plan's, of the stage that it says binds
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """All tensors at the peak, as ``torch.cuda.max_memory_allocated`` counts them."""
        return (
            self.params_bytes
            + self.grads_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.gathered_bytes
            + self.working_bytes
            + self.communication_bytes
        )

    @property
    def headroom_bytes(self) -> int | None:
        """Capacity less reserved less peak; negative where it does not fit, None where the capacity is unknown."""
        if self.capacity_bytes is None or self.reserved_bytes is None:
            return None
        return self.capacity_bytes - self.reserved_bytes - self.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the peak is at most capacity less reserved."""
        return None if self.headroom_bytes is None else self.headroom_bytes >= 0


def dry_run(
    model: nn.Module | Callable[[], nn.Module] | None,
    plan: Plan,
    rank: int = 0,
    *,
    loss_fn: LossFunction | None = None,
    cluster: ClusterProfile | None = None,
    kernels: Kernels = "cuda",
    all_microbatches: bool = False,
    on_progress: OnProgress = lambda share, text: None,
) -> DryRun:
    """Run ``rank`` of ``plan`` on fake tensors, in a process of its own, and say what it holds at its peak.

    ``model`` is best on the meta device (its values are not looked at, and it is left as it was), or a function that
    makes it; None is a plain decoder made from the plan's ``ModelSpec``. ``kernels`` says whose saved tensors and
    workspaces attention and norms have: the GPU's, or those of the CPU that real ranks without a GPU run.
    ``cluster`` gives capacity and reserved memory where the plan has no prediction; with ``all_microbatches`` a step is
    run whole.

    Raises:
        InputError: the plan cannot be applied: another framework, model or world size, or an operator that fails, with
            the module it fails in; ``rank`` is not one of the plan's.
    """
    return dry_run_ranks(
        model,
        plan,
        [rank],
        loss_fn=loss_fn,
        cluster=cluster,
        kernels=kernels,
        all_microbatches=all_microbatches,
        on_progress=on_progress,
    )[0]


def dry_run_ranks(
    model: nn.Module | Callable[[], nn.Module] | None,
    plan: Plan,
    ranks: Sequence[int],
    *,
    loss_fn: LossFunction | None = None,
    cluster: ClusterProfile | None = None,
    kernels: Kernels = "cuda",
    all_microbatches: bool = False,
    at_once: int = 2,
    on_progress: OnProgress = lambda share, text: None,
) -> tuple[DryRun, ...]:
    """``dry_run`` of several ranks, ``at_once`` of them at a time. Raises as it does."""
    world = plan.config.world_size
    for rank in ranks:
        if not 0 <= rank < world:
            raise InputError(f"rank must be 0 to {world - 1}, found {rank}")
    if cluster is not None:
        check_cluster(plan, cluster)
    done: list[DryRun] = []

    def show(worker: int, value: tuple[float, str]) -> None:
        share, text = value
        on_progress((len(done) + share) / len(ranks), text)

    for first in range(0, len(ranks), at_once):
        several = ranks[first : first + at_once]
        job = (model, plan, several, loss_fn, cluster, kernels, all_microbatches)
        done += run_ranks(_one_rank, len(several), *job, timeout_s=TIMEOUT_S, backend=None, on_report=show)
    return tuple(done)


def stage_ranks(plan: Plan) -> tuple[int, ...]:
    """For each pipeline rank the one of its ranks that holds the most: the first, of the data rank with most to do.

    Of a ring's places it is the last, whose queries all see the first half of every block that comes.
    """
    config, busiest = plan.config, int(np.argmax(plan.micro_batches_per_data_rank))
    place = (config.cp_ring - 1) * config.cp_ulysses
    return tuple(int(rank) for rank in rank_grid(config, plan.placement)[:, busiest, place, 0])


def dry_run_peak(
    model: nn.Module | None,
    plan: Plan,
    rank: int = 0,
    *,
    loss_fn: LossFunction | None = None,
    kernels: Kernels = "cuda",
    left_out: int = 0,
    on_progress: OnProgress = lambda share, text: None,
) -> Peak:
    """The peak of ``rank`` of ``plan``, all micro-batches run, in this process: call it once, as it leaves traces.

    Uses up ``model``. ``left_out`` is how many more micro-batches a real step of this rank has: their tokens are there
    too, and what torch's pipelines keep of them. The first of the two steps, there for the optimizer's states, runs as
    few micro-batches as the schedule takes. Raises ``InputError`` as ``dry_run`` does.
    """
    config, recipe = plan.config, plan.workload.recipe
    if model is None:
        with torch.device("meta"):
            model = build_spec_model(plan.model)
    model = _on_meta(model).to(torch_dtype(recipe.master or recipe.params))
    with ExitStack() as stack:
        stack.enter_context(fake_world(config.world_size, rank))
        on_progress(0.1, f"rank {rank}: splitting")
        parallel = parallelize(model, plan, loss_fn)
        parallel._check_count = False  # fake counts have no values
        stack.enter_context(fake_tensors())
        give_memory(parallel, torch.device("cpu"))
        stack.enter_context(cuda_kernels() if kernels == "cuda" else nullcontext())
        trained = Trained(parallel, plan, torch.device("cpu"))
        tokens = torch.empty((2, left_out * config.micro_batch_size, plan.workload.seq_len), dtype=torch.int64)

        def show(share: float) -> None:
            on_progress(0.3 + 0.7 * share, f"rank {rank}: steps")

        return track_steps(
            trained,
            STEPS,
            kernels=kernels,
            beside=[tokens],
            left_out=left_out,
            first_microbatches=fewest_microbatches(config, parallel.num_microbatches),
            on_progress=show,
        )


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values; tensors that are one stay one, which ``model.to("meta")`` would part (tied embeddings)."""
    tensors: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    tensors |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, tensors)


def _one_rank(
    worker: Rank,
    model: nn.Module | Callable[[], nn.Module] | None,
    plan: Plan,
    ranks: Sequence[int],
    loss_fn: LossFunction | None,
    cluster: ClusterProfile | None,
    kernels: Kernels,
    all_microbatches: bool,
) -> DryRun:
    torch.set_num_threads(1)
    start, rank = time.perf_counter(), ranks[worker.rank]
    pp_rank, data_rank = (int(axis[0]) for axis in np.nonzero(rank_grid(plan.config, plan.placement) == rank)[:2])
    whole = plan.micro_batches_per_data_rank[data_rank]
    enough = whole if all_microbatches else enough_microbatches(plan, pp_rank, whole)
    peak = dry_run_peak(
        model if model is None or isinstance(model, nn.Module) else model(),
        shortened(plan, enough),
        rank,
        loss_fn=loss_fn,
        kernels=kernels,
        left_out=whole - enough,
        on_progress=lambda share, text: worker.report((share, text)),
    )
    device = _device_bytes(plan, cluster)
    names = ("params", "grads", "optimizer", "activations", "gathered", "working", "communication")
    return DryRun(
        rank=rank,
        pp_rank=pp_rank,
        stages=tuple(index for index, stage in enumerate(plan.stages) if stage.pp_rank == pp_rank),
        **{f"{name}_bytes": peak.kind(name) for name in names},
        reserved_bytes=device[0],
        capacity_bytes=device[1],
        phase=peak.phase,
        module=peak.module,
        operator=peak.operator,
        step=peak.step,
        step_peaks_bytes=peak.step_peaks,
        largest=peak.tensors[:NUM_LARGEST],
        timeline=peak.timeline,
        num_microbatches=whole,
        microbatches_run=enough,
        kernels=kernels,
        predicted=plan.memory,
        seconds=time.perf_counter() - start,
    )


def _device_bytes(plan: Plan, cluster: ClusterProfile | None) -> tuple[int | None, int | None]:
    """(reserved, capacity) of a device."""
    if cluster is not None:
        batch = ConfigBatch.from_configs([plan.config])
        reserved = reserved_bytes(cluster.device, framework_named(plan.framework), batch)
        return round(float(reserved[0])), cluster.device.memory_bytes
    if plan.memory is not None:
        return plan.memory.reserved_bytes, plan.memory.capacity_bytes
    return None, None
