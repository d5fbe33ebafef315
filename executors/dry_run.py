"""A plan proven on no GPU at all: one rank of it, real steps on fake tensors, every byte counted.

    report = meshwright.dry_run(model, plan, rank=0)      # model on the meta device, or None: built from the plan
    report.memory                                         # bytes by kind at the peak, as a prediction is written
    report.fits

The model is built without memory, ``parallelize`` splits it as on the real rank, under a fake process group of the
plan's world size, and ``ParallelModel.step``, clipping and AdamW run on fake tensors, twice: optimizer states exist
from the first step's end on. ``memory_tracker`` counts. What is not torch's to hand out (context, communicators,
workspaces) is the device's ``reserved_bytes``, shown apart.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Literal

import torch
from torch import nn

from meshwright.executors.apply import parallelize
from meshwright.executors.data_parallel import torch_dtype
from meshwright.executors.fake_kernels import cuda_kernels
from meshwright.executors.fake_ranks import fake_tensors, fake_world, make_fake
from meshwright.executors.loss import LossFunction
from meshwright.executors.memory_peak import Peak
from meshwright.executors.memory_tracker import MemoryTracker
from meshwright.executors.spec_model import build_spec_model
from meshwright.executors.trained import Trained
from meshwright.planner.plan import Plan

STEPS = 2
Kernels = Literal["cuda", "cpu"]


def dry_run_peak(
    model: nn.Module | None,
    plan: Plan,
    rank: int = 0,
    *,
    loss_fn: LossFunction | None = None,
    kernels: Kernels = "cuda",
    on_progress: Callable[[float, str], None] = lambda share, text: None,
) -> Peak:
    """The peak of ``rank``; see ``dry_run``. Uses up ``model``. One call per process."""
    recipe = plan.workload.recipe
    if model is None:
        with torch.device("meta"):
            model = build_spec_model(plan.model)
    model = model.to("meta").to(torch_dtype(recipe.master or recipe.params))
    with ExitStack() as stack:
        stack.enter_context(fake_world(plan.config.world_size, rank))
        parallel = parallelize(model, plan, loss_fn)
        stack.enter_context(fake_tensors())
        make_fake(parallel)
        stack.enter_context(cuda_kernels() if kernels == "cuda" else nullcontext())
        return track_steps(Trained(parallel, plan, torch.device("cpu")), STEPS, kernels=kernels)


def track_steps(trained: Trained, steps: int, *, kernels: Kernels) -> Peak:
    """``steps`` whole training steps under a tracker, on tensors real or fake."""
    gc.collect()
    gc.disable()  # what only a cycle keeps alive counts as alive
    tracker = MemoryTracker(trained.parallel, cuda=kernels == "cuda")
    try:
        with tracker:
            tracker.take_up(trained.batch)
            for _ in range(steps):
                tracker.begin_step()
                trained.parallel.step(trained.batch)
                tracker.mark_gradients()
                with tracker.phase("clip"):
                    trained.clip()
                with tracker.phase("optimizer"):
                    trained.optimizer.step()
                tracker.mark_optimizer(trained.optimizer)
                trained.optimizer.zero_grad()
    finally:
        gc.enable()
    return tracker.peak()
