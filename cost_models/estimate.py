"""What an estimate says of a step: seconds and bytes by where they go, of one config or of many at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

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


class Moment(StrEnum):
    """When in a step a device holds the most."""

    BUILD = "build"  # a model made whole before it is sharded
    BACKWARD = "backward"
    GATHER = "gather"  # a unit's weights in a flat buffer, in forward
    LOSS = "loss"  # logits and their loss, forward or backward
    WEIGHTS = "weights"  # weight gradients of a whole stage, where backward is split
    REDUCTION = "reduction"  # a unit's gradients in a flat buffer
    UPDATE = "update"  # the optimizer's step


MOMENTS: tuple[Moment, ...] = tuple(Moment)
# what the tensors of a moment are; ``MemoryBreakdown`` says what belongs to each
KINDS = ("params", "grads", "optimizer", "activations", "gathered", "working", "communication")


@record
class MemoryBreakdown:
    """Bytes of the stage and the moment with the largest total; kinds are never maxed apart."""

    stage: int
    moment: Moment
    params_bytes: int  # what the modules' parameters hold; sharded they may be the master weights (FSDP2)
    grads_bytes: int
    optimizer_bytes: int  # states, and master weights that are kept apart from the parameters
    activations_bytes: int  # what forwards have left for backwards, of all micro-batches in flight
    gathered_bytes: int  # whole weights beside one's own shards
    working_bytes: int  # what exists for that moment: recomputed activations, the loss, gradients of activations
    communication_bytes: int  # flat buffers being gathered or reduced, buffers that a pipeline receives into
    fragmentation_bytes: int  # what the allocator holds on top of all tensors
    reserved_bytes: int  # context and what others hold of the device
    capacity_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All tensors at the peak, as ``torch.cuda.max_memory_allocated`` counts them."""
        return int(sum(getattr(self, f"{name}_bytes") for name in KINDS))

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


def step_seconds(seconds: Mapping[str, FloatArray]) -> FloatArray:
    """Seconds of one optimizer step: the sum of the exposed parts, in the order of ``CostBreakdown``."""
    total = np.zeros_like(seconds["compute_s"])
    for name in SECONDS:
        if name != "hidden_s":
            total = total + seconds[name]
    return total


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
    moment: IntArray  # positions in MOMENTS
    params_bytes: IntArray
    grads_bytes: IntArray
    optimizer_bytes: IntArray
    activations_bytes: IntArray
    gathered_bytes: IntArray
    working_bytes: IntArray
    communication_bytes: IntArray
    fragmentation_bytes: IntArray
    reserved_bytes: IntArray
    capacity_bytes: IntArray

    @property
    def step_s(self) -> FloatArray:
        """Seconds of one optimizer step."""
        return step_seconds({name: getattr(self, name) for name in SECONDS})

    @property
    def peak_bytes(self) -> IntArray:
        """All tensors at the peak, as ``torch.cuda.max_memory_allocated`` counts them."""
        return np.asarray(sum(getattr(self, f"{name}_bytes") for name in KINDS), dtype=np.int64)

    @property
    def fits(self) -> BoolArray:
        """Whether the peak is at most capacity less reserved."""
        return self.peak_bytes <= self.capacity_bytes - self.reserved_bytes

    def estimate(self, index: int, batch: ConfigBatch) -> Estimate:
        """The config at one position of ``batch`` with its breakdowns, as a record."""
        cost = CostBreakdown(**{name: getattr(self, name)[index].item() for name in SECONDS})
        whole: dict[str, Any] = {name: getattr(self, name)[index].item() for name in BYTES}
        memory = MemoryBreakdown(**whole | {"moment": MOMENTS[whole["moment"]]})
        return Estimate(config=batch.config(index), cost=cost, memory=memory)
