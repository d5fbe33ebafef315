"""What an estimate says of a step: seconds and bytes by where they go, of one config or of many at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import BoolArray, ConfigBatch, IntArray, ParallelConfig
from meshwright.profiler.record import record

FloatArray = NDArray[np.float64]


@record
class CostBreakdown:
    """Exposed seconds of one step on the rank that finishes last; their sum is ``step_s``.

    ``bubble_s`` is that rank's idle time in the pipeline. ``hidden_s`` is communication that runs behind compute: it
    stands beside the sum, not in it.
    """

    compute_s: float
    recompute_s: float
    tp_s: float
    cp_s: float
    ep_s: float
    pp_s: float
    dp_s: float
    bubble_s: float
    optimizer_s: float
    overhead_s: float
    hidden_s: float

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return float(sum(getattr(self, field.name) for field in fields(self) if field.name != "hidden_s"))


@record
class MemoryBreakdown:
    """Bytes at the peak of the stage with the largest total; kinds are never maxed apart."""

    stage: int
    params_bytes: int
    grads_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int  # gathered weights, logits, communication
    reserved_bytes: int  # context and what others hold of the device
    capacity_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Everything the model allocates at its peak, without ``reserved_bytes``."""
        return self.params_bytes + self.grads_bytes + self.optimizer_bytes + self.activations_bytes + self.buffers_bytes

    @property
    def headroom_bytes(self) -> int:
        """Capacity less reserved less peak; negative where it does not fit."""
        return self.capacity_bytes - self.reserved_bytes - self.peak_bytes


@record
class Estimate:
    """A config with its predicted cost and memory."""

    config: ParallelConfig
    cost: CostBreakdown
    memory: MemoryBreakdown


SECONDS = tuple(field.name for field in fields(CostBreakdown))
BYTES = tuple(field.name for field in fields(MemoryBreakdown))


@dataclass(frozen=True, slots=True)
class BatchEstimate:
    """Estimates of many configs: one array of shape ``[num_configs]`` for each field of the two breakdowns."""

    compute_s: FloatArray
    recompute_s: FloatArray
    tp_s: FloatArray
    cp_s: FloatArray
    ep_s: FloatArray
    pp_s: FloatArray
    dp_s: FloatArray
    bubble_s: FloatArray
    optimizer_s: FloatArray
    overhead_s: FloatArray
    hidden_s: FloatArray
    stage: IntArray
    params_bytes: IntArray
    grads_bytes: IntArray
    optimizer_bytes: IntArray
    activations_bytes: IntArray
    buffers_bytes: IntArray
    reserved_bytes: IntArray
    capacity_bytes: IntArray

    @property
    def step_s(self) -> FloatArray:
        """Seconds of one optimizer step: the sum of the exposed parts, in the order of ``CostBreakdown``."""
        total = np.zeros(len(self.compute_s))
        for name in SECONDS:
            if name != "hidden_s":
                total = total + getattr(self, name)
        return total

    @property
    def peak_bytes(self) -> IntArray:
        """Everything the model allocates at its peak, without ``reserved_bytes``."""
        return self.params_bytes + self.grads_bytes + self.optimizer_bytes + self.activations_bytes + self.buffers_bytes

    @property
    def fits(self) -> BoolArray:
        """Whether the peak is at most capacity less reserved."""
        return self.peak_bytes <= self.capacity_bytes - self.reserved_bytes

    def estimate(self, index: int, batch: ConfigBatch) -> Estimate:
        """The config at one position of ``batch`` with its breakdowns, as a record."""
        cost = CostBreakdown(**{name: getattr(self, name)[index].item() for name in SECONDS})
        memory = MemoryBreakdown(**{name: getattr(self, name)[index].item() for name in BYTES})
        return Estimate(config=batch.config(index), cost=cost, memory=memory)
