"""Targets: what runs a plan, which configs it supports, and what its ZeRO, recompute and schedules really mean.

A plan is for something that runs it. Only what the target executes is searched; the rest is rejected as
NOT_IN_FRAMEWORK and counted.
"""

from __future__ import annotations

from meshwright import InputError
from meshwright.cost_models.strategy import BoolArray, ConfigBatch, Recompute, Schedule
from meshwright.profiler.record import record


@record
class Framework:
    """Traits of a target, each a fact about its code.

    ``overlap_*`` is the share of that communication which the target starts early enough to hide behind compute,
    0 (exposed) to 1; what is hidden still cannot exceed the compute it hides behind.
    """

    name: str
    schedules: tuple[Schedule, ...]
    zero_stages: tuple[int, ...]
    recomputes: tuple[Recompute, ...]
    context_parallel: bool
    expert_parallel: bool
    partial_sharding: bool  # dp_shard below dp * cp (HSDP)
    vocab_parallel: bool  # splits embedding and head by vocabulary whenever tp > 1
    overlap_dp_reduce: float
    overlap_zero3_gather: float
    overlap_tp: float
    overlap_pp: float


MESHWRIGHT = Framework(
    name="meshwright",
    schedules=(Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED),
    zero_stages=(0, 1, 2, 3),
    recomputes=(Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL),
    context_parallel=False,
    expert_parallel=False,
    partial_sharding=False,
    vocab_parallel=True,
    overlap_dp_reduce=0.0,
    overlap_zero3_gather=0.0,
    overlap_tp=0.0,
    overlap_pp=0.0,
)

FRAMEWORKS: dict[str, Framework] = {"meshwright": MESHWRIGHT}


def framework_named(name: str) -> Framework:
    """The target of that name. Raises ``InputError`` naming the known ones."""
    try:
        return FRAMEWORKS[name]
    except KeyError:
        raise InputError(f"unknown framework {name!r}: expected one of {', '.join(FRAMEWORKS)}") from None


def supported(batch: ConfigBatch, framework: Framework, num_microbatches: BoolArray) -> BoolArray:
    """Mask of the configs that the target executes; shape ``[num_configs]``."""
    raise NotImplementedError
