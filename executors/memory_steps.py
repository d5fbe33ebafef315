"""Whole training steps with every byte counted: the loop that a dry run and a real rank share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from meshwright import InputError
from meshwright.executors.memory_peak import Peak
from meshwright.executors.memory_tracker import MemoryTracker
from meshwright.executors.trained import Trained


def track_steps(
    trained: Trained,
    steps: int,
    *,
    kernels: Literal["cuda", "cpu"],
    beside: Sequence[Tensor] = (),
    on_step: Callable[[int], None] = lambda step: None,
) -> Peak:
    """The peak of ``steps`` whole training steps, on tensors real or fake; at least 2 for the optimizer's states.

    ``beside`` is counted too, ``on_step`` called before each step. Raises ``InputError`` where an operator fails on
    fake tensors, with the module; on real ones the error is left as it is.
    """
    gc.collect()
    gc.disable()  # what only a cycle keeps alive counts as alive
    tracker = MemoryTracker(trained.parallel, cuda=kernels == "cuda")
    try:
        with tracker:
            tracker.take_up([*trained.batch, *beside])
            for step in range(steps):
                on_step(step)
                tracker.begin_step()
                _step(trained, tracker)
    except (RuntimeError, TypeError, ValueError) as error:
        if not tracker.failed_at or not isinstance(trained.batch[0], FakeTensor):
            raise
        raise InputError(f"the plan does not run, {tracker.failed_at}: {_first_line(error)}") from error
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


def _first_line(error: Exception) -> str:
    """The cause's first line: torch's pipeline wraps what a stage raised."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
