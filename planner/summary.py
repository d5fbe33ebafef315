"""The figures that people compare plans by, derived from a plan's prediction."""

from __future__ import annotations

import numpy as np

from meshwright import InputError
from meshwright.cost_models.estimate import MemoryBreakdown
from meshwright.cost_models.flops import model_flops
from meshwright.cost_models.margin import MemoryMargin, needed_bytes
from meshwright.planner.plan import Plan
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.record import record


@record
class Summary:
    """Speed, use and room of a plan. ``mfu`` is ``None`` where the device's peak in that dtype is not known."""

    step_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float | None  # model FLOPs over what all devices could do at their peak in the step's time
    bubble_share: float  # of the step
    peak_bytes: int
    needed_bytes: int  # with fragmentation and margin, where the plan keeps one
    usable_bytes: int  # capacity less reserved
    headroom_bytes: int  # usable less peak
    stage: int  # of the peak

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is at most what the device offers."""
        return self.peak_bytes <= self.usable_bytes

    @property
    def recommended(self) -> bool:
        """Whether it is so with fragmentation and margin."""
        return self.needed_bytes <= self.usable_bytes


def summarize(plan: Plan, cluster: ClusterProfile) -> Summary:
    """Figures of a plan with a prediction. Raises ``InputError`` for a plan without one."""
    if plan.cost is None or plan.memory is None:
        raise InputError("this plan carries no prediction: price it with meshwright estimate")
    step_s, world = plan.cost.step_s, plan.config.world_size
    tokens_per_s = plan.workload.tokens_per_step / step_s
    return Summary(
        step_s=step_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_device=tokens_per_s / world,
        mfu=_mfu(plan, cluster, step_s),
        bubble_share=plan.cost.bubble_s / step_s,
        peak_bytes=plan.memory.peak_bytes,
        needed_bytes=needed_of(plan.memory, plan.memory_margin),
        usable_bytes=plan.memory.capacity_bytes - plan.memory.reserved_bytes,
        headroom_bytes=plan.memory.headroom_bytes,
        stage=plan.memory.stage,
    )


def needed_of(memory: MemoryBreakdown, margin: MemoryMargin | None) -> int:
    """What a device must offer for a plan to be taken, in whole bytes."""
    needed = needed_bytes(np.asarray(memory.peak_bytes), np.asarray(memory.fragmentation_bytes), margin)
    return int(np.ceil(needed))


def _mfu(plan: Plan, cluster: ClusterProfile, step_s: float) -> float | None:
    try:
        peak = cluster.device.efficiency("matmul", plan.workload.recipe.compute.value).peak_flops_per_s
    except InputError:
        return None
    return model_flops(plan.model, plan.workload) / (step_s * plan.config.world_size * peak)
