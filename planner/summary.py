"""The figures that people compare plans by, derived from a plan's prediction."""

from __future__ import annotations

from meshwright import InputError
from meshwright.cost_models.flops import model_flops
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
    usable_bytes: int  # capacity less reserved
    headroom_bytes: int
    stage: int  # of the peak


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
        usable_bytes=plan.memory.capacity_bytes - plan.memory.reserved_bytes,
        headroom_bytes=plan.memory.headroom_bytes,
        stage=plan.memory.stage,
    )


def _mfu(plan: Plan, cluster: ClusterProfile, step_s: float) -> float | None:
    try:
        peak = cluster.device.efficiency("matmul", plan.workload.recipe.compute.value).peak_flops_per_s
    except InputError:
        return None
    return model_flops(plan.model, plan.workload) / (step_s * plan.config.world_size * peak)
