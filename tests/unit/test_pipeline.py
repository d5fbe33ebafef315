"""Bulk makespans against textbook formulas and against schedules played action by action."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshwright import InputError
from meshwright.cost_models import pipeline
from meshwright.cost_models.player import BLOCKING, by_stage, play
from meshwright.cost_models.schedules import Pass, rank_actions, rounds_size, stage_indices
from meshwright.cost_models.strategy import SPLIT_BACKWARD, Schedule

PASSES = ("forward", "backward_input", "backward_weight")
CHUNKS = {Schedule.ZBV: (2,), Schedule.DUALPIPEV: (2,), Schedule.INTERLEAVED: (2, 3, 4)}


def bulk_and_played(
    schedule: Schedule, forward: Any, backward_input: Any, backward_weight: Any, hop: Any, count: int, size: int = 0
) -> tuple[Any, Any]:
    """When each rank ends, in bulk and played: ``[num_configs, pp]``, from stages ``[num_configs, pp, vpp]``."""
    num_configs, pp, _ = forward.shape
    size = size or rounds_size(pp, count)
    counts, sizes = np.full(num_configs, count), np.full(num_configs, size)
    bulk = pipeline.finish(schedule, forward, backward_input, backward_weight, hop, counts, sizes)
    stages = [by_stage(schedule, seconds) for seconds in (forward, backward_input, backward_weight)]
    return bulk, play(schedule, pp, count, stages[0], stages[1], stages[2], hop, per_round=size).finish


def equal(pp: int, vpp: int, *, hop: float = 0.0) -> dict[str, Any]:
    """One config whose passes take 2, 3 and 2."""
    passes = {name: np.full((1, pp, vpp), seconds) for name, seconds in zip(PASSES, (2.0, 3.0, 2.0), strict=True)}
    return {**passes, "hop": np.full((1, pp * vpp - 1), hop)}


@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 2), (4, 8), (8, 9), (4, 100)])
def test_equal_stages_take_the_textbook_time(pp: int, m: int) -> None:
    counts = np.array([m])
    for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B):
        got = pipeline.makespan(schedule, **equal(pp, 1), microbatches=counts, per_round=counts)
        assert got == pytest.approx([(m + pp - 1) * 7.0])


@pytest.mark.parametrize(("pp", "vpp", "m"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (4, 2, 100)])
def test_equal_chunks_divide_the_bubble(pp: int, vpp: int, m: int) -> None:
    got = pipeline.makespan(
        Schedule.INTERLEAVED, **equal(pp, vpp), microbatches=np.array([m]), per_round=np.array([pp])
    )
    assert got == pytest.approx([m * 7.0 * vpp + (pp - 1) * 7.0])


def test_zero_bubble_h1_has_a_third_of_the_bubble_where_all_passes_take_the_same() -> None:
    # Qi et al. 2023, arXiv 2401.10241, table 2: (pp - 1)(f + bi - bw)
    ones: dict[str, Any] = {name: np.ones((1, 4, 1)) for name in PASSES}
    got = pipeline.makespan(
        Schedule.ZB_H1, **ones, hop=np.zeros((1, 3)), microbatches=np.array([50]), per_round=np.array([4])
    )
    assert got == pytest.approx([50 * 3.0 + 3.0])


def test_transfers_slow_the_steady_state_of_one_f_one_b() -> None:
    # pp 2, f 1, b 2, x 0.5: rank 0 sends two forwards per round trip of 3 + 3 + 1, so 7 for two micro-batches
    columns: dict[str, Any] = {name: np.ones((1, 2, 1)) for name in PASSES}
    for count in (8, 80):
        got = pipeline.makespan(
            Schedule.ONE_F_ONE_B,
            **columns,
            hop=np.array([[0.5]]),
            microbatches=np.array([count]),
            per_round=np.array([2]),
        )
        assert got == pytest.approx([3 + 3 * count + count / 2])


def shapes(schedule: Schedule, rng: np.random.Generator, num: int) -> list[tuple[int, int, int, int]]:
    """Random ``(pp, vpp, microbatches, per_round)`` that the schedule runs with."""
    found = []
    for _ in range(num):
        pp, vpp = int(rng.choice([2, 3, 4, 5, 8])), int(rng.choice(CHUNKS.get(schedule, (1,))))
        size = int(rng.integers(pp, 2 * pp)) if schedule is Schedule.INTERLEAVED else 1
        least = 2 * pp if schedule is Schedule.DUALPIPEV else 1
        count = size * int(rng.integers(1, 8)) if schedule is Schedule.INTERLEAVED else int(rng.integers(least, 8 * pp))
        found.append((pp, vpp, count, size))
    return found


def random_stages(rng: np.random.Generator, num_configs: int, pp: int, vpp: int) -> dict[str, Any]:
    """Passes of any length, some of them nothing, with transfers from none to longer than the passes."""
    passes = {name: rng.lognormal(0.0, rng.choice([0.1, 0.5, 1.0]), (num_configs, pp, vpp)) for name in PASSES}
    passes["backward_input"][rng.random((num_configs, pp, vpp)) < 0.02] = 0.0
    scale = rng.choice([0.0, 0.1, 1.0, 3.0], (num_configs, 1))
    return {**passes, "hop": scale * rng.random((num_configs, pp * vpp - 1))}


@pytest.mark.parametrize("schedule", Schedule)
def test_never_above_the_played_step(schedule: Schedule) -> None:
    """10,000 random pipelines over the six schedules, each rank's end as well as the last."""
    rng = np.random.default_rng(11)
    for pp, vpp, count, size in shapes(schedule, rng, 48):
        bulk, played = bulk_and_played(schedule, **random_stages(rng, 35, pp, vpp), count=count, size=size)
        assert (bulk <= played * (1 + 1e-9)).all(), (pp, vpp, count, size)


@pytest.mark.parametrize("schedule", Schedule)
def test_equal_stages_are_played_ones(schedule: Schedule) -> None:
    """Within 2 % with transfers up to a forward pass, and backwards of one to three times the forward."""
    rng = np.random.default_rng(12)
    for pp, vpp, count, _ in shapes(schedule, rng, 60):
        rounded = max(count // pp, 1) * pp
        ones = np.ones((12, pp, vpp))
        backward = ones * np.repeat([0.5, 1.0, 1.5], 4)[:, None, None]
        hop = np.tile([0.0, 0.05, 0.3, 1.0], 3)[:, None] * np.ones((12, pp * vpp - 1))
        rounded = max(rounded, 2 * pp) if schedule is Schedule.DUALPIPEV else rounded
        bulk, played = bulk_and_played(schedule, ones, backward, backward, hop, rounded)
        assert (bulk.max(axis=1) >= 0.98 * played.max(axis=1)).all(), (pp, vpp, rounded)


@pytest.mark.parametrize("schedule", Schedule)
def test_unequal_stages_are_nearly_played_ones(schedule: Schedule) -> None:
    """Layers that do not divide, an embedding, a head of up to three layers, transfers up to a tenth of a stage."""
    rng = np.random.default_rng(13)
    ratios = []
    for pp, vpp, count, size in shapes(schedule, rng, 40):
        layers: Any = rng.integers(3, 8, (25, 1, 1)) + rng.integers(0, 2, (25, pp, vpp)).astype(np.float64)
        last = np.argwhere(stage_indices(schedule, pp, vpp) == pp * vpp - 1)[0]
        layers[:, last[0], last[1]] += rng.uniform(0, 3, 25)
        layers[:, 0, 0] += rng.uniform(0, 0.5, 25)
        hop = np.full((25, pp * vpp - 1), 0.1) * layers.mean()
        bulk, played = bulk_and_played(schedule, layers, layers, layers, hop, count, size)
        ratios.append(bulk.max(axis=1) / played.max(axis=1))
    every = np.concatenate(ratios)
    assert np.median(every) > 0.998
    assert np.quantile(every, 0.05) > 0.97
    assert every.min() > 0.9


@pytest.mark.parametrize("schedule", BLOCKING)
def test_blocking_sends_in_bulk(schedule: Schedule) -> None:
    rng = np.random.default_rng(14)
    for pp, vpp, count, _ in shapes(schedule, rng, 25):
        for stages, least in ((random_stages(rng, 20, pp, vpp), 0.0), (equal(pp, vpp, hop=0.5), 1 - 1e-9)):
            counts = np.full(len(stages["hop"]), count)
            bulk = pipeline.finish(schedule, **stages, microbatches=counts, per_round=counts, blocking_sends=True)
            flat = {name: stages[name][:, :, 0] for name in PASSES} | {"hop": stages["hop"]}
            played = play(schedule, pp, count, **flat, blocking_sends=True).finish
            assert (bulk <= played * (1 + 1e-9)).all(), (pp, count)
            if count >= pp:
                assert (bulk.max(axis=1) >= least * played.max(axis=1)).all(), (pp, count)


def test_ranks_finish_when_played_ones_do() -> None:
    for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED):
        bulk, played = bulk_and_played(
            schedule, **equal(4, 2 if schedule is Schedule.INTERLEAVED else 1, hop=0.1), count=24
        )
        assert bulk[0].tolist() == pytest.approx(played[0].tolist())
        assert bulk[0, 0] > bulk[0, 3]


def test_configs_with_different_micro_batches_are_worked_out_together() -> None:
    rng = np.random.default_rng(3)
    columns = random_stages(rng, 9, 4, 2)
    counts, sizes = np.array([4, 8, 12, 24, 60, 5, 6, 30, 100]), np.array([4, 4, 4, 4, 4, 5, 6, 5, 4])
    together = pipeline.finish(Schedule.INTERLEAVED, **columns, microbatches=counts, per_round=sizes)
    for index in range(9):
        some = slice(index, index + 1)
        one = {name: column[some] for name, column in columns.items()}
        alone = pipeline.finish(Schedule.INTERLEAVED, **one, microbatches=counts[some], per_round=sizes[some])
        assert together[index].tolist() == pytest.approx(alone[0].tolist())


def test_what_does_not_run_is_refused() -> None:
    with pytest.raises(InputError, match="interleaved: 4 micro-batches a round do not divide 41"):
        pipeline.finish(Schedule.INTERLEAVED, **equal(4, 2), microbatches=np.array([41]), per_round=np.array([4]))
    counts = np.array([8])
    with pytest.raises(InputError, match="blocking sends are modelled for gpipe and 1f1b, not for zb-h1"):
        pipeline.finish(Schedule.ZB_H1, **equal(4, 1), microbatches=counts, per_round=counts, blocking_sends=True)


@pytest.mark.parametrize(("pp", "m"), [(1, 4), (4, 8), (4, 3), (2, 4), (3, 3), (4, 40)])
@pytest.mark.parametrize("schedule", Schedule)
def test_micro_batches_held_are_those_of_the_action_lists(schedule: Schedule, pp: int, m: int) -> None:
    vpp = CHUNKS.get(schedule, (1,))[0]
    m = max(m, 2 * pp) if schedule is Schedule.DUALPIPEV else m
    stages = stage_indices(schedule, pp, vpp)
    size = rounds_size(pp, m)
    for rank, actions in enumerate(rank_actions(schedule, pp, vpp, m)):
        held, at_peak = dict.fromkeys(stages[rank].tolist(), 0), [0] * vpp
        for action in actions:
            if action.kind is Pass.FORWARD:
                held[action.stage] += 1
            elif action.kind is not Pass.WEIGHT_GRADIENT:
                held[action.stage] -= 1
            if sum(held.values()) > sum(at_peak):
                at_peak = list(held.values())
        got = pipeline.held_microbatches(schedule, pp, vpp, rank, np.array([m]), np.array([size]))
        assert got.sum() == sum(at_peak), rank
        if schedule not in SPLIT_BACKWARD:
            assert got.tolist() == [at_peak], rank


@pytest.mark.parametrize(
    ("schedule", "rank", "expected"),
    [
        # held and waiting of each chunk, on lists of 4 ranks and 8 micro-batches written down and counted by hand
        (Schedule.ONE_F_ONE_B, 1, [((3,), (0,))]),
        (Schedule.ZB_H1, 0, [((4,), (0,)), ((3,), (1,))]),  # F F F F I W
        (Schedule.ZB_H1, 3, [((1,), (3,)), ((0,), (4,))]),  # F I F I F I F I, then the first W
        (Schedule.ZBV, 0, [((7, 1), (0, 0)), ((8, 0), (0, 0)), ((7, 0), (0, 1)), ((7, 0), (1, 0))]),
        # four forwards of each chunk in the warm-up; in the cool-down the input gradients of both come first
        (
            Schedule.ZBV,
            3,
            [((4, 4), (0, 0)), ((5, 3), (0, 0)), ((4, 3), (0, 1)), ((4, 3), (1, 0)), ((0, 0), (4, 3))],
        ),
        (Schedule.DUALPIPEV, 3, [((5, 4), (0, 0)), ((0, 0), (2, 2))]),
    ],
)
def test_what_waits_for_its_weight_gradients(
    schedule: Schedule, rank: int, expected: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    vpp = CHUNKS.get(schedule, (1,))[0]
    got = pipeline.holdings(schedule, 4, vpp, rank, np.array([8, 8]), np.array([4, 4]))
    assert got.shape == (len(expected), 2, 2, vpp)
    assert {(tuple(held), tuple(waiting)) for held, waiting in got[:, :, 1].tolist()} == set(expected)
    assert sum(got[0, 0, 0]) == max(sum(held) for held, _ in expected)


def test_moments_of_configs_with_unlike_numbers_of_micro_batches() -> None:
    got = pipeline.holdings(Schedule.ZBV, 4, 2, 3, np.array([1, 8]), np.array([1, 4]))
    assert got[0, 0].tolist() == [[1, 1], [4, 4]]
    assert [1, 0] in got[:, 0, 0].tolist() and [4, 3] in got[:, 1, 1].tolist()
