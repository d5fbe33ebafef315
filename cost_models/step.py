"""The composition: compute, communication, pipeline and memory of a config -> an estimate of its step."""

from __future__ import annotations

from dataclasses import fields

from meshwright.cost_models.strategy import ParallelConfig
from meshwright.profiler.record import record


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
