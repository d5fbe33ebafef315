"""torch's own schedules, run on gloo ranks whose passes sleep for known times, take as long as the player says."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining as pipelining
from torch import Tensor, nn

from meshwright.cost_models.player import play
from meshwright.cost_models.schedules import Pass, rank_actions, stage_indices
from meshwright.cost_models.strategy import Schedule
from meshwright.profiler.launch import Rank, run_ranks

pytestmark = pytest.mark.multiprocess

PP, MICROBATCHES, TRIES = 3, 6, 3
TORCH: dict[Schedule, Any] = {
    Schedule.GPIPE: pipelining.ScheduleGPipe,
    Schedule.ONE_F_ONE_B: pipelining.Schedule1F1B,
    Schedule.INTERLEAVED: pipelining.ScheduleInterleaved1F1B,
    Schedule.ZB_H1: pipelining.ScheduleInterleavedZeroBubble,
    Schedule.ZBV: pipelining.ScheduleZBVZeroBubble,
    Schedule.DUALPIPEV: pipelining.ScheduleDualPipeV,
}
Seconds = np.ndarray[Any, np.dtype[np.float64]]  # [3, num_stages]: forward, input gradient, weight gradient
Sleeps = list[tuple[Pass, int, float]]  # kind, stage, when it ended


class SlowGradient(torch.autograd.Function):
    """Returns a copy of its input; its gradient takes a while."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, stage: SleepingStage, kind: Pass) -> Tensor:
        ctx.stage, ctx.kind = stage, kind
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.stage.sleep(ctx.kind)
        return grads[0].contiguous(), None, None


class SleepingStage(nn.Module):
    """A stage whose passes sleep; input and weight gradients are nodes of their own, so that torch can split them."""

    def __init__(self, index: int, seconds: Seconds, sleeps: Sleeps) -> None:
        super().__init__()
        self.index, self.sleeps, self.awake = index, sleeps, True
        kinds = (Pass.FORWARD, Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT)
        self.seconds: dict[Pass, float] = dict(zip(kinds, seconds[:, index].tolist(), strict=True))
        self.weight = nn.Parameter(torch.ones(4))

    def sleep(self, kind: Pass) -> None:
        if not self.awake:
            time.sleep(self.seconds[kind])
            self.sleeps.append((kind, self.index, time.monotonic()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.sleep(Pass.FORWARD)
        weight = SlowGradient.apply(self.weight, self, Pass.WEIGHT_GRADIENT)
        return SlowGradient.apply(hidden, self, Pass.INPUT_GRADIENT) + weight


def run_rank(rank: Rank, schedule: Schedule, vpp: int, seconds: Seconds) -> tuple[float, Sleeps]:
    """A step of one rank: when it started, and its sleeps."""
    sleeps: Sleeps = []
    modules = [SleepingStage(int(index), seconds, sleeps) for index in stage_indices(schedule, PP, vpp)[rank.rank]]
    example = torch.empty(1, 4, device="meta", requires_grad=True)
    stages = [
        pipelining.PipelineStage(
            module, module.index, PP * vpp, torch.device("cpu"), input_args=(example,), output_args=(example,)
        )
        for module in modules
    ]
    made = TORCH[schedule](
        stages[0] if schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B) else stages,
        MICROBATCHES,
        loss_fn=lambda output, target: output.sum(),
        scale_grads=False,
    )
    inputs = (torch.ones(MICROBATCHES, 4),) if modules[0].index == 0 else ()
    for awake in (True, False):  # the first step connects the ranks
        for module in modules:
            module.awake = awake
        dist.barrier()
        start = time.monotonic()
        made.step(*inputs, target=torch.ones(MICROBATCHES, 4), return_outputs=False)
    return start, sleeps


def pass_seconds(num_stages: int, *, equal: bool) -> Seconds:
    """Of each kind of pass on each stage: long against what torch needs around a pass, one to two milliseconds."""
    scale = np.ones(num_stages) if equal else 0.7 + 0.6 * ((np.arange(num_stages) * 7) % 5) / 4
    return np.array([[0.05], [0.06], [0.055]]) * scale


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("schedule", TORCH)
def test_played_times_are_those_of_torch(schedule: Schedule, equal: bool) -> None:
    vpp = 1 if schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZB_H1) else 2
    seconds = pass_seconds(PP * vpp, equal=equal)
    forward, backward_input, backward_weight = (row[None].copy() for row in seconds)
    backward_input[:, 0] = 0.0  # the first stage's input has no gradient
    hops = np.zeros((1, PP * vpp - 1))
    played = play(schedule, PP, MICROBATCHES, forward, backward_input, backward_weight, hops)
    errors = []
    for _ in range(TRIES):  # the machine may be busy
        step = run_ranks(run_rank, PP, schedule, vpp, seconds, timeout_s=60)
        for rank, (_, sleeps) in enumerate(step):
            assert passes_of(sleeps) == expected_passes(schedule, vpp, rank)
        start = min(begun for begun, _ in step)
        ends = np.array([sleeps[-1][2] - start for _, sleeps in step])
        errors.append(float(np.abs(ends / played.finish[0] - 1.0).max()))
        if errors[-1] < 0.05:
            return
    pytest.fail(f"off by {errors} of {played.finish[0]} s")


def passes_of(sleeps: Sleeps) -> list[tuple[Pass, int]]:
    return [(kind, stage) for kind, stage, _ in sleeps]


def expected_passes(schedule: Schedule, vpp: int, rank: int) -> list[tuple[Pass, int]]:
    """The passes that sleep, in order: a whole backward does both, the first stage's input has no gradient."""
    parts = {Pass.BACKWARD: (Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT)}
    return [
        (kind, action.stage)
        for action in rank_actions(schedule, PP, vpp, MICROBATCHES)[rank]
        for kind in parts.get(action.kind, (action.kind,))
        if kind is not Pass.INPUT_GRADIENT or action.stage > 0
    ]
