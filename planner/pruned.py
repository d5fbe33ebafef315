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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.estimate import SECONDS
from meshwright.cost_models.framework import combines, runs_pipeline
from meshwright.cost_models.margin import MemoryMargin
from meshwright.cost_models.parts import BlockParts
from meshwright.cost_models.saved import BlockBytes
from meshwright.cost_models.step import batch_seconds
from meshwright.cost_models.strategy import FIELDS, SCHEDULES, BoolArray, ConfigBatch, IntArray, Reason, Schedule
from meshwright.planner.bounds import Bounds, Passes, State
from meshwright.planner.exhaustive import PRUNED, TIE, Scored, Scorer, ranked
from meshwright.planner.families import Families, Family
from meshwright.planner.in_memory import Found, Memory, together
from meshwright.planner.nearest import nearest
from meshwright.planner.plan import RejectedCount
from meshwright.planner.space import Space
from meshwright.planner.tables import Columns, as_batch

FloatArray = NDArray[np.float64]

DIVE = 500  # cells, and of them cells with a micro-batch, looked at at once for a first limit
SCORED_FIRST = 100  # configs of each pp that are scored of them
FAMILIES = 2000  # cells with a micro-batch that are taken apart first, sixteen times as many the next time
ENOUGH = 2000  # configs left of families before they are scored
SCORED_AT_ONCE = 2**14
_USUAL = SCHEDULES.index(Schedule.ONE_F_ONE_B)


@dataclass(frozen=True, slots=True)
class _Sharded:
    """Configs of one pp that lack a schedule: what is resident, and which schedules they run."""

    batch: ConfigBatch
    state: State
    runs: dict[tuple[int, int], BoolArray]


@dataclass(frozen=True, slots=True)
class _Fast:
    """The same once blocks are priced: least seconds under each schedule, infinite where that is too slow."""

    batch: ConfigBatch
    state: State
    parts: list[BlockParts]
    least_s: dict[tuple[int, int], FloatArray]


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Configs of one pp and schedule that may be among the best: what is known of them, their least seconds."""

    batch: ConfigBatch
    parts: list[BlockParts]
    held: list[BlockBytes]
    least_s: FloatArray

    def __len__(self) -> int:
        return len(self.batch)

    def take(self, rows: NDArray[np.int64]) -> _Leaves:
        """The configs at these positions."""
        parts = [part.take(rows) for part in self.parts]
        return _Leaves(self.batch.take(rows), parts, [block.take(rows) for block in self.held], self.least_s[rows])


class Pruned:
    """The search for the ``wanted`` best configs of a space."""

    def __init__(
        self,
        space: Space,
        bounds: Bounds,
        margin: MemoryMargin | None,
        wanted: int,
        on_progress: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.space, self.bounds, self.wanted, self.on_progress = space, bounds, wanted, on_progress
        self.tails, self.families, self.memory = (
            space.tails,
            Families(space, bounds),
            Memory(bounds, space.tails, margin),
        )
        self.limit = np.inf
        self._begin()

    def _begin(self) -> None:
        self.num_scored = self.num_too_large = self.num_unfit = self.num_narrow = 0
        self._found: list[Found] = []

    def run(self, scorer: Scorer) -> Scored:
        """Find them, or where nothing fits what is nearest to it; ``scorer`` is for those that are shown."""
        self._search()
        found = together(self._found, self.families.cells)
        found = found.take(found.step_s <= self.limit)
        if not self._found:
            self.on_progress("nothing fits: looking for what is nearest")
            found = nearest(self.families, self.bounds, self.memory)
        unfit = ((Reason.OUT_OF_MEMORY, self.num_unfit), (Reason.MEMORY_MARGIN, self.num_narrow))
        return Scored(
            ranking=ranked(found.batch, found.step_s, found.peak_bytes, found.needed_bytes, found.usable_bytes, scorer),
            method=PRUNED,
            wanted=self.wanted,
            num_scored=self.num_scored,
            unfit=tuple(RejectedCount(reason=reason, count=count) for reason, count in unfit if count),
            num_too_slow=self.space.num_legal - self.num_scored - self.num_too_large,
            num_too_large=self.num_too_large,
        )

    def _search(self) -> None:
        number = f"{self.space.num_legal:,} legal configs"
        self.on_progress(f"{number}: a first good one")
        least = self.families.cells_at_least()
        self._dive(np.argsort(least, kind="stable"))
        self._begin()
        sized = self.families.sized(np.flatnonzero(least <= self.limit), self.limit)
        at, step, leaves = 0, FAMILIES, list[_Leaves]()
        while at < len(sized) and sized.least_s[at] <= self.limit:
            self.on_progress(f"{number}: {at:,} of {len(sized):,} families that may be faster than the best so far")
            some = sized.slice(at, at + step)
            at, step = at + step, 16 * step
            leaves += self._leaves(self.families.families(some, self.limit))
            if sum(map(len, leaves)) > ENOUGH:
                self._score(leaves)
                leaves = []
        self._score(leaves)

    def _dive(self, cells: IntArray) -> None:
        """Score some promising families, under one schedule for each pp, for a first limit."""
        for start in range(0, len(cells), DIVE):
            sized = self.families.sized(cells[start : start + DIVE], self.limit)
            first, step = 0, DIVE
            while first < len(sized):
                family = self.families.families(sized.slice(first, first + step), self.limit)
                first, step = first + step, 4 * step
                leaves = self._leaves(family, one_schedule=True)
                self._score([each.take(np.argsort(each.least_s)[:SCORED_FIRST]) for each in leaves])
                if np.isfinite(self.limit):
                    return

    # -- taken apart ------------------------------------------------------------------------------------------------

    def _leaves(self, family: Family, *, one_schedule: bool = False) -> list[_Leaves]:
        """Configs of some families that may be among the best."""
        batch, of = self.families.placed(family)
        of_pp = []
        for pp in np.unique(batch.pp).tolist():
            rows = np.flatnonzero(batch.pp == pp)
            options = self._schedules(pp, one_schedule=one_schedule)
            of_pp += self._sharded(batch.take(rows), family.passes.take(of[rows]), options)
        if not of_pp:
            return []
        # of all at once, since blocks are priced alike whatever the pp: first in time, then in memory what is left
        parts = self.bounds.parts(ConfigBatch.concatenate([each.batch for each in of_pp]))
        start, fast = 0, []
        for each in of_pp:
            fast += self._fast(each, [part.take(np.arange(start, start + len(each.batch))) for part in parts])
            start += len(each.batch)
        if not fast:
            return []
        leaves: list[_Leaves] = []
        held, start = self.bounds.held(ConfigBatch.concatenate([each.batch for each in fast])), 0
        for one in fast:
            own = np.arange(start, start + len(one.batch))
            start += len(own)
            leaves += self._fitting(one, [block.take(own) for block in held])
        return leaves

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
        fits = self.memory.fits(bounds.mean_state(whole, state), whole)
        ways = np.sum(list(runs.values()), axis=0)
        self.num_too_large += int(ways[~fits].sum())
        kept = np.flatnonzero(fits & (ways > 0))
        if not len(kept):
            return []
        whole = whole.take(kept)
        runs = {option: mask[kept] for option, mask in runs.items()}
        return [_Sharded(whole, state.take(kept), runs)]

    def _fast(self, sharded: _Sharded, parts: list[BlockParts]) -> list[_Fast]:
        """Those that may be fast enough under some schedule; a list of one, or none."""
        passes, timed = self.bounds.whole_passes(parts), {}
        for (name, vpp), mask in sharded.runs.items():
            rows = np.flatnonzero(mask)
            if len(rows):
                under = _under(sharded.batch.take(rows), name, vpp)
                least = np.full(len(mask), np.inf)
                least[rows] = self.bounds.step(under, passes.take(rows), SCHEDULES[name], vpp)
                least[least > self.limit] = np.inf
                if np.isfinite(least).any():
                    timed[name, vpp] = least
        if not timed:
            return []
        rows = np.flatnonzero(np.isfinite(np.min(list(timed.values()), axis=0)))
        left = {option: least[rows] for option, least in timed.items()}
        return [_Fast(sharded.batch.take(rows), sharded.state.take(rows), [part.take(rows) for part in parts], left)]

    def _fitting(self, fast: _Fast, held: list[BlockBytes]) -> Iterator[_Leaves]:
        """Those that may fit, schedule by schedule."""
        saved, beside = self.bounds.activations(held)
        for (name, vpp), least in fast.least_s.items():
            rows = np.flatnonzero(np.isfinite(least))
            under = _under(fast.batch.take(rows), name, vpp)
            own = (saved[:, rows], beside[rows])
            fits = self.memory.fits(self.bounds.peak(under, fast.state.take(rows), own, SCHEDULES[name], vpp), under)
            self.num_too_large += len(fits) - int(fits.sum())
            rows = rows[fits]
            if len(rows):
                costs, bytes_ = [part.take(rows) for part in fast.parts], [block.take(rows) for block in held]
                yield _Leaves(under.take(fits), costs, bytes_, least[rows])

    # -- scored -----------------------------------------------------------------------------------------------------

    def _score(self, leaves: list[_Leaves]) -> None:
        """Score configs while they may be among the best, those of the most promising schedule first."""
        for each in sorted(leaves, key=lambda each: float(each.least_s.min())):
            fast = np.flatnonzero(each.least_s <= self.limit)
            for start in range(0, len(fast), SCORED_AT_ONCE):
                self._score_some(each.take(fast[start : start + SCORED_AT_ONCE]))

    def _score_some(self, leaves: _Leaves) -> None:
        """Score configs of one schedule in memory, and in time those that may be recommended."""
        self.num_scored += len(leaves)
        found = self.memory.of(leaves.batch, leaves.held)
        self.num_unfit += int((found.peak_bytes > found.usable_bytes).sum())
        fits = np.flatnonzero(found.needed_bytes <= found.usable_bytes)
        self.num_narrow += int((found.peak_bytes <= found.usable_bytes).sum()) - len(fits)
        if not len(fits):
            return
        tails, batch = self.tails, leaves.batch.take(fits)
        known = not tails.framework.broadcasts_weights  # else parts depend on the schedule's stages
        seconds = batch_seconds(
            tails.model,
            tails.workload,
            self.bounds.cluster,
            tails.framework,
            batch,
            tells_waits=False,
            parts=[part.take(fits) for part in leaves.parts] if known else None,
        )
        step_s = np.zeros(len(batch))
        for name in SECONDS:  # in the order of ``BatchEstimate.step_s``
            if name != "hidden_s":
                step_s = step_s + seconds[name]
        fast = step_s <= self.limit
        if fast.any():
            self._found.append(replace(found.take(fits), step_s=step_s).take(fast))
            every = np.concatenate([each.step_s for each in self._found])
            if len(every) >= self.wanted:
                self.limit = float(np.partition(every, self.wanted - 1)[self.wanted - 1]) * (1.0 + TIE)


def _under(batch: ConfigBatch, schedule: int, vpp: int) -> ConfigBatch:
    size = len(batch)
    return replace(batch, schedule=np.full(size, schedule, dtype=np.int64), vpp=np.full(size, vpp, dtype=np.int64))
