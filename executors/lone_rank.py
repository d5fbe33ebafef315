"""One rank of a plan on a real device and without its peers: real kernels on real tensors, and what they really take.

A plan for thousands of GPUs has a share for each, which one GPU at hand can run: under a fake process group of the
plan's world size every collective ends at once and leaves in its output whatever was there. Losses mean nothing, memory
is that of the real rank, but for what communicators take (they are ``reserved_bytes`` of a device). What is measured is
the same as in a dry run, whose referee this is.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import nn

from meshwright import InputError
from meshwright.executors import apply
from meshwright.executors.data_parallel import local, torch_dtype
from meshwright.executors.fake_ranks import fake_world, give_memory, without_peers
from meshwright.executors.measured_rank import kinds_of
from meshwright.executors.memory_steps import track_steps
from meshwright.executors.spec_model import INITIAL_STD, build_spec_model
from meshwright.executors.trained import Trained
from meshwright.planner.plan import Plan
from meshwright.profiler.launch import Rank, run_ranks
from meshwright.profiler.record import record
from meshwright.profiler.steps import KindBytes

STEPS = 2  # the second has optimizer states from its start
TIMEOUT_S = 900.0


@record
class LonePeak:
    """What one rank held at its peak.

    On a GPU what torch's allocator had given out and what it had taken from the device (``max_memory_allocated``,
    ``max_memory_reserved``), less what a matmul needs anywhere (workspaces of cuBLAS). On a CPU what all tensors took,
    counted one by one, by kind.
    """

    rank: int
    peak_bytes: int
    reserved_bytes: int | None
    kinds: tuple[KindBytes, ...]


def run_alone(plan: Plan, rank: int = 0, *, device: str = "cuda") -> LonePeak:
    """Two steps of ``rank`` of ``plan`` on ``device`` (cuda or cpu), in a process of its own.

    The model is made from the plan's ``ModelSpec``. Raises ``InputError`` for a device that is not there.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.device_count()):
        raise InputError(f"device must be cpu or, where there is one, cuda, found {device!r}")
    found: tuple[LonePeak, ...] = tuple(run_ranks(_alone, 1, plan, rank, device, timeout_s=TIMEOUT_S, backend=None))
    return found[0]


def _alone(worker: Rank, plan: Plan, rank: int, device_name: str) -> LonePeak:
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if device_name == "cuda" else torch.device("cpu")
    before = _on_gpu(device, torch_dtype(plan.workload.recipe.compute)) if device.type == "cuda" else (0, 0)
    with ExitStack() as stack:
        stack.enter_context(fake_world(plan.config.world_size, rank))
        stack.enter_context(without_peers())
        stack.enter_context(patch.object(apply, "_rank_device", lambda: device))
        trained = _trained(plan, device)
        if device.type == "cpu":
            peak = track_steps(trained, STEPS, kernels="cpu")
            return LonePeak(rank=rank, peak_bytes=peak.peak_bytes, reserved_bytes=None, kinds=kinds_of(peak))
        for _ in range(STEPS):
            trained.step()
        torch.cuda.synchronize()
        return LonePeak(
            rank=rank,
            peak_bytes=torch.cuda.max_memory_allocated() - before[0],
            reserved_bytes=torch.cuda.max_memory_reserved() - before[1],
            kinds=(),
        )


def _trained(plan: Plan, device: torch.device) -> Trained:
    """The rank's share, split on the meta device so that the whole model is never there."""
    recipe = plan.workload.recipe
    with torch.device("meta"):
        model: nn.Module = build_spec_model(plan.model).to(torch_dtype(recipe.master or recipe.params))
    parallel = apply.parallelize(model, plan)
    give_memory(parallel, device)
    with torch.no_grad():
        for weight in parallel.parameters():
            own = local(weight)
            own.normal_(std=INITIAL_STD) if own.dim() > 1 else own.fill_(1.0)
    del model
    return Trained(parallel, plan, device)


def _on_gpu(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes (allocated, reserved) once matmuls have made their workspaces, for forwards' thread and for backwards'."""
    torch.cuda.set_device(device)
    x = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    nn.functional.linear(x, x, x[0]).sum().backward()
    del x
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
