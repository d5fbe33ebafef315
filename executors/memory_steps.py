"""Whole training steps with every byte counted: the loop that a dry run and a real rank share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor

from meshwright import Error, InputError
from meshwright.executors.memory_peak import Peak
from meshwright.executors.memory_tracker import MemoryTracker
from meshwright.executors.trained import Trained


def track_steps(
    trained: Trained,
    steps: int,
    *,
    kernels: Literal["cuda", "cpu"],
    beside: Sequence[Tensor] = (),
    on_progress: Callable[[float], None] = lambda share: None,
) -> Peak:
    """The peak of ``steps`` whole training steps, on tensors real or fake; at least 2 for the optimizer's states.

    ``beside`` is counted too; ``on_progress`` is told the share done after each forward. Raises ``InputError`` where an
    operator fails on fake tensors, with the module; on real ones the error is left as it is.
    """
    parallel = trained.parallel
    forwards = steps * len(parallel.modules()) * parallel.num_microbatches
    gc.collect()
    gc.disable()  # what only a cycle keeps alive counts as alive
    tracker = MemoryTracker(
        parallel, cuda=kernels == "cuda", on_forward=lambda count: on_progress(min(count / forwards, 1.0))
    )
    try:
        with tracker:
            tracker.take_up([*trained.batch, *beside])
            for _ in range(steps):
                tracker.begin_step()
                _step(trained, tracker)
    except (RuntimeError, TypeError, ValueError) as error:
        if not isinstance(trained.batch[0], FakeTensor):
            raise
        raise _explained(error, tracker.failed_at) from error
    finally:
        gc.enable()
    return tracker.peak()


def _step(trained: Trained, tracker: MemoryTracker) -> None:
    trained.parallel.step(trained.batch)
    tracker.mark_gradients()
    with tracker.phase("clip"):
        trained.clip()
    with tracker.phase("optimizer"):
        trained.optimizer.step()
    tracker.mark_optimizer(trained.optimizer)
    trained.optimizer.zero_grad()


def _explained(error: Exception, failed_at: str) -> Exception:
    """What to raise: the first cause (torch's pipeline wraps what a stage raised) and where, or the error itself."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, Error):
        return cause
    if not failed_at:
        return error
    if isinstance(cause, DataDependentOutputException | DynamicOutputShapeException):
        return InputError(f"{failed_at} the model asks for the values of tensors, which a dry run does not have")
    lines = str(cause).strip().splitlines() or [""]
    return InputError(f"the plan does not run, {failed_at}: {type(cause).__name__}: {lines[0]}")
