"""Played schedules against hand-computed ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshwright import InputError
from meshwright.cost_models.player import Played, by_stage, play, timeline
from meshwright.cost_models.schedules import Pass
from meshwright.cost_models.strategy import Schedule


def row(*seconds: float) -> Any:
    return np.array([seconds], dtype=np.float64)


def test_1f1b_by_hand() -> None:
    # rank 0: F 0-1 1-2, waits for B of rank 1 (3.5) and 0.5 to come back
    # rank 1: F 1.5-2.5, B 2.5-4.5, F 4.5-5.5, B 5.5-7.5
    played = play(Schedule.ONE_F_ONE_B, 2, 2, row(1, 1), row(1, 1), row(1, 1), row(0.5))
    assert played.finish.tolist() == [[10.0, 7.5]]  # rank 0: B 5-7, B 8-10
    assert played.busy.tolist() == [[6.0, 6.0]]
    assert played.makespan.tolist() == [10.0]
    assert played.bubble_share.tolist() == pytest.approx([1 - 6 / 10])


def test_a_timeline_tells_each_pass() -> None:
    entries = timeline(Schedule.ONE_F_ONE_B, 2, 2, *(np.array(x, float) for x in ([1, 1], [1, 1], [1, 1], [0.5])))
    told = [(e.rank, f"{e.kind}{e.microbatch}", e.start_s, e.end_s) for e in entries]
    assert told == [
        (0, "F0", 0.0, 1.0), (0, "F1", 1.0, 2.0), (0, "B0", 5.0, 7.0), (0, "B1", 8.0, 10.0),
        (1, "F0", 1.5, 2.5), (1, "B0", 2.5, 4.5), (1, "F1", 4.5, 5.5), (1, "B1", 5.5, 7.5),
    ]  # fmt: skip


def test_unequal_stages_by_hand() -> None:
    # gpipe, forwards 1 3 2, backwards 2 2 4: (6 + 3 * 3) + (8 + 3 * 4)
    played = play(Schedule.GPIPE, 3, 4, row(1, 3, 2), row(1, 1, 2), row(1, 1, 2), row(0, 0))
    assert played.finish.tolist() == [[35.0, 33.0, 31.0]]


def test_zero_bubble_sends_the_gradient_before_the_weights() -> None:
    # rank 1: F 1-2 I 2-3 F 3-4 I 4-5 W 5-6 W 6-7; rank 0: F F, I 3-4 W 4-5, I 5-6 W 6-7
    ones = np.ones(2)
    entries = timeline(Schedule.ZB_H1, 2, 2, ones, ones, ones, np.zeros(1))
    told = {(e.rank, f"{e.kind}{e.microbatch}"): e.start_s for e in entries}
    assert told == {
        (0, "F0"): 0, (0, "F1"): 1, (0, "I0"): 3, (0, "W0"): 4, (0, "I1"): 5, (0, "W1"): 6,
        (1, "F0"): 1, (1, "I0"): 2, (1, "F1"): 3, (1, "I1"): 4, (1, "W0"): 5, (1, "W1"): 6,
    }  # fmt: skip


def test_a_v_hands_over_on_its_last_rank_without_a_transfer() -> None:
    # one rank has both stages: nothing to send
    played = play(Schedule.ZBV, 1, 3, row(1, 1), row(1, 1), row(1, 1), row(100.0))
    assert played.makespan.tolist() == [3 * 6.0]


def test_pairs_of_dualpipev_send_both_results_after_the_second() -> None:
    slow = np.array([2.0, 1.0, 1.0, 2.0])  # stages 0 and 3 are on rank 0, for which rank 1 waits
    entries = timeline(Schedule.DUALPIPEV, 2, 6, slow, slow, slow, np.zeros(3))
    told = {(e.kind, e.stage, e.microbatch): e for e in entries}
    forward, backward = told[Pass.FORWARD, 0, 5], told[Pass.BACKWARD, 3, 3]
    assert forward.end_s == backward.start_s
    assert told[Pass.FORWARD, 1, 5].start_s == backward.end_s


def test_a_link_takes_one_transfer_at_a_time() -> None:
    # forwards leave rank 0 at 1, 2, 3 and take 4 each: they arrive at 5, 9, 13
    entries = timeline(Schedule.GPIPE, 2, 3, *(np.array(x, float) for x in ([1, 1], [1, 1], [1, 1], [4])))
    forwards = [e.start_s for e in entries if e.rank == 1 and e.kind is Pass.FORWARD]
    assert forwards == [5.0, 9.0, 13.0]


def blocking(schedule: Schedule, microbatches: int, *columns: Any) -> Played:
    return play(schedule, 2, microbatches, *columns, blocking_sends=True)


def test_blocking_sends_hold_both_ranks() -> None:
    # gpipe, 2 ranks, 2 micro-batches, all passes 1 (backward 2), transfers 0.5, each holding both ranks:
    # rank 0: F 0-1, sends to 1.5, F 1.5-2.5, waits for rank 1 to receive: rank 1: F 1.5-2.5, transfer 2.5-3, F 3-4
    # rank 1: B 4-6, transfer 6-6.5, B 6.5-8.5; rank 0: B 6.5-8.5, transfer 8.5-9, B 9-11
    played = blocking(Schedule.GPIPE, 2, row(1, 1), row(1, 1), row(1, 1), row(0.5))
    assert played.finish.tolist() == [[11.0, 8.5]]


def test_a_forward_and_a_gradient_are_exchanged_at_once() -> None:
    # 1f1b, 2 ranks, 3 micro-batches, f 1, b 2, x 0.5:
    # rank 0: F0 0-1, sends 1-1.5, F1 1.5-2.5; rank 1: F0 1.5-2.5, B0 2.5-4.5
    # exchange of F1 and B0 4.5-5; rank 0: B0 5-7 F2 7-8; rank 1: F1 5-6, B1 6-8
    # exchange of F2 and B1 8-8.5; rank 0: B1 8.5-10.5; rank 1: F2 8.5-9.5, B2 9.5-11.5; transfer to 12; B2 12-14
    played = blocking(Schedule.ONE_F_ONE_B, 3, row(1, 1), row(1, 1), row(1, 1), row(0.5))
    assert played.finish.tolist() == [[14.0, 11.5]]


def test_many_configs_are_played_like_one_each() -> None:
    rng = np.random.default_rng(0)
    columns = [rng.uniform(0.5, 2.0, (7, count)) for count in (8, 8, 8, 7)]
    together = play(Schedule.INTERLEAVED, 4, 8, *columns)
    for index in range(7):
        alone = play(Schedule.INTERLEAVED, 4, 8, *(column[index : index + 1] for column in columns))
        assert together.finish[index].tolist() == alone.finish[0].tolist()


def test_stages_of_chunks() -> None:
    chunks = np.arange(6.0).reshape(1, 3, 2)  # rank 0 has 0 1, rank 1 has 2 3, rank 2 has 4 5
    assert by_stage(Schedule.INTERLEAVED, chunks).tolist() == [[0, 2, 4, 1, 3, 5]]
    assert by_stage(Schedule.ZBV, chunks).tolist() == [[0, 2, 4, 5, 3, 1]]


def test_blocking_sends_are_for_1f1b_and_gpipe() -> None:
    with pytest.raises(InputError, match="blocking sends are modelled for gpipe and 1f1b, not for zb-h1"):
        blocking(Schedule.ZB_H1, 2, row(1, 1), row(1, 1), row(1, 1), row(0.5))
