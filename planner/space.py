"""Every way of splitting over a number of devices, and why most of them are not legal.

**Candidates** are in canonical form: a degree or flag without effect has one value.

* ``tp * cp_ring * cp_ulysses * pp * dp`` is the number of devices, ``cp = cp_ring * cp_ulysses``;
* ``ep, etp``: every pair whose product divides ``dp * cp * tp``; both 1 in a model without experts;
* ``sequence_parallel`` and ``vocab_parallel``: off and on where tp > 1, else off;
* ``schedule, vpp``: without a pipeline ``1f1b`` and 1; else ``gpipe``, ``1f1b`` and ``zb-h1`` with 1 chunk a rank,
  ``zbv`` and ``dualpipev`` with 2, ``interleaved`` with 2 and every more while ``layers >= pp * vpp``;
* ``micro_batch_size``: the divisors of ``global_batch_size / dp``; 1 where dp does not divide it (then illegal);
* ``zero_stage, dp_shard``: ``0, 1``; where ``dp * cp > 1`` also stages 1 to 3 with each divisor of ``dp * cp`` above 1;
* ``recompute``: each of its three values.

**How they are enumerated.** No rule of ``strategy.legal`` that a candidate can break looks at the last four of these
(``micro_batch_size``, ``zero_stage`` and ``dp_shard``, ``vocab_parallel``, ``recompute``), and none but LAYERS looks
at the schedule. So degrees are judged first, then degrees with schedules; only what survives is multiplied out, and
what does not is counted by how many candidates it stands for. Counts are exact, work is that of the legal set.

**Which reason counts.** The first that applies: FIXED, then what the target does not offer at all (NOT_IN_FRAMEWORK),
then ``strategy.legal``'s order; last, again NOT_IN_FRAMEWORK, the target's rules about combinations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost_models.framework import Framework, supported
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
from meshwright.profiler.model import ModelSpec

Columns = dict[str, IntArray]


@dataclass(frozen=True, slots=True)
class Space:
    """The legal configs, and how many candidates were not legal, by reason (in ``REASONS`` order, none of zero).

    ``len(batch) + sum(count of rejected) == num_candidates``.
    """

    batch: ConfigBatch
    rejected: tuple[RejectedCount, ...]
    num_candidates: int


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
    degrees = _degrees(world_size, has_experts=model.moe is not None)
    schedules = _schedule_options(divisors(world_size), model.num_layers)
    tails = [
        _micro_batch_options(divisors(world_size), workload.global_batch_size),
        _zero_options(divisors(world_size)),
        _vocab_options(divisors(world_size)),
        _recompute_options(divisors(world_size)),
    ]
    possible = dict(degrees)
    for table in (schedules, *tails):
        possible |= table.columns
    check_possible(fixed, possible)
    counts: Counter[Reason] = Counter()
    num_candidates = int(_weight(degrees, [schedules, *tails]).sum())

    degrees = _filter(degrees, _equals(degrees, fixed))
    schedules, *tails = [table.keep(_equals(table.columns, fixed)) for table in [schedules, *tails]]
    num_unfixed = int(_weight(degrees, [schedules, *tails]).sum())
    counts[Reason.FIXED] = num_candidates - num_unfixed

    degrees = _filter(degrees, _offered_degrees(degrees, framework, has_experts=model.moe is not None))
    schedules, *tails = [table.keep(table.offered(table, framework)) for table in [schedules, *tails]]
    weight = _weight(degrees, [schedules, *tails])
    counts[Reason.NOT_IN_FRAMEWORK] = num_unfixed - int(weight.sum())
    degrees = _filter(degrees, weight > 0)

    # whatever the schedule, a config breaks what its degrees break with one chunk a rank; BATCH yields to LAYERS
    alive = _judge(
        degrees, [schedules, *tails], model, workload, counts, final=lambda found: found != REASONS.index(Reason.BATCH)
    )
    pieces = schedules.cross(_filter(degrees, alive))
    alive = _judge(pieces, tails, model, workload, counts, final=lambda found: np.ones(len(found), dtype=np.bool_))
    full = _filter(pieces, alive)
    for table in tails:
        full = table.cross(full)
    batch = _batch(full)
    runs = supported(batch, framework, model, workload)
    counts[Reason.NOT_IN_FRAMEWORK] += int((~runs).sum())
    rejected = tuple(RejectedCount(reason=reason, count=counts[reason]) for reason in REASONS if counts[reason])
    return Space(batch=batch if runs.all() else batch.take(runs), rejected=rejected, num_candidates=num_candidates)


def divisors(number: int) -> list[int]:
    """Divisors of a positive number, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return small + [number // divisor for divisor in reversed(small) if divisor * divisor != number]


class _Table:
    """Options of some fields that depend on one key, such as the micro-batch sizes for each dp.

    ``owner[i]`` is the position in ``keys`` of the key that option ``i`` belongs to; options of a key stand together.
    """

    def __init__(
        self,
        keys: IntArray,
        owner: IntArray,
        columns: Columns,
        key_of: Callable[[Columns], IntArray],
        offered: Callable[[_Table, Framework], BoolArray],
    ) -> None:
        self.keys, self.owner, self.columns = keys, owner, columns
        self.key_of, self.offered = key_of, offered
        self._counts = np.bincount(owner, minlength=len(keys)).astype(np.int64)
        self._starts = np.cumsum(self._counts) - self._counts

    @classmethod
    def build(
        cls,
        names: tuple[str, ...],
        options: Mapping[int, list[tuple[int, ...]]],
        key_of: Callable[[Columns], IntArray],
        offered: Callable[[_Table, Framework], BoolArray] = lambda table, framework: np.ones(
            len(table.owner), np.bool_
        ),
    ) -> _Table:
        keys = np.array(sorted(options), dtype=np.int64)
        owner = np.repeat(np.arange(len(keys)), [len(options[key]) for key in keys.tolist()])
        rows = np.array([row for key in keys.tolist() for row in options[key]], dtype=np.int64)
        columns = dict(zip(names, rows.reshape(-1, len(names)).T, strict=True))
        return cls(keys, owner, columns, key_of, offered)

    def keep(self, mask: BoolArray) -> _Table:
        """The options under a mask."""
        return _Table(self.keys, self.owner[mask], _filter(self.columns, mask), self.key_of, self.offered)

    def count(self, columns: Columns) -> IntArray:
        """Options of each row."""
        return self._counts[np.searchsorted(self.keys, self.key_of(columns))]

    def cross(self, columns: Columns) -> Columns:
        """Every row with every option of its key."""
        places = np.searchsorted(self.keys, self.key_of(columns))
        counts = self._counts[places]
        rows = np.repeat(np.arange(len(places)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        option = self._starts[places][rows] + within
        return _filter(columns, rows) | {name: column[option] for name, column in self.columns.items()}


def _degrees(world_size: int, *, has_experts: bool) -> Columns:
    """All degrees and ``sequence_parallel``, multiplied out."""
    parts = divisors(world_size)
    columns: Columns = {"rest": np.array([world_size], dtype=np.int64)}
    for axis in ("tp", "cp_ring", "cp_ulysses", "pp"):
        table = _Table.build((axis,), {n: [(d,) for d in divisors(n)] for n in parts}, lambda c: c["rest"])
        columns = table.cross(columns)
        columns["rest"] = columns["rest"] // columns[axis]
    columns["dp"] = columns.pop("rest")
    columns["cp"] = columns["cp_ring"] * columns["cp_ulysses"]
    pairs: Mapping[int, list[tuple[int, ...]]] = {
        n: [(ep, etp) for ep in divisors(n) for etp in divisors(n // ep)] if has_experts else [(1, 1)] for n in parts
    }
    columns = _Table.build(("ep", "etp"), pairs, lambda c: c["dp"] * c["cp"] * c["tp"]).cross(columns)
    switches: Mapping[int, list[tuple[int, ...]]] = {n: [(0,), (1,)] if n > 1 else [(0,)] for n in parts}
    return _Table.build(("sequence_parallel",), switches, lambda c: c["tp"]).cross(columns)


def _offered_degrees(columns: Columns, framework: Framework, *, has_experts: bool) -> BoolArray:
    mask = np.ones(len(columns["tp"]), dtype=np.bool_)
    if not framework.tensor_parallel:
        mask &= columns["tp"] == 1
    if not framework.pipeline_parallel:
        mask &= columns["pp"] == 1
    if not framework.context_parallel:
        mask &= columns["cp"] == 1
    if not framework.expert_parallel:
        mask &= (columns["ep"] == 1) & (columns["etp"] == 1)
    if not framework.tensor_parallel_moe and has_experts:
        mask &= columns["tp"] == 1
    return mask


def _schedule_options(pp_values: list[int], num_layers: int) -> _Table:
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
    return _Table.build(
        ("schedule", "vpp"),
        options,
        lambda c: c["pp"],
        lambda table, framework: (
            np.isin(table.columns["schedule"], [SCHEDULES.index(schedule) for schedule in framework.schedules])
            | (table.keys[table.owner] == 1)  # without a pipeline there is no schedule to offer
        ),
    )


def _micro_batch_options(dp_values: list[int], global_batch_size: int) -> _Table:
    options: dict[int, list[tuple[int, ...]]] = {
        dp: [(size,) for size in divisors(global_batch_size // dp)] if global_batch_size % dp == 0 else [(1,)]
        for dp in dp_values
    }
    return _Table.build(("micro_batch_size",), options, lambda c: c["dp"])


def _zero_options(group_values: list[int]) -> _Table:
    options: dict[int, list[tuple[int, ...]]] = {
        group: [(0, 1), *((stage, shard) for stage in (1, 2, 3) for shard in divisors(group)[1:])]
        for group in group_values
    }

    def offered(table: _Table, framework: Framework) -> BoolArray:
        stage, shard = table.columns["zero_stage"], table.columns["dp_shard"]
        whole = (stage == 0) | (shard == table.keys[table.owner])
        return np.asarray(np.isin(stage, framework.zero_stages) & (whole | framework.partial_sharding))

    return _Table.build(("zero_stage", "dp_shard"), options, lambda c: c["dp"] * c["cp"], offered)


def _vocab_options(tp_values: list[int]) -> _Table:
    return _Table.build(
        ("vocab_parallel",),
        {tp: [(0,), (1,)] if tp > 1 else [(0,)] for tp in tp_values},
        lambda c: c["tp"],
        lambda table, framework: (
            table.columns["vocab_parallel"] == ((table.keys[table.owner] > 1) & framework.vocab_parallel)
        ),
    )


def _recompute_options(tp_values: list[int]) -> _Table:
    return _Table.build(
        ("recompute",),
        {tp: [(code,) for code in range(len(RECOMPUTES))] for tp in tp_values},
        lambda c: c["tp"],
        lambda table, framework: np.isin(
            table.columns["recompute"], [RECOMPUTES.index(recompute) for recompute in framework.recomputes]
        ),
    )


def _weight(columns: Columns, tables: list[_Table]) -> IntArray:
    """How many candidates each row stands for."""
    weight = np.ones(len(columns["tp"]), dtype=np.int64)
    for table in tables:
        weight = weight * table.count(columns)
    return weight


def _filter(columns: Columns, selection: Any) -> Columns:
    return {name: column[selection] for name, column in columns.items()}


def _equals(columns: Columns, fixed: Mapping[str, int]) -> BoolArray:
    mask = np.ones(len(next(iter(columns.values()))), dtype=np.bool_)
    for name in columns.keys() & fixed.keys():
        mask &= columns[name] == fixed[name]
    return mask


def _judge(
    columns: Columns,
    tables: list[_Table],
    model: ModelSpec,
    workload: Workload,
    counts: Counter[Reason],
    *,
    final: Callable[[Any], BoolArray],
) -> BoolArray:
    """Mask of rows still to be looked at; the candidates of the others are added to ``counts``."""
    verdict = legal(_batch(columns), model, workload)
    out = (verdict >= 0) & final(verdict)
    lost = np.bincount(verdict[out], weights=_weight(_filter(columns, out), tables), minlength=len(REASONS))
    for reason, number in zip(REASONS, lost.tolist(), strict=True):
        counts[reason] += int(number)
    return ~out


def _batch(columns: Columns) -> ConfigBatch:
    return ConfigBatch.from_columns(columns, len(columns["tp"]))
