"""Whole training steps with every byte counted: the loop that a dry run and a real rank share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor

from meshwright import Error, InputError
from meshwright.cost_models.strategy import Schedule
from meshwright.executors.data_parallel import torch_dtype
from meshwright.executors.memory_peak import Peak
from meshwright.executors.memory_tracker import MemoryTracker
from meshwright.executors.parallel_model import ParallelModel
from meshwright.executors.trained import Trained


def track_steps(
    trained: Trained,
    steps: int,
    *,
    kernels: Literal["cuda", "cpu"],
    beside: Sequence[Tensor] = (),
    left_out: int = 0,
    first_microbatches: int | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Peak:
    """The peak of ``steps`` whole training steps, on tensors real or fake; at least 2 for the optimizer's states.

    ``beside`` is counted too, and what pipelines keep of ``left_out`` more micro-batches, as if they had run before.
    The first step runs ``first_microbatches``. ``on_progress`` is told the share done after each forward. Raises
    ``InputError`` where an operator fails on fake tensors, with the module; on real ones the error is left as it is.
    """
    parallel = trained.parallel
    first = first_microbatches or parallel.num_microbatches
    forwards = len(parallel.modules()) * (first + (steps - 1) * parallel.num_microbatches)
    gc.collect()
    gc.disable()  # what only a cycle keeps alive counts as alive
    tracker = MemoryTracker(
        parallel, cuda=kernels == "cuda", on_forward=lambda count: on_progress(min(count / forwards, 1.0))
    )
    try:
        with tracker:
            tracker.take_up([*trained.batch, *beside])
            for step in range(steps):
                tracker.begin_step()
                _step(trained, tracker, first if step == 0 else parallel.num_microbatches, left_out if step == 1 else 0)
    except (RuntimeError, TypeError, ValueError) as error:
        explained = _explained(error, tracker.failed_at) if isinstance(trained.batch[0], FakeTensor) else None
        if explained is None:
            raise
        raise explained from error
    finally:
        gc.enable()
    return tracker.peak()


def _step(trained: Trained, tracker: MemoryTracker, num_microbatches: int, left_out: int) -> None:
    parallel = trained.parallel
    whole, rows = parallel.num_microbatches, num_microbatches * parallel.plan.config.micro_batch_size
    parallel.num_microbatches = num_microbatches
    if left_out and parallel.plan.config.pp > 1:
        _hold_left_out(parallel, tracker, left_out, trained.batch[0].shape[1] // parallel.plan.config.cp)
    parallel.step((trained.batch[0][:rows], trained.batch[1][:rows]))
    if num_microbatches != whole:
        parallel._pipelines.clear()  # they are made for a number of micro-batches
    parallel.num_microbatches = whole
    tracker.mark_gradients()
    with tracker.phase("clip"):
        trained.clip()
    with tracker.phase("optimizer"):
        trained.optimizer.step()
    tracker.mark_optimizer(trained.optimizer)
    trained.optimizer.zero_grad()


def _hold_left_out(parallel: ParallelModel, tracker: MemoryTracker, count: int, sequence: int) -> None:
    """Let the pipeline hold, while it runs, what it would have kept of ``count`` more micro-batches.

    That is the losses, and under all schedules but 1F1B what the stages sent, of ``sequence`` tokens before tp cuts it.
    """
    plan, pipeline = parallel.plan, parallel._pipeline(sequence)
    run, config = pipeline.run, plan.config
    shape = (config.micro_batch_size, sequence // (config.tp if config.sequence_parallel else 1), plan.model.hidden)
    dtype = torch_dtype(plan.workload.recipe.compute)
    ranks = [stage.pp_rank for stage in plan.stages]
    kept: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for place in (chunk.index for chunk in parallel._chunks):
        if place + 1 == len(ranks):
            kept.append(("activations", (), torch.float32))
        elif config.schedule is not Schedule.ONE_F_ONE_B and ranks[place + 1] != ranks[place]:
            kept.append(("activations", shape, dtype))
        if config.schedule is not Schedule.ONE_F_ONE_B and place > 0 and ranks[place - 1] != ranks[place]:
            kept.append(("working", shape, dtype))  # gradients, sent the other way

    def holding(tokens: Tensor, targets: Tensor) -> None:
        held = []
        for kind, size, number in kept:
            with tracker.born_as(kind):
                held += [torch.empty(size, dtype=number) for _ in range(count)]
        run(tokens, targets)

    pipeline.run = holding  # type: ignore[method-assign]


def _explained(error: Exception, failed_at: str) -> Error | None:
    """The first cause (torch's pipeline wraps what a stage raised) and where, as one sentence, if it can be told."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, Error):
        return cause
    if not failed_at:
        return None
    if isinstance(cause, DataDependentOutputException | DynamicOutputShapeException):
        return InputError(f"{failed_at} the model asks for the values of tensors, which a dry run does not have")
    lines = str(cause).strip().splitlines() or [""]
    return InputError(f"the plan does not run, {failed_at}: {type(cause).__name__}: {lines[0]}")
