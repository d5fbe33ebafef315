"""One rank while a plan is measured: what it trains, the seconds of a step, and the memory that its tensors take."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshwright.cost_models.estimate import KINDS
from meshwright.executors.apply import parallelize
from meshwright.executors.data_parallel import torch_dtype
from meshwright.executors.memory_peak import Peak
from meshwright.executors.memory_steps import track_steps
from meshwright.executors.trained import Trained
from meshwright.planner.plan import Plan
from meshwright.profiler.clock import DeviceClock
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.steps import KindBytes

COUNTED = 2  # steps whose tensors are counted one by one on a CPU: the second has optimizer states from the start

BuildModel = Callable[[ModelSpec], nn.Module]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One rank's figures of one step."""

    seconds: float
    compute_s: float | None
    loss: float
    peak_bytes: int | None
    reserved_bytes: int | None
    kinds: tuple[KindBytes, ...]
    host: str
    backend: str


class MeasuredRank:
    """One plan on this rank: what is trained, and what it alone holds of the device."""

    def __init__(self, plan: Plan, build_model: BuildModel, device: torch.device) -> None:
        self._device = device
        before = self._allocated()
        torch.manual_seed(0)
        recipe = plan.workload.recipe
        model = build_model(plan.model).to(torch_dtype(recipe.master or recipe.params))
        self.trained = Trained(parallelize(model, plan), plan, device)
        self.counted: Peak | None = None
        self._resident = self._allocated() - before

    def count(self) -> None:
        """``COUNTED`` steps with every tensor counted."""
        self.counted = track_steps(self.trained, COUNTED, kernels="cpu")

    def timed(self, clock: DeviceClock, virtual: Any, *, alone: bool) -> Sample:
        """One step; ``alone`` where no other plan's tensors are on the device."""
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        before = self._allocated()
        stated = virtual.charged_s if virtual is not None else 0.0
        dist.barrier()
        with virtual if virtual is not None else nullcontext():
            start = clock.now()
            loss = self.trained.step()
            seconds = clock.now() - start
        others = before - self._resident
        self._resident = self._allocated() - others
        peak = torch.cuda.max_memory_allocated() - others if on_cuda else None
        if self.counted is not None:
            peak = self.counted.peak_bytes
        return Sample(
            seconds=seconds,
            compute_s=virtual.charged_s - stated if virtual is not None else None,
            loss=float(loss),
            peak_bytes=peak,
            reserved_bytes=torch.cuda.max_memory_reserved() if on_cuda and alone else None,
            kinds=kinds_of(self.counted),
            host=socket.gethostname(),
            backend=dist.get_backend(),
        )

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else 0


def kinds_of(peak: Peak | None) -> tuple[KindBytes, ...]:
    """What the tensors of a peak are; nothing of none."""
    if peak is None:
        return ()
    pairs = zip(KINDS, peak.bytes_by_kind, strict=True)
    return tuple(KindBytes(kind=kind, num_bytes=num_bytes) for kind, num_bytes in pairs)
