"""Makespans against textbook formulas and against schedules played action by action."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from meshwright.cost_models import pipeline

Action = tuple[str, int, int]  # F or B, stage, micro-batch


def play(orders: list[list[Action]], seconds: dict[tuple[str, int], float], hop: list[float], pp: int) -> list[float]:
    """When each rank ends its last action: ranks run their lists in order, each action after what it needs arrived."""
    last_stage = max(stage for order in orders for _, stage, _ in order)
    done: dict[Action, float] = {}
    clock, place = [0.0] * pp, [0] * pp
    while any(place[rank] < len(orders[rank]) for rank in range(pp)):
        moved = False
        for rank in range(pp):
            while place[rank] < len(orders[rank]):
                kind, stage, micro = action = orders[rank][place[rank]]
                ready = 0.0
                if kind == "F" and stage:
                    needs: Action | None = ("F", stage - 1, micro)
                elif kind == "B":
                    needs = ("B", stage + 1, micro) if stage < last_stage else ("F", stage, micro)
                else:
                    needs = None
                if needs:
                    if needs not in done:
                        break
                    ready = done[needs] + (hop[min(stage, needs[1])] if needs[1] != stage else 0.0)
                clock[rank] = max(clock[rank], ready) + seconds[kind, stage]
                done[action] = clock[rank]
                place[rank] += 1
                moved = True
        assert moved, "the schedule is stuck"
    return clock


def gpipe_orders(pp: int, m: int) -> list[list[Action]]:
    return [[("F", rank, i) for i in range(m)] + [("B", rank, i) for i in range(m)] for rank in range(pp)]


def one_f_one_b_orders(pp: int, m: int) -> list[list[Action]]:
    orders = []
    for rank in range(pp):
        warm = min(pp - rank, m)
        order: list[Action] = [("F", rank, i) for i in range(warm)]
        for i in range(m):
            order.append(("B", rank, i))
            if warm + i < m:
                order.append(("F", rank, warm + i))
        orders.append(order)
    return orders


def interleaved_orders(pp: int, vpp: int, m: int) -> list[list[Action]]:
    """As torch orders it: warm-up forwards, then forward and backward in turn, then the backwards left."""
    per_round = m // max(m // pp, 1)
    orders = []
    for rank in range(pp):
        warm = min((vpp - 1) * per_round + 2 * (pp - 1 - rank), m * vpp)
        forwards = _rounds(vpp, m, per_round, rank, pp, reverse=False)
        backwards = _rounds(vpp, m, per_round, rank, pp, reverse=True)
        order: list[Action] = [("F", *item) for item in forwards[:warm]]
        for i, item in enumerate(forwards[warm:]):
            order += [("F", *item), ("B", *backwards[i])]
        orders.append(order + [("B", *item) for item in backwards[len(forwards) - warm :]])
    return orders


def _rounds(vpp: int, m: int, per_round: int, rank: int, pp: int, *, reverse: bool) -> list[tuple[int, int]]:
    done = [0] * vpp
    items = []
    for step in range(m * vpp):
        chunk = (step // per_round) % vpp
        chunk = vpp - 1 - chunk if reverse else chunk
        items.append((chunk * pp + rank, done[chunk]))
        done[chunk] += 1
    return items


def arrays(forward: Any, backward: Any, hop: Any, m: int) -> tuple[Any, Any, Any, Any]:
    return np.array([forward], float), np.array([backward], float), np.array([hop], float), np.array([m])


@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 2), (4, 8), (8, 9)])
def test_equal_stages_take_the_textbook_time(pp: int, m: int) -> None:
    f, b, hop = [2.0] * pp, [5.0] * pp, [0.0] * (pp - 1)
    expected = (m + pp - 1) * 7.0
    assert pipeline.gpipe(*arrays(f, b, hop, m)) == pytest.approx([expected])
    assert pipeline.one_f_one_b(*arrays(f, b, hop, m)) == pytest.approx([expected])


@pytest.mark.parametrize(("pp", "vpp", "m"), [(2, 2, 4), (4, 2, 8), (4, 3, 12)])
def test_equal_chunks_divide_the_bubble(pp: int, vpp: int, m: int) -> None:
    chunks = [[1.0] * vpp] * pp
    forward, backward, hop, count = arrays(chunks, [[2.0] * vpp] * pp, [0.0] * (pp * vpp - 1), m)
    got = pipeline.interleaved(forward, backward, hop, count, np.array([pp]))
    assert got == pytest.approx([m * 3.0 * vpp + (pp - 1) * 3.0])


def test_gpipe_is_exact_with_unequal_stages() -> None:
    # forwards 1 3 2: 6 + 3 * 3 for four micro-batches; backwards 2 2 4: 8 + 3 * 4
    f, b = [1.0, 3.0, 2.0], [2.0, 2.0, 4.0]
    assert pipeline.gpipe(*arrays(f, b, [0.0, 0.0], 4)) == pytest.approx([6 + 9 + 8 + 12])
    seconds = {("F", i): f[i] for i in range(3)} | {("B", i): b[i] for i in range(3)}
    assert max(play(gpipe_orders(3, 4), seconds, [0.0, 0.0], 3)) == 35.0


def test_transfers_slow_the_steady_state_of_one_f_one_b() -> None:
    # pp 2, f 1, b 2, x 0.5: rank 0 sends two forwards per round trip of 3 + 3 + 1, so 7 for two micro-batches
    got = float(pipeline.one_f_one_b(*arrays([1.0, 1.0], [2.0, 2.0], [0.5], 8))[0])
    seconds = {("F", 0): 1.0, ("F", 1): 1.0, ("B", 0): 2.0, ("B", 1): 2.0}
    played = play(one_f_one_b_orders(2, 8), seconds, [0.5], 2)
    assert got == pytest.approx(max(played))
    assert got == pytest.approx(27 + 4 * 1.0)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_never_above_the_played_schedule_and_not_far_below(schedule: str) -> None:
    rng = random.Random(7)
    ratios = []
    for _ in range(150):
        pp, vpp = rng.randint(2, 6), rng.randint(2, 3) if schedule == "interleaved" else 1
        m = pp * rng.randint(1, 4) if schedule == "interleaved" else rng.randint(pp, 4 * pp)
        stages = pp * vpp
        f, b = ([rng.uniform(0.5, 2.0) for _ in range(stages)] for _ in range(2))
        hop = [rng.uniform(0.0, 0.3) for _ in range(stages - 1)]
        seconds = {("F", i): f[i] for i in range(stages)} | {("B", i): b[i] for i in range(stages)}
        forward, backward = (np.array([[values[rank::pp] for rank in range(pp)]]) for values in (f, b))
        hops, count = np.array([hop]), np.array([m])
        if schedule == "gpipe":
            ends, got = (
                play(gpipe_orders(pp, m), seconds, hop, pp),
                pipeline.gpipe(forward[:, :, 0], backward[:, :, 0], hops, count),
            )
        elif schedule == "1f1b":
            ends, got = (
                play(one_f_one_b_orders(pp, m), seconds, hop, pp),
                pipeline.one_f_one_b(forward[:, :, 0], backward[:, :, 0], hops, count),
            )
        else:
            ends, got = (
                play(interleaved_orders(pp, vpp, m), seconds, hop, pp),
                pipeline.interleaved(forward, backward, hops, count, np.array([pp])),
            )
        ratios.append(float(got[0]) / max(ends))
    assert max(ratios) <= 1 + 1e-9
    assert min(ratios) > 0.75
    assert np.median(ratios) > 0.95


def test_later_ranks_finish_earlier_by_the_way_back() -> None:
    got = pipeline.tail(np.array([[2.0, 3.0, 4.0]]), np.array([[0.5, 0.25]]))
    assert got.tolist() == [[0.0, 2.5, 5.75]]


@pytest.mark.parametrize(("pp", "vpp", "m"), [(4, 1, 8), (4, 1, 3), (2, 2, 4), (4, 2, 8), (4, 3, 4), (3, 2, 3)])
def test_micro_batches_in_flight_are_those_of_the_action_lists(pp: int, vpp: int, m: int) -> None:
    per_round = m // max(m // pp, 1)
    lists = {"gpipe": gpipe_orders(pp, m), "1f1b": one_f_one_b_orders(pp, m)} if vpp == 1 else {}
    lists |= {"interleaved": interleaved_orders(pp, vpp, m)} if vpp > 1 else {}
    for schedule, orders in lists.items():
        for rank, order in enumerate(orders):
            held, peak, at_peak = [0] * vpp, 0, [0] * vpp
            for kind, stage, _ in order:
                held[stage // pp] += 1 if kind == "F" else -1
                if sum(held) > peak:
                    peak, at_peak = sum(held), list(held)
            got = pipeline.in_flight(pp, vpp, rank, np.array([m]), np.array([per_round]))[schedule]
            assert got.tolist() == [at_peak], (schedule, rank)
