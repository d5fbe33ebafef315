"""Time operators and messages the same way everywhere: warm up, repeat, wait for the device, take the median.

A sample is one interval divided by the calls in it, long enough for the clock and, on a GPU, for launches to hide
behind kernels as they do in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from meshwright import InputError
from meshwright.profiler.record import record

SAMPLE_S = 3e-4  # a sample lasts at least this, by repeating short calls
MAX_CALLS = 64


@record
class Timing:
    """Median seconds of a call, and spread = (p90 - p10) / median over the samples."""

    seconds: float
    spread: float


def timing_of(samples: Sequence[float]) -> Timing:
    """Median and spread of samples. Raises ``InputError`` without any."""
    if not samples:
        raise InputError("no sample was taken")
    low, middle, high = np.percentile(np.asarray(samples), [10, 50, 90])
    return Timing(seconds=float(middle), spread=float((high - low) / middle) if middle > 0 else 0.0)


class DeviceClock:
    """Reads time after the device has finished: CUDA is synchronised, a virtual device settled, a CPU needs nothing."""

    def __init__(self, device: torch.device, virtual: Any = None) -> None:
        self.device = device
        self._settle: Callable[[], object] | None = None
        if virtual is not None:
            self._settle = virtual.settle
        elif device.type == "cuda":
            self._settle = torch.cuda.synchronize

    def now(self) -> float:
        """Seconds since some moment, with everything issued before done."""
        if self._settle is not None:
            self._settle()
        return time.perf_counter()

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        start = self.now()
        call()
        return self.now() - start

    def samples(self, call: Callable[[], object], *, calls: int, repeats: int) -> list[float]:
        """``repeats`` samples of the seconds of a call, each over ``calls`` calls in a row."""
        out = []
        for _ in range(repeats):
            start = self.now()
            for _ in range(calls):
                call()
            out.append((self.now() - start) / calls)
        return out

    def measure(self, call: Callable[[], object], *, repeats: int, budget_s: float) -> Timing:
        """Warm up twice, then time: at least three samples, more up to ``repeats`` while ``budget_s`` lasts."""
        call()
        estimate = max(self.once(call), 1e-7)
        calls = int(min(max(SAMPLE_S / estimate, 1), MAX_CALLS))
        affordable = int(min(max(budget_s / (estimate * calls), 3), repeats))
        return timing_of(self.samples(call, calls=calls, repeats=affordable))
