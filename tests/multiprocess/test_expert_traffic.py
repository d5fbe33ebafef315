"""Collectives of steps with experts, counted on real ranks, are those that the model prices.

How many rows reach a rank is the router's choice, so that the bytes of its exchanges are not the mean that is priced;
over all ranks none is lost. What etp gathers is padded to the longest of its ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from meshwright.cost_models.traffic import rank_traffic
from meshwright.planner.plan import Plan

pytestmark = pytest.mark.multiprocess

Counts = dict[tuple[str, str], tuple[int, int]]
CASES = ("tp2 etp2 dp2 ep2 zero2 full", "dp4 ep2 zero3 chunks2", "tp2 sp dp2 etp2 ep2 zero1")


@pytest.mark.parametrize("words", CASES)
def test_counted_equals_priced(
    words: str, count_step: Callable[[str], list[Counts]], in_one_process: Callable[[str], tuple[Any, Plan, Any]]
) -> None:
    line = f"mixtral layers2 | {words} | n2"
    counted, (_, plan, _) = count_step(line), in_one_process(line)
    config = plan.config
    priced = rank_traffic(plan.model, plan.workload, config, 0)
    total: Counter[tuple[str, str]] = Counter()
    for found in counted:
        for (op, axis), (calls, num_bytes) in found.items():
            if axis in ("ep", "etp"):
                assert calls == priced[op, axis][0], (op, axis)
                total[op, axis] += num_bytes
    for key, num_bytes in total.items():
        mean = num_bytes / len(counted)
        if key[1] == "ep":
            assert mean == priced[key][1], key
        else:
            assert priced[key][1] <= mean <= 2 * priced[key][1], key
    assert total["all_to_all", "ep"] and bool(config.etp > 1 and config.sequence_parallel) == (
        ("all_gather", "etp") in total
    )
    for found in counted:  # over tp, edp and dp to the byte
        for op, axis in {*found, *priced}:
            if axis in ("tp", "edp") or (axis == "dp" and op != "all_reduce"):
                assert found.get((op, axis)) == priced.get((op, axis)), (op, axis)
