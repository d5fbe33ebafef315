"""What a step really issues, counted by operator, against the table in ``executors.counting`` worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.multiprocess

Counts = dict[tuple[str, str], tuple[int, int]]

# the example's sizes: hidden 32, ffn 48, 4 heads of 8, 2 kv heads, vocabulary 64; 8 bytes a number
BLOCK = 8 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32)
TABLE, NORM = 8 * 64 * 32, 8 * 32
HIDDEN = 8 * 1 * 8 * 32  # one micro-batch of one sequence of 8 tokens


def expected(zero_stage: int, blocks: int, outers: list[int], num_microbatches: int, sends: int) -> Counts:
    """``outers``: bytes of the outer unit of each chunk of the rank (0: it has none)."""
    units, unit_bytes = blocks + sum(outer > 0 for outer in outers), blocks * BLOCK + sum(outers)
    n = num_microbatches
    counts: Counts = {("all_reduce", "dp"): (1, 8), ("all_reduce", "world"): (1, 16)}
    if sends:
        counts["send", "pp"] = (sends * n, sends * n * HIDDEN)
    if zero_stage == 0:
        counts["all_reduce", "dp"] = (1 + units, 8 + unit_bytes)
        return counts
    counts["all_gather", "dp"] = (units, unit_bytes)
    if zero_stage == 3:
        counts["all_gather", "dp"] = ((units + blocks) * n, (unit_bytes + blocks * BLOCK) * n)
    reductions = 1 if zero_stage == 1 else n
    counts["reduce_scatter", "dp"] = (units * reductions, unit_bytes * reductions)
    return counts


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_without_pipeline(zero_stage: int, count_step: Callable[[str], list[Counts]]) -> None:
    counts = expected(zero_stage, 4, [2 * TABLE + NORM], 3, 0)
    calls, message_bytes = counts["all_reduce", "dp"]
    del counts["all_reduce", "world"]
    counts["all_reduce", "dp"] = (calls + 1, message_bytes + 16)  # dp is all ranks, so the loss goes over it too
    assert count_step(f"example | dp2 zero{zero_stage} | n3") == [counts] * 2


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_pipeline(zero_stage: int, schedule: str, count_step: Callable[[str], list[Counts]]) -> None:
    counts = count_step(f"example | pp2 dp2 zero{zero_stage} {schedule} | n4")
    first = expected(zero_stage, 2, [TABLE], 4, 1)
    last = expected(zero_stage, 2, [TABLE + NORM], 4, 1)
    assert counts == [first, first, last, last]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_interleaved(zero_stage: int, count_step: Callable[[str], list[Counts]]) -> None:
    counts = count_step(f"example | pp2 dp2 zero{zero_stage} interleaved | n4")
    first = expected(zero_stage, 2, [TABLE, 0], 4, 3)  # chunk 0 sends on; chunk 2 sends on and back
    last = expected(zero_stage, 2, [0, TABLE + NORM], 4, 3)
    assert counts == [first, first, last, last]


def test_tied_embedding_over_stages_is_exchanged_once(count_step: Callable[[str], list[Counts]]) -> None:
    for counts in count_step("example tied | pp2 | n4"):
        assert counts["send", "pp"] == (4 + 1, 4 * HIDDEN + TABLE)
