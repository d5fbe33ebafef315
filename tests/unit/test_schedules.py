"""The lists of actions are those that torch's schedule classes make, and each is one whole step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch.distributed.pipelining.schedules as torch_schedules

from meshwright import InputError
from meshwright.cost_models.schedules import Action, Pass, rank_actions, rounds_size, stage_indices
from meshwright.cost_models.strategy import Schedule

TORCH: dict[Schedule, Any] = {
    Schedule.GPIPE: torch_schedules.ScheduleGPipe,
    Schedule.INTERLEAVED: torch_schedules.ScheduleInterleaved1F1B,
    Schedule.ZB_H1: torch_schedules.ScheduleInterleavedZeroBubble,
    Schedule.ZBV: torch_schedules.ScheduleZBVZeroBubble,
    Schedule.DUALPIPEV: torch_schedules.ScheduleDualPipeV,
}
COMPUTED = torch_schedules._ComputationType
KINDS = {
    COMPUTED.FORWARD: Pass.FORWARD,
    COMPUTED.FULL_BACKWARD: Pass.BACKWARD,
    COMPUTED.BACKWARD_INPUT: Pass.INPUT_GRADIENT,
    COMPUTED.BACKWARD_WEIGHT: Pass.WEIGHT_GRADIENT,
}


def torch_lists(schedule: Schedule, pp: int, vpp: int, microbatches: int) -> list[tuple[Action, ...]]:
    """What a schedule of torch works out when it is made, without the stages and process groups that it wants."""
    made = object.__new__(TORCH[schedule])
    made.pp_group_size, made.n_local_stages = pp, vpp
    made._num_stages = made.num_stages = pp * vpp
    made._n_microbatches = microbatches
    made.number_of_rounds = max(1, microbatches // pp)
    made.microbatches_per_round = microbatches // made.number_of_rounds
    if schedule is Schedule.GPIPE:
        order = made._get_pipeline_order()
        return [_actions(order[rank]) for rank in range(pp)]
    return [_actions(made._calculate_single_rank_operations(rank)) for rank in range(pp)]


def _actions(listed: Any) -> tuple[Action, ...]:
    actions = []
    for entry in listed:
        parts: tuple[Any, ...] = () if entry is None else entry.sub_actions or (entry,)
        for part in parts:
            if part.computation_type in KINDS:
                pair = len(parts) == 2 and part is parts[0]
                actions.append(Action(KINDS[part.computation_type], part.stage_index, part.microbatch_index, pair))
    return tuple(actions)


def shapes() -> list[tuple[Schedule, int, int, int]]:
    cases = []
    for schedule in TORCH:
        for pp in (1, 2, 3, 4, 7):
            vpps = {Schedule.INTERLEAVED: (2, 3), Schedule.ZBV: (2,), Schedule.DUALPIPEV: (2,)}.get(schedule, (1,))
            for vpp in vpps:
                for count in (1, 2, 3, 4, 8, 9, 14, 17, 21):
                    rounded = schedule in (Schedule.INTERLEAVED, Schedule.ZB_H1) and count % max(count // pp, 1) != 0
                    if not rounded and not (schedule is Schedule.DUALPIPEV and count < 2 * pp):
                        cases.append((schedule, pp, vpp, count))
    return cases


@pytest.mark.parametrize("schedule", TORCH)
def test_the_lists_are_those_of_torch(schedule: Schedule) -> None:
    for kind, pp, vpp, count in shapes():
        if kind is schedule:
            assert list(rank_actions(kind, pp, vpp, count)) == torch_lists(kind, pp, vpp, count), (pp, vpp, count)


def test_1f1b_by_hand() -> None:
    lists = rank_actions(Schedule.ONE_F_ONE_B, 2, 1, 3)
    words = [" ".join(f"{kind}{microbatch}" for kind, _, microbatch, _ in actions) for actions in lists]
    assert words == ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"]


@pytest.mark.parametrize(("schedule", "pp", "vpp", "count"), [(Schedule.ONE_F_ONE_B, 4, 1, 2), *shapes()])
def test_each_micro_batch_passes_each_stage_once_and_in_order(
    schedule: Schedule, pp: int, vpp: int, count: int
) -> None:
    stages = stage_indices(schedule, pp, vpp)
    for rank, actions in enumerate(rank_actions(schedule, pp, vpp, count)):
        places = {(action.kind, action.stage, action.microbatch): place for place, action in enumerate(actions)}
        assert len(places) == len(actions)
        per_stage = Counter((action.kind, action.stage) for action in actions)
        for stage in stages[rank].tolist():
            whole = per_stage[Pass.BACKWARD, stage]
            split = per_stage[Pass.INPUT_GRADIENT, stage]
            assert per_stage[Pass.FORWARD, stage] == whole + split == count
            assert per_stage[Pass.WEIGHT_GRADIENT, stage] == split
        for (kind, stage, microbatch), place in places.items():
            if kind in (Pass.BACKWARD, Pass.INPUT_GRADIENT):
                assert places[Pass.FORWARD, stage, microbatch] < place
            if kind is Pass.WEIGHT_GRADIENT:
                assert places[Pass.INPUT_GRADIENT, stage, microbatch] < place


def test_stages_are_looped_or_in_a_v() -> None:
    assert stage_indices(Schedule.INTERLEAVED, 3, 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert stage_indices(Schedule.ZBV, 3, 2).tolist() == [[0, 5], [1, 4], [2, 3]]
    assert stage_indices(Schedule.GPIPE, 2, 1).tolist() == [[0], [1]]


def test_rounds_of_torch() -> None:
    assert [rounds_size(4, count) for count in (2, 4, 8, 10)] == [2, 4, 4, 5]


def test_numbers_a_schedule_does_not_run_with_are_refused() -> None:
    with pytest.raises(InputError, match=r"interleaved: 4 micro-batches a round do not divide 9"):
        rank_actions(Schedule.INTERLEAVED, 4, 2, 9)
    with pytest.raises(InputError, match="interleaved: a round of 2 micro-batches is too short for pp=4"):
        rank_actions(Schedule.INTERLEAVED, 4, 2, 8, 2)
    with pytest.raises(InputError, match="zbv runs 2 chunks on each rank, not vpp=1"):
        rank_actions(Schedule.ZBV, 4, 1, 8)
    with pytest.raises(InputError, match="1f1b runs 1 chunk on each rank, not vpp=2"):
        rank_actions(Schedule.ONE_F_ONE_B, 4, 2, 8)
    with pytest.raises(InputError, match=r"dualpipev needs at least 2 \* pp = 8 micro-batches, found 7"):
        rank_actions(Schedule.DUALPIPEV, 4, 2, 7)
    with pytest.raises(InputError, match="gpipe needs at least 1 micro-batch, found 0"):
        rank_actions(Schedule.GPIPE, 4, 1, 0)
