"""What the bulk form rests on: a long list is a short one with its slab repeated, and slabs wait for nothing later."""

from __future__ import annotations

import pytest

from meshwright.cost_models.player import transfers
from meshwright.cost_models.schedules import rank_actions, stage_indices
from meshwright.cost_models.short_lists import shortest, slabs
from meshwright.cost_models.strategy import Schedule

CASES = [
    (schedule, pp, vpp, per_round)
    for schedule in Schedule
    if schedule is not Schedule.GPIPE  # has a closed form
    for pp in (1, 2, 3, 4, 5, 8, 13)
    for vpp in {Schedule.INTERLEAVED: (2, 3, 5), Schedule.ZBV: (2,), Schedule.DUALPIPEV: (2,)}.get(schedule, (1,))
    for per_round in ((pp, pp + 1, 2 * pp - 1) if schedule is Schedule.INTERLEAVED else (1,))
]


@pytest.mark.parametrize(("schedule", "pp", "vpp", "per_round"), CASES)
def test_a_longer_list_has_the_slab_once_more(schedule: Schedule, pp: int, vpp: int, per_round: int) -> None:
    least = shortest(schedule, pp)
    for periods in (least, least + 1, least + pp):
        short, long = (
            rank_actions(schedule, pp, vpp, count * per_round, per_round) for count in (periods, periods + 3)
        )
        for slab, before, after in zip(slabs(schedule, pp, vpp, per_round), short, long, strict=True):
            repeated = [
                action._replace(microbatch=action.microbatch + more * per_round)
                for more in (1, 2, 3)
                for action in before[slab]
            ]
            behind = [a._replace(microbatch=a.microbatch + 3 * per_round) for a in before[slab.stop :]]
            assert list(after) == [*before[: slab.stop], *repeated, *behind]


@pytest.mark.parametrize(("schedule", "pp", "vpp", "per_round"), CASES)
def test_no_slab_waits_for_what_is_behind_another(schedule: Schedule, pp: int, vpp: int, per_round: int) -> None:
    lists = rank_actions(schedule, pp, vpp, shortest(schedule, pp) * per_round, per_round)
    ends = [slab.stop for slab in slabs(schedule, pp, vpp, per_round)]
    for sender, leaves, receiver, needed, _ in transfers(lists, stage_indices(schedule, pp, vpp)):
        assert leaves < ends[sender] or needed >= ends[receiver]
