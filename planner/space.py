"""Every way of splitting over a number of devices, and why most of them are not legal.

**Candidates** are in canonical form: a degree or flag without effect has one value.

* ``tp * cp_ring * cp_ulysses * pp * dp`` is the number of devices, ``cp = cp_ring * cp_ulysses``;
* ``ep, etp``: every pair whose product divides ``dp * cp * tp``; both 1 in a model without experts;
* ``ep_chunks``: the values that the target runs (``Framework.expert_chunks``) where ep > 1, else 1;
* ``sequence_parallel`` and ``vocab_parallel``: off and on where tp > 1, else off;
* ``schedule, vpp``: without a pipeline ``1f1b`` and 1; else ``gpipe``, ``1f1b`` and ``zb-h1`` with 1 chunk a rank,
  ``zbv`` and ``dualpipev`` with 2, ``interleaved`` with 2 and every more while ``layers >= pp * vpp``;
* ``micro_batch_size``: the divisors of ``global_batch_size / dp``; 1 where dp does not divide it (then illegal);
* ``zero_stage, dp_shard``: ``0, 1``; where ``dp * cp > 1`` also stages 1 to 3 with each divisor of ``dp * cp`` above 1;
* ``recompute``: each of its three values.

**How they are counted.** There may be hundreds of millions: they are counted in factors and multiplied out only when
somebody asks for the ``batch``. No rule of ``strategy.legal`` that a candidate can break looks at ``zero_stage``,
``dp_shard``, ``vocab_parallel`` or ``recompute``; LAYERS looks at pp and the schedule; at ``micro_batch_size`` only
whether ``ep_chunks`` divide. The target's rules are about degrees (``framework.runs_degrees``) or of two kinds
(``runs_pipeline``, ``combines``) that share nothing but the schedule's name. So degrees are judged row by row, the rest
in small tables (``planner.tails``), and counts are sums of products of both: exact.

**Which reason counts.** The first that applies: FIXED, then what the target does not offer at all (NOT_IN_FRAMEWORK),
then ``strategy.legal``'s order; last, again NOT_IN_FRAMEWORK, the target's rules about combinations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from meshwright.cost_models.framework import Framework, runs_degrees
from meshwright.cost_models.strategy import (
    LOOPED,
    REASONS,
    RECOMPUTES,
    SCHEDULES,
    V_SHAPED,
    BoolArray,
    ConfigBatch,
    IntArray,
    Reason,
    Schedule,
    legal,
)
from meshwright.cost_models.workload import Workload
from meshwright.planner.constraints import Constraints, as_columns, check_possible
from meshwright.planner.plan import RejectedCount
from meshwright.planner.tables import Columns, Table, as_batch, filtered, weight
from meshwright.planner.tails import Tails
from meshwright.profiler.model import ModelSpec


@dataclass(frozen=True)
class Space:
    """The legal configs in factors, and how many candidates were not legal, by reason (in ``REASONS`` order).

    ``num_legal + sum(count of rejected) == num_candidates``. ``degrees`` are the degrees and switches of which some
    config is legal, rows of columns; ``tails`` is what each of them can be combined with.
    """

    degrees: Columns
    tails: Tails
    rejected: tuple[RejectedCount, ...]
    num_candidates: int
    num_legal: int

    @cached_property
    def batch(self) -> ConfigBatch:
        """Every legal config, multiplied out: for spaces that fit into memory."""
        return self.tails.configs(self.degrees)


def legal_space(
    model: ModelSpec,
    workload: Workload,
    world_size: int,
    framework: Framework,
    constraints: Constraints | None = None,
) -> Space:
    """Every legal config of ``model`` on ``world_size`` devices that ``framework`` executes.

    ``constraints`` fixes fields (``{"tp": 8, "schedule": Schedule.GPIPE}``).
    Raises ``InputError`` for a constraint that is no field, or a value that no candidate can have.
    """
    fixed = as_columns(constraints or {})
    parts, has_experts = divisors(world_size), model.moe is not None
    degrees = _degrees(world_size, has_experts=has_experts)
    tables = [
        _schedule_options(parts, model.num_layers),
        _micro_batch_options(parts, workload.global_batch_size),
        _zero_options(parts),
        _recompute_options(parts),
        _chunk_options(parts if has_experts else [1], framework.expert_chunks),
        _vocab_options(parts),
    ]
    possible = dict(degrees)
    for table in tables:
        possible |= table.columns
    check_possible(fixed, possible)
    counts: Counter[Reason] = Counter()
    num_candidates = int(weight(degrees, tables).sum())

    degrees = filtered(degrees, _equals(degrees, fixed))
    tables = [table.keep(_equals(table.columns, fixed)) for table in tables]
    num_unfixed = int(weight(degrees, tables).sum())
    counts[Reason.FIXED] = num_candidates - num_unfixed

    degrees = filtered(degrees, runs_degrees(as_batch(degrees), framework, model))
    tables = [table.keep(table.offered(table, framework)) for table in tables]
    each = weight(degrees, tables)
    counts[Reason.NOT_IN_FRAMEWORK] = num_unfixed - int(each.sum())
    degrees = filtered(degrees, each > 0)

    # whatever the schedule, a config breaks what its degrees break with one chunk a rank; BATCH yields to LAYERS
    verdict = legal(as_batch(degrees), model, workload).astype(np.int64)
    late = verdict == REASONS.index(Reason.BATCH)
    _count(counts, verdict, weight(degrees, tables), (verdict >= 0) & ~late)
    *tables, vocab = tables
    tails = Tails(model, workload, framework, *tables)
    others = weight(degrees, [*tables[1:], vocab])
    for reason, broken in tails.broken.items():
        counts[reason] += int((broken.count(degrees) * others)[(verdict < 0) | late].sum())
    _count(counts, verdict, tails.schedules.count(degrees) * others, late)
    degrees = vocab.cross(filtered(degrees, verdict < 0))
    numbers = tails.numbers(degrees)
    counts[Reason.EXPERTS] += numbers.chunked
    counts[Reason.NOT_IN_FRAMEWORK] += numbers.not_run
    rejected = tuple(RejectedCount(reason=reason, count=counts[reason]) for reason in REASONS if counts[reason])
    return Space(
        degrees=filtered(degrees, numbers.legal > 0),
        tails=tails,
        rejected=rejected,
        num_candidates=num_candidates,
        num_legal=int(numbers.legal.sum()),
    )


def divisors(number: int) -> list[int]:
    """Divisors of a positive number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


def _degrees(world_size: int, *, has_experts: bool) -> Columns:
    """All degrees and ``sequence_parallel``, multiplied out."""
    parts = divisors(world_size)
    columns: Columns = {"rest": np.array([world_size], dtype=np.int64)}
    for axis in ("tp", "cp_ring", "cp_ulysses", "pp"):
        table = Table.build((axis,), {n: [(d,) for d in divisors(n)] for n in parts}, lambda c: c["rest"])
        columns = table.cross(columns)
        columns["rest"] = columns["rest"] // columns[axis]
    columns["dp"] = columns.pop("rest")
    columns["cp"] = columns["cp_ring"] * columns["cp_ulysses"]
    pairs: Mapping[int, list[tuple[int, ...]]] = {
        n: [(ep, etp) for ep in divisors(n) for etp in divisors(n // ep)] if has_experts else [(1, 1)] for n in parts
    }
    columns = Table.build(("ep", "etp"), pairs, lambda c: c["dp"] * c["cp"] * c["tp"]).cross(columns)
    switches: Mapping[int, list[tuple[int, ...]]] = {n: [(0,), (1,)] if n > 1 else [(0,)] for n in parts}
    return Table.build(("sequence_parallel",), switches, lambda c: c["tp"]).cross(columns)


def _schedule_options(pp_values: list[int], num_layers: int) -> Table:
    options: dict[int, list[tuple[int, ...]]] = {}
    for pp in pp_values:
        options[pp] = [(SCHEDULES.index(Schedule.ONE_F_ONE_B), 1)]
        if pp > 1:
            options[pp] = [
                (code, vpp)
                for code, schedule in enumerate(SCHEDULES)
                for vpp in (
                    range(2, max(2, num_layers // pp) + 1)
                    if schedule in LOOPED
                    else ((2,) if schedule in V_SHAPED else (1,))
                )
            ]
    return Table.build(
        ("schedule", "vpp"),
        options,
        lambda c: c["pp"],
        lambda table, framework: (
            np.isin(table.columns["schedule"], [SCHEDULES.index(schedule) for schedule in framework.schedules])
            | (table.keys[table.owner] == 1)  # without a pipeline there is no schedule to offer
        ),
    )


def _chunk_options(ep_values: list[int], chunks: tuple[int, ...]) -> Table:
    return Table.build(
        ("ep_chunks",), {ep: [(each,) for each in (chunks if ep > 1 else (1,))] for ep in ep_values}, lambda c: c["ep"]
    )


def _micro_batch_options(dp_values: list[int], global_batch_size: int) -> Table:
    options: dict[int, list[tuple[int, ...]]] = {
        dp: [(size,) for size in divisors(global_batch_size // dp)] if global_batch_size % dp == 0 else [(1,)]
        for dp in dp_values
    }
    return Table.build(("micro_batch_size",), options, lambda c: c["dp"])


def _zero_options(group_values: list[int]) -> Table:
    options: dict[int, list[tuple[int, ...]]] = {
        group: [(0, 1), *((stage, shard) for stage in (1, 2, 3) for shard in divisors(group)[1:])]
        for group in group_values
    }

    def offered(table: Table, framework: Framework) -> BoolArray:
        stage, shard = table.columns["zero_stage"], table.columns["dp_shard"]
        whole = (stage == 0) | (shard == table.keys[table.owner])
        return np.asarray(np.isin(stage, framework.zero_stages) & (whole | framework.partial_sharding))

    return Table.build(("zero_stage", "dp_shard"), options, lambda c: c["dp"] * c["cp"], offered)


def _vocab_options(tp_values: list[int]) -> Table:
    return Table.build(
        ("vocab_parallel",),
        {tp: [(0,), (1,)] if tp > 1 else [(0,)] for tp in tp_values},
        lambda c: c["tp"],
        lambda table, framework: (
            table.columns["vocab_parallel"] == ((table.keys[table.owner] > 1) & framework.vocab_parallel)
        ),
    )


def _recompute_options(tp_values: list[int]) -> Table:
    return Table.build(
        ("recompute",),
        {tp: [(code,) for code in range(len(RECOMPUTES))] for tp in tp_values},
        lambda c: c["tp"],
        lambda table, framework: np.isin(
            table.columns["recompute"], [RECOMPUTES.index(recompute) for recompute in framework.recomputes]
        ),
    )


def _equals(columns: Columns, fixed: Mapping[str, int]) -> BoolArray:
    mask = np.ones(len(next(iter(columns.values()))), dtype=np.bool_)
    for name in columns.keys() & fixed.keys():
        mask &= columns[name] == fixed[name]
    return mask


def _count(counts: Counter[Reason], verdict: IntArray, each: IntArray, chosen: BoolArray) -> None:
    """Add the candidates that rows under a mask stand for to the reasons they are rejected for."""
    for reason, number in enumerate(REASONS):
        counts[number] += int(each[chosen & (verdict == reason)].sum())
