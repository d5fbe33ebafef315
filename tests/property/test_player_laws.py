"""Laws of pipelines: of played schedules, and of the bulk form against them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost_models import pipeline
from meshwright.cost_models.player import BLOCKING, play, timeline
from meshwright.cost_models.schedules import Pass, stage_indices
from meshwright.cost_models.strategy import LOOPED, V_SHAPED, Schedule

LAWS = settings(max_examples=60, deadline=None)
SECONDS = st.floats(0.01, 10.0)
SPLIT = (Schedule.ZB_H1, Schedule.ZBV, Schedule.DUALPIPEV)
ROUNDING = 1e-9
PASSES = ("forward", "backward_input", "backward_weight")


@st.composite
def pipelines(draw: Any, schedules: tuple[Schedule, ...] = tuple(Schedule)) -> dict[str, Any]:
    """Arguments of ``play`` for one config of random stages."""
    schedule = draw(st.sampled_from(schedules))
    pp = draw(st.integers(1 if schedule not in LOOPED else 2, 5))
    vpp = 2 if schedule in V_SHAPED else draw(st.integers(2, 3)) if schedule in LOOPED else 1
    count = draw(st.integers(2 * pp if schedule is Schedule.DUALPIPEV else 1, 3 * pp + 2))
    stages = pp * vpp
    columns = {name: np.array([draw(st.lists(SECONDS, min_size=stages, max_size=stages))]) for name in PASSES}
    hop = np.array([draw(st.lists(st.floats(0.0, 5.0), min_size=stages - 1, max_size=stages - 1))])
    rounds = draw(st.integers(1, 4)) if schedule in LOOPED and count >= pp else 1
    return {
        "schedule": schedule, "pp": pp, "microbatches": count * rounds, **columns, "hop": hop.reshape(1, stages - 1),
        "per_round": count,
    }  # fmt: skip


def makespan(game: dict[str, Any], **changed: Any) -> float:
    return float(play(**(game | changed)).makespan[0])


@LAWS
@given(game=pipelines())
def test_no_step_is_shorter_than_a_rank_s_work_or_one_micro_batch_s_way(game: dict[str, Any]) -> None:
    played = play(**game)
    assert (played.makespan[0] >= played.busy[0] * (1 - ROUNDING)).all()
    ranks = np.argsort(stage_indices(game["schedule"], game["pp"], game["forward"].shape[1] // game["pp"]), axis=None)
    ranks = ranks // (game["forward"].shape[1] // game["pp"])  # of each stage
    hops = game["hop"][0][ranks[1:] != ranks[:-1]].sum()
    way = game["forward"].sum() + game["backward_input"].sum() + 2 * hops
    if game["schedule"] not in SPLIT:
        way += game["backward_weight"].sum()
    assert played.makespan[0] >= way * (1 - ROUNDING)
    assert 0 <= played.bubble_share[0] + ROUNDING < 1


@LAWS
@given(game=pipelines())
def test_the_timeline_tells_what_was_played(game: dict[str, Any]) -> None:
    played = play(**game)
    flat = {name: value[0] if isinstance(value, np.ndarray) else value for name, value in game.items()}
    entries = timeline(**flat)
    for rank in range(game["pp"]):
        own = [entry for entry in entries if entry.rank == rank]
        assert all(before.end_s <= after.start_s + 1e-6 for before, after in pairwise(own))
        assert own[-1].end_s == played.finish[0, rank]
        assert np.isclose(sum(entry.end_s - entry.start_s for entry in own), played.busy[0, rank])
    ends = {(entry.kind, entry.stage, entry.microbatch): entry.end_s for entry in entries}
    for entry in entries:
        if entry.kind is Pass.FORWARD and entry.stage:
            assert entry.start_s >= ends[Pass.FORWARD, entry.stage - 1, entry.microbatch] - 1e-6


@LAWS
@given(game=pipelines())
def test_more_micro_batches_are_never_faster(game: dict[str, Any]) -> None:
    more = game["per_round"] if game["schedule"] in LOOPED else 1
    if game["schedule"] in LOOPED and more < game["pp"]:
        return  # a round this short is the only one
    assert makespan(game, microbatches=game["microbatches"] + more) >= makespan(game) * (1 - ROUNDING)


@LAWS
@given(game=pipelines(), share=st.floats(0.0, 1.0))
def test_faster_transfers_never_make_a_step_slower(game: dict[str, Any], share: float) -> None:
    assert makespan(game, hop=game["hop"] * share) <= makespan(game) * (1 + ROUNDING)


@LAWS
@given(game=pipelines(BLOCKING))
def test_blocking_sends_never_make_a_step_faster(game: dict[str, Any]) -> None:
    assert makespan(game, blocking_sends=True) >= makespan(game) * (1 - ROUNDING)


@LAWS
@given(game=pipelines())
def test_the_bulk_form_is_never_above_the_played_step(game: dict[str, Any]) -> None:
    played = play(**game)
    schedule, pp = game["schedule"], game["pp"]
    stages = stage_indices(schedule, pp, game["forward"].shape[1] // pp)
    passes: dict[str, Any] = {name: game[name][:, stages] for name in PASSES}
    counts, sizes = np.array([game["microbatches"]]), np.array([game["per_round"]])
    bulk = pipeline.finish(schedule, **passes, hop=game["hop"], microbatches=counts, per_round=sizes)
    assert (bulk <= played.finish * (1 + ROUNDING)).all()


@LAWS
@given(pp=st.integers(1, 8), more=st.integers(0, 12), forward=SECONDS, backward=SECONDS)
def test_the_bubble_of_equal_1f1b(pp: int, more: int, forward: float, backward: float) -> None:
    count = pp + more
    f, half = np.full((1, pp), forward), np.full((1, pp), backward / 2)
    played = play(Schedule.ONE_F_ONE_B, pp, count, f, half, half, hop=np.zeros((1, pp - 1)))
    assert np.isclose(played.bubble_share[0], (pp - 1) / (count + pp - 1))


@LAWS
@given(
    schedule=st.sampled_from(SPLIT), pp=st.integers(1, 6), more=st.integers(0, 12),
    forward=SECONDS, backward_input=SECONDS, backward_weight=SECONDS,
)  # fmt: skip
def test_zero_bubble_is_never_slower_than_1f1b_on_equal_stages(
    schedule: Schedule, pp: int, more: int, forward: float, backward_input: float, backward_weight: float
) -> None:
    count, vpp = 2 * pp + more, 2 if schedule in V_SHAPED else 1
    seconds = dict(zip(PASSES, (forward, backward_input, backward_weight), strict=True))
    one: dict[str, Any] = {name: np.full((1, pp), value) for name, value in seconds.items()}
    split: dict[str, Any] = {name: np.full((1, pp * vpp), value / vpp) for name, value in seconds.items()}
    plain = play(Schedule.ONE_F_ONE_B, pp, count, **one, hop=np.zeros((1, pp - 1)))
    zero = play(schedule, pp, count, **split, hop=np.zeros((1, pp * vpp - 1)))
    assert zero.makespan[0] <= plain.makespan[0] * (1 + ROUNDING)
