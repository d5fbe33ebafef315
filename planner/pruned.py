"""Branch and bound over the legal space: the best configs, and proofs that the others are not, without scoring them.

Families (``planner.families``) are taken apart only while what they take at least is no more than the ``wanted``-th
best step found so far: first into pp, dp and schedules, then into ZeRO's choices, each time with a tighter bound
(``planner.bounds``). What is left is scored, the most promising first: in time where its least memory fits, and in
memory where the time is still among the best. A first limit comes from a *dive*: the most promising families under
one schedule.

Exact: the best configs are those of scoring everything, ties included (``exhaustive.TIE``), since no bound is above the
model's value, and what is ruled out is slower than the last of the wanted and its ties, or does not fit. So is the
Pareto front of time and memory as far as the slowest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.estimate import KINDS, SECONDS
from meshwright.cost_models.framework import combines, runs_pipeline
from meshwright.cost_models.margin import MemoryMargin, needed_bytes
from meshwright.cost_models.step import batch_bytes, batch_seconds
from meshwright.cost_models.strategy import FIELDS, SCHEDULES, BoolArray, ConfigBatch, IntArray, Schedule
from meshwright.planner.bounds import Bounds, Passes
from meshwright.planner.exhaustive import PRUNED, TIE, Scored, Scorer, ranked
from meshwright.planner.families import Families, Family
from meshwright.planner.space import Space
from meshwright.planner.tables import Columns, as_batch, filtered

FloatArray = NDArray[np.float64]
Leaves = tuple[ConfigBatch, FloatArray]  # configs, and their least seconds

DIVE = 500  # cells, and families, looked at at once for a first limit
SCORED_FIRST = 200  # configs scored before the limit is looked at again, four times as many the next time
FAMILIES = 500  # cells with a micro-batch that are taken apart first, four times as many the next time
NEAREST = 20  # degrees looked at at once where nothing fits
_USUAL = SCHEDULES.index(Schedule.ONE_F_ONE_B)


@dataclass(frozen=True, slots=True)
class Found:
    """Configs scored in time and memory."""

    batch: ConfigBatch
    step_s: FloatArray
    peak_bytes: FloatArray
    needed_bytes: FloatArray
    usable_bytes: FloatArray

    def take(self, rows: NDArray[Any]) -> Found:
        """The configs at these positions."""
        rest = (getattr(self, field.name)[rows] for field in fields(self)[1:])
        return Found(self.batch.take(rows), *rest)


@dataclass(frozen=True, slots=True)
class _Sharded:
    """Configs of one pp that lack but a schedule: their resident bytes, their seconds, and which schedules they run."""

    batch: ConfigBatch
    state: FloatArray
    passes: Passes
    runs: dict[tuple[int, int], BoolArray]


class Pruned:
    """The search for the ``wanted`` best configs of a space."""

    def __init__(self, space: Space, bounds: Bounds, margin: MemoryMargin | None, wanted: int) -> None:
        self.space, self.bounds, self.margin, self.wanted = space, bounds, margin, wanted
        self.tails, self.families = space.tails, Families(space, bounds)
        self.limit = np.inf
        self._begin()

    def _begin(self) -> None:
        self.num_scored = self.num_too_large = 0
        self._found: list[Found] = []

    def run(self, scorer: Scorer) -> Scored:
        """Find them, or where nothing fits what is nearest to it; ``scorer`` is for those that are shown."""
        self._search()
        found = self._together()
        num_scored, num_too_large = self.num_scored, self.num_too_large
        found = found.take(found.step_s <= self.limit)
        if not (found.needed_bytes <= found.usable_bytes).any():
            found = self._nearest()
        return Scored(
            ranking=ranked(found.batch, found.step_s, found.peak_bytes, found.needed_bytes, found.usable_bytes, scorer),
            method=PRUNED,
            wanted=self.wanted,
            num_scored=num_scored,
            num_too_slow=self.space.num_legal - num_scored - num_too_large,
            num_too_large=num_too_large,
        )

    def _search(self) -> None:
        least = self.families.cells_at_least()
        self._dive(np.argsort(least, kind="stable"))
        self._begin()
        cell, size = self.families.sized(np.flatnonzero(least <= self.limit), self.limit)
        at, step = 0, FAMILIES
        while at < len(cell):
            some = slice(at, at + step)
            at, step = at + step, 4 * step
            family = self.families.families(cell[some], size[some], self.limit)
            self._score(self._leaves(family))

    def _dive(self, cells: IntArray) -> None:
        """Score some promising families, under one schedule for each pp, for a first limit."""
        for start in range(0, len(cells), DIVE):
            cell, size = self.families.sized(cells[start : start + DIVE], self.limit)
            for first in range(0, len(cell), DIVE):
                before, some = self.limit, slice(first, first + DIVE)
                family = self.families.families(cell[some], size[some], self.limit)
                self._score(self._leaves(family, one_schedule=True), until_better=True)
                if np.isfinite(before) and self.limit > 0.98 * before:
                    return
            if np.isfinite(self.limit):
                return

    # -- taken apart ------------------------------------------------------------------------------------------------

    def _leaves(self, family: Family, *, one_schedule: bool = False) -> Leaves:
        """Configs of some families that may be among the best, with their least seconds, the fastest first."""
        batch, of = self.families.placed(family)
        of_pp = []
        for pp in np.unique(batch.pp).tolist():
            rows = np.flatnonzero(batch.pp == pp)
            options = self._schedules(pp, one_schedule=one_schedule)
            of_pp += self._sharded(batch.take(rows), family.passes.take(of[rows]), options)
        batches, steps = [batch.take(np.zeros(0, dtype=np.int64))], [np.zeros(0)]
        if of_pp:  # of all at once, since what a block saves depends on neither pp nor ZeRO
            saved, beside = self.bounds.activations(ConfigBatch.concatenate([each.batch for each in of_pp]))
        start = 0
        for each in of_pp:
            own = slice(start, start + len(each.batch))
            start += len(each.batch)
            for some, least in self._fitting(each, (saved[:, own], beside[own])):
                batches.append(some)
                steps.append(least)
        step = np.concatenate(steps)
        order = np.argsort(step, kind="stable")
        return ConfigBatch.concatenate(batches).take(order), step[order]

    def _schedules(self, pp: int, *, one_schedule: bool) -> list[tuple[int, int]]:
        """Schedules, and chunks a rank, that a pipeline of ``pp`` ranks can have."""
        table = self.tails.schedules
        of = table.keys[table.owner] == pp
        options = list(zip(table.columns["schedule"][of].tolist(), table.columns["vpp"][of].tolist(), strict=True))
        usual = [option for option in options if option[0] == _USUAL]
        return (usual or options[:1]) if one_schedule else options

    def _timed(
        self, batch: ConfigBatch, passes: Passes, options: list[tuple[int, int]]
    ) -> dict[tuple[int, int], BoolArray]:
        """By schedule and chunks, which configs of one pp run them and may be fast enough."""
        tails, timed = self.tails, {}
        for schedule, vpp in options:
            under = _under(batch, schedule, vpp)
            alive = runs_pipeline(under, tails.framework, tails.model, tails.workload)
            rows = np.flatnonzero(alive)
            if len(rows):
                least = self.bounds.step(under.take(rows), passes.take(rows), SCHEDULES[schedule], vpp)
                alive[rows] = least <= self.limit
            if alive.any():
                timed[schedule, vpp] = alive
        return timed

    def _sharded(self, batch: ConfigBatch, passes: Passes, options: list[tuple[int, int]]) -> list[_Sharded]:
        """Of one pp, with every choice of ZeRO whose weights and optimizer may fit; a list of one, or none."""
        bounds, tails = self.bounds, self.tails
        timed = self._timed(batch, passes, options)
        if not timed:
            return []
        rows = np.flatnonzero(np.logical_or.reduce(list(timed.values())))
        columns: Columns = {name: getattr(batch, name)[rows] for name in FIELDS if name not in tails.zeros.columns}
        columns = tails.zeros.cross(columns | {"origin": rows})
        origin, whole = columns.pop("origin"), as_batch(columns)
        together = {name: combines(_under(whole, name, 1), tails.framework) for name in {name for name, _ in timed}}
        runs = {option: alive[origin] & together[option[0]] for option, alive in timed.items()}
        state = bounds.state(whole)
        fits = self._fits(bounds.mean_state(whole, state), whole)
        ways = np.sum(list(runs.values()), axis=0)
        self.num_too_large += int(ways[~fits].sum())
        kept = np.flatnonzero(fits & (ways > 0))
        if not len(kept):
            return []
        whole = whole.take(kept)
        runs = {option: mask[kept] for option, mask in runs.items()}
        return [_Sharded(whole, state[:, kept], bounds.whole_passes(whole), runs)]

    def _fitting(self, sharded: _Sharded, activations: tuple[FloatArray, FloatArray]) -> Iterator[Leaves]:
        """Those that may be fast enough and fit, schedule by schedule."""
        bounds, (saved, beside) = self.bounds, activations
        for (schedule, vpp), mask in sharded.runs.items():
            rows = np.flatnonzero(mask)
            if not len(rows):
                continue
            under = _under(sharded.batch.take(rows), schedule, vpp)
            least = bounds.step(under, sharded.passes.take(rows), SCHEDULES[schedule], vpp)
            fast = np.flatnonzero(least <= self.limit)
            if not len(fast):
                continue
            rows, under, least = rows[fast], under.take(fast), least[fast]
            held = bounds.peak(under, sharded.state[:, rows], (saved[:, rows], beside[rows]), SCHEDULES[schedule], vpp)
            fits = self._fits(held, under)
            self.num_too_large += len(fits) - int(fits.sum())
            yield under.take(fits), least[fits]

    def _fits(self, least_bytes: FloatArray, batch: ConfigBatch) -> BoolArray:
        """Whether configs that hold at least so much may be recommended."""
        return needed_bytes(least_bytes, np.zeros(len(batch)), self.margin) <= self.bounds.usable(batch)

    # -- scored -----------------------------------------------------------------------------------------------------

    def _score(self, leaves: Leaves, *, until_better: bool = False) -> None:
        """Score configs, in the order they are given, while they may be among the best."""
        batch, least = leaves
        at, step = 0, SCORED_FIRST
        while at < len(batch) and least[at] <= self.limit:
            before, some = self.limit, np.arange(at, min(at + step, len(batch)))
            at, step = at + step, 4 * step
            self._score_some(batch.take(some[least[some] <= self.limit]))
            if until_better and np.isfinite(self.limit) and self.limit > 0.98 * before:
                return

    def _score_some(self, batch: ConfigBatch) -> None:
        bounds, tails = self.bounds, self.tails
        seconds = batch_seconds(tails.model, tails.workload, bounds.cluster, tails.framework, batch, tells_waits=False)
        self.num_scored += len(batch)
        step_s = np.zeros(len(batch))
        for name in SECONDS:  # in the order of ``BatchEstimate.step_s``
            if name != "hidden_s":
                step_s = step_s + seconds[name]
        fast = np.flatnonzero(step_s <= self.limit)
        if len(fast):
            self._hold(batch.take(fast), step_s[fast])
            feasible = [each.step_s[each.needed_bytes <= each.usable_bytes] for each in self._found]
            every = np.concatenate(feasible)
            if len(every) >= self.wanted:
                self.limit = float(np.partition(every, self.wanted - 1)[self.wanted - 1]) * (1.0 + TIE)

    def _hold(self, batch: ConfigBatch, step_s: FloatArray) -> None:
        """Score configs in memory."""
        tails = self.tails
        held = batch_bytes(tails.model, tails.workload, self.bounds.cluster, tails.framework, batch)
        peak = np.asarray(sum(held[f"{name}_bytes"] for name in KINDS), dtype=np.float64)
        needs = needed_bytes(peak, held["fragmentation_bytes"], self.margin)
        offers = np.asarray(held["capacity_bytes"] - held["reserved_bytes"], dtype=np.float64)
        self._found.append(Found(batch, step_s, peak, needs, offers))

    def _together(self) -> Found:
        none = self.families.cells.take(np.zeros(0, dtype=np.int64))
        found = [*self._found, Found(none, *(np.zeros(0) for _ in range(4)))]
        rest = (np.concatenate([getattr(each, field.name) for each in found]) for field in fields(Found)[1:])
        return Found(ConfigBatch.concatenate([each.batch for each in found]), *rest)

    # -- nothing fits -----------------------------------------------------------------------------------------------

    def _nearest(self) -> Found:
        """Scored configs, the one that lacks least memory among them."""
        rows = self.families.rows
        smallest = self.tails.sizes[self.families.has_size.argmax(axis=1)]
        columns = rows | {"micro_batch_size": smallest, "row": np.arange(len(smallest))}
        columns = self.tails.recomputes.cross(self.tails.zeros.cross(columns))
        of, lacking = columns.pop("row"), np.full(len(smallest), np.inf)
        np.minimum.at(lacking, of, self._lacking(as_batch(columns)))
        order, at, least = np.argsort(lacking, kind="stable"), 0, np.inf
        self._found = []
        while at < len(order) and lacking[order[at]] < least:
            batch = self.tails.configs(filtered(rows, order[at : at + NEAREST]))
            at, each = at + NEAREST, self._lacking(batch)
            nearest = np.argsort(each, kind="stable")
            for start in range(0, len(nearest), 1000):
                chosen = nearest[start : start + 1000]
                if each[chosen[0]] >= least:
                    break
                self._hold(batch.take(chosen), np.zeros(len(chosen)))
                last = self._found[-1]
                least = min(least, float((last.needed_bytes - last.usable_bytes).min()))
        return self._together()

    def _lacking(self, batch: ConfigBatch) -> FloatArray:
        held = self.bounds.mean_peak(batch)
        return needed_bytes(held, np.zeros(len(batch)), self.margin) - self.bounds.usable(batch)


def _under(batch: ConfigBatch, schedule: int, vpp: int) -> ConfigBatch:
    size = len(batch)
    return replace(batch, schedule=np.full(size, schedule, dtype=np.int64), vpp=np.full(size, vpp, dtype=np.int64))
