"""Branch and bound over the legal space: the best configs and proofs that the others are not, without scoring them.

A *family* is what ``bounds`` prices at once: degrees but for pp and dp, micro-batch, recompute and chunks. Families are
taken apart only while what they take at least (``Bounds.mean_step``) is no more than the ``wanted``-th best step found
so far, first into pp, dp and schedules (``Bounds.step``), then into ZeRO's choices (``Bounds.peak``: what holds more
than a device offers is out). What is left is scored, the most promising first: its time by the cost models, and its
memory where the time is still among the best.

Exact: the best configs are those of scoring everything, ties included (``exhaustive.TIE``), since no bound is above the
model's value and what is ruled out is strictly slower than the last of the wanted, with its ties, or does not fit.
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
from meshwright.cost_models.strategy import FIELDS, SCHEDULES, ConfigBatch, IntArray, Schedule, rank_tokens
from meshwright.planner.bounds import Bounds, Passes
from meshwright.planner.exhaustive import PRUNED, TIE, Scored, Scorer, ranked
from meshwright.planner.space import Space
from meshwright.planner.tables import Columns, as_batch, filtered

FloatArray = NDArray[np.float64]

DIVE = 1000  # cells, then families, looked at first for a good step to compare with
SCORED_FIRST = 300  # configs scored of them
NEAREST = 20  # degrees looked at once where nothing fits
FAMILIES = 2000  # cells with a micro-batch taken apart at first
SCORED_AT_ONCE = 2**14

_USUAL = SCHEDULES.index(Schedule.ONE_F_ONE_B)
CELL = ("tp", "cp_ring", "cp_ulysses", "sequence_parallel", "vocab_parallel", "ep", "etp")


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


class Pruned:
    """The search for the ``wanted`` best configs of a space."""

    def __init__(self, space: Space, bounds: Bounds, margin: MemoryMargin | None, wanted: int) -> None:
        self.space, self.bounds, self.margin, self.wanted = space, bounds, margin, wanted
        self.tails = space.tails
        degrees = space.degrees
        cells, self._cell = as_batch(degrees).distinct(*CELL)
        order = np.argsort(self._cell, kind="stable")
        self.rows = filtered(degrees, order)  # those of a cell stand together
        self._cell = self._cell[order]
        self.cells = cells
        self._start = np.searchsorted(self._cell, np.arange(len(cells)))
        self.has_size = self.tails.has_size(self.rows)  # [rows, sizes]
        self.num_scored = self.num_too_large = 0
        self.limit = np.inf
        self._best: list[Found] = []

    def run(self, scorer: Scorer) -> Scored:
        """Find them, or where nothing fits what is nearest to it; ``scorer`` is for those that are shown."""
        found = self._search()
        num_scored, num_too_large = self.num_scored, self.num_too_large
        found = found.take(found.step_s <= self.limit)
        if not (found.needed_bytes <= found.usable_bytes).any():
            found = self._nearest()
        ranking = ranked(found.batch, found.step_s, found.peak_bytes, found.needed_bytes, found.usable_bytes, scorer)
        return Scored(
            ranking=ranking,
            method=PRUNED,
            wanted=self.wanted,
            num_scored=num_scored,
            num_too_slow=self.space.num_legal - num_scored - num_too_large,
            num_too_large=num_too_large,
        )

    def _search(self) -> Found:
        cells = self._cells_at_least()
        self._dive(np.argsort(cells, kind="stable"))
        self._best, self.num_scored, self.num_too_large = [], 0, 0
        alive = np.flatnonzero(cells <= self.limit)
        cell, size, least = self._sized(alive)
        order, at, step = np.argsort(least, kind="stable"), 0, FAMILIES
        while at < len(order) and least[order[at]] <= self.limit:
            some = order[at : at + step]
            at, step = at + step, 4 * step
            cells_of, sizes_of, batch, passes, _ = self._families(cell[some], size[some])
            self._score(*self._placed(cells_of, sizes_of, batch, passes))
        return self._found()

    # -- families ---------------------------------------------------------------------------------------------------

    def _cells_at_least(self) -> FloatArray:
        """Least seconds of each cell: with its largest micro-batch, or with one of 1.

        From two sequences on a micro-batch takes less for each, the more there are.
        """
        any_row = np.logical_or.reduceat(self.has_size, self._start, axis=0)
        ends = [any_row.argmax(axis=1), any_row.shape[1] - 1 - any_row[:, ::-1].argmax(axis=1)]
        every = np.arange(len(self.cells))
        return np.minimum(*(self._at_least(every, end) for end in ends))

    def _at_least(self, cell: IntArray, size: IntArray) -> FloatArray:
        """Least seconds under the least recompute and any chunks."""
        batch = self._family(cell, size, self._least_recompute, 1)
        return self.bounds.mean_step(batch, self.bounds.passes(batch, exchanges=self._one_chunk))

    def _sized(self, cells: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
        """Cells with each of their micro-batches that may be fast enough, and their least seconds."""
        any_row = np.logical_or.reduceat(self.has_size, self._start, axis=0)[cells]
        place, size = np.nonzero(any_row)
        cell = cells[place]
        least = self._at_least(cell, size)
        alive = least <= self.limit
        return cell[alive], size[alive], least[alive]

    def _families(self, cell: IntArray, size: IntArray) -> tuple[IntArray, IntArray, ConfigBatch, Passes, FloatArray]:
        """Those that may be fast enough, of cells with micro-batches crossed with recompute and chunks."""
        cell, size, batch = self._apart(cell, size)
        passes = self.bounds.passes(batch)
        least = self.bounds.mean_step(batch, passes)
        alive = np.flatnonzero(least <= self.limit)
        return cell[alive], size[alive], batch.take(alive), passes.take(alive), least[alive]

    @property
    def _least_recompute(self) -> int:
        return int(self.tails.recomputes.columns["recompute"].min())

    @property
    def _one_chunk(self) -> bool:
        return len(np.unique(self.tails.chunks.columns["ep_chunks"])) == 1

    def _family(self, cell: IntArray, size: IntArray, recompute: object, chunks: object) -> ConfigBatch:
        return replace(
            self.cells.take(cell),
            micro_batch_size=self.tails.sizes[size],
            recompute=np.broadcast_to(np.asarray(recompute, dtype=np.int64), cell.shape),
            ep_chunks=np.broadcast_to(np.asarray(chunks, dtype=np.int64), cell.shape),
        )

    def _apart(self, cell: IntArray, size: IntArray) -> tuple[IntArray, IntArray, ConfigBatch]:
        recomputes = np.unique(self.tails.recomputes.columns["recompute"])
        chunks = self.tails.chunks
        found = []
        for recompute in recomputes.tolist():
            for chunk in np.unique(chunks.columns["ep_chunks"]).tolist():
                offered = chunks.keys[chunks.owner][chunks.columns["ep_chunks"] == chunk]
                batch = self._family(cell, size, recompute, chunk)
                rows = np.flatnonzero(
                    np.isin(batch.ep, offered) & (rank_tokens(batch, self.tails.workload) % chunk == 0)
                )
                found.append((cell[rows], size[rows], batch.take(rows)))
        cells, sizes, batches = zip(*found, strict=True)
        return np.concatenate(cells), np.concatenate(sizes), ConfigBatch.concatenate(batches)

    # -- taken apart ------------------------------------------------------------------------------------------------

    def _dive(self, order: IntArray) -> None:
        """Score some promising families, under one schedule for each pp, for a first limit."""
        at = 0
        while at < len(order) and not np.isfinite(self.limit):
            cell, size, least = self._sized(order[at : at + DIVE])
            first = np.argsort(least, kind="stable")
            cell, size, batch, passes, least = self._families(cell[first], size[first])
            at, slices = at + DIVE, np.argsort(least, kind="stable")
            for start in range(0, len(slices), DIVE):
                few = slices[start : start + DIVE]
                before = self.limit
                if least[few[0]] > before:
                    break
                found, step = self._placed(cell[few], size[few], batch.take(few), passes.take(few), one_schedule=True)
                best = np.argsort(step, kind="stable")[:SCORED_FIRST]
                self._score(found.take(best), step[best])
                if np.isfinite(before) and self.limit > 0.98 * before:
                    break

    def _placed(
        self, cell: IntArray, size: IntArray, batch: ConfigBatch, passes: Passes, *, one_schedule: bool = False
    ) -> tuple[ConfigBatch, FloatArray]:
        """Families on every pp and dp, under every schedule and every choice of ZeRO."""
        ends = np.append(self._start[1:], len(self._cell))
        counts = ends[cell] - self._start[cell]
        family = np.repeat(np.arange(len(cell)), counts)
        row = self._start[cell][family] + np.arange(len(family)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = np.flatnonzero(self.has_size[row, size[family]])
        family, row = family[kept], row[kept]
        batches, steps = [], []
        for pp in np.unique(self.rows["pp"][row]).tolist():
            of_pp = np.flatnonzero(self.rows["pp"][row] == pp)
            some = replace(batch.take(family[of_pp]), pp=self.rows["pp"][row[of_pp]], dp=self.rows["dp"][row[of_pp]])
            for found, step in self._scheduled(pp, some, passes.take(family[of_pp]), one_schedule=one_schedule):
                batches.append(found)
                steps.append(step)
        if not batches:
            return batch.take(np.zeros(0, dtype=np.int64)), np.zeros(0)
        return ConfigBatch.concatenate(batches), np.concatenate(steps)

    def _scheduled(
        self, pp: int, batch: ConfigBatch, passes: Passes, *, one_schedule: bool
    ) -> Iterator[tuple[ConfigBatch, FloatArray]]:
        """Configs of one pp that may be fast enough and fit."""
        bounds, tails = self.bounds, self.tails
        options = self.schedules(pp)
        if one_schedule:
            options = [one for one in options if one[0] == _USUAL] or options[:1]
        timed: list[tuple[int, int, FloatArray]] = []
        alive = np.zeros(len(batch), dtype=np.bool_)
        for schedule, vpp in options:
            under = _under(batch, schedule, vpp)
            run = runs_pipeline(under, tails.framework, tails.model, tails.workload)
            step = np.full(len(batch), np.inf)
            rows = np.flatnonzero(run)
            if len(rows):
                step[rows] = bounds.step(under.take(rows), passes.take(rows), SCHEDULES[schedule], vpp)
            step[step > self.limit] = np.inf
            if np.isfinite(step).any():
                alive |= np.isfinite(step)
                timed.append((schedule, vpp, step))
        rows = np.flatnonzero(alive)
        if not len(rows):
            return
        columns: Columns = {
            name: getattr(batch, name)[rows] for name in FIELDS if name not in ("zero_stage", "dp_shard")
        }
        columns["origin"] = rows
        columns = tails.zeros.cross(columns)
        origin = columns.pop("origin")
        whole = as_batch(columns)
        held = bounds.held(whole)
        usable = bounds.usable(whole)
        few = np.flatnonzero(needed_bytes(bounds.mean_peak(whole, held), np.zeros(len(whole)), self.margin) <= usable)
        self.num_too_large += sum(
            int(np.isfinite(step[origin]).sum() - np.isfinite(step[origin[few]]).sum()) for *_, step in timed
        )
        whole, held, usable, origin = whole.take(few), [block.take(few) for block in held], usable[few], origin[few]
        passes = bounds.whole_passes(whole)
        for schedule, vpp, step in timed:
            under = _under(whole, schedule, vpp)
            of = np.flatnonzero(np.isfinite(step[origin]) & combines(under, tails.framework))
            if not len(of):
                continue
            some = under.take(of)
            least = bounds.step(some, passes.take(of), SCHEDULES[schedule], vpp)
            alive = least <= self.limit
            of, some, least = of[alive], some.take(alive), least[alive]
            if not len(of):
                continue
            peak = bounds.peak(some, [block.take(of) for block in held], SCHEDULES[schedule], vpp)
            fits = needed_bytes(peak, np.zeros(len(of)), self.margin) <= usable[of]
            self.num_too_large += len(of) - int(fits.sum())
            if fits.any():
                yield some.take(fits), least[fits]

    def schedules(self, pp: int) -> list[tuple[int, int]]:
        """Schedules and chunks a rank that a pipeline of ``pp`` ranks can have."""
        table = self.tails.schedules
        of = table.keys[table.owner] == pp
        return list(zip(table.columns["schedule"][of].tolist(), table.columns["vpp"][of].tolist(), strict=True))

    # -- scored -----------------------------------------------------------------------------------------------------

    def _score(self, batch: ConfigBatch, least: FloatArray) -> None:
        """Score configs, those with the least seconds first, while they may be among the best."""
        order = np.argsort(least, kind="stable")
        at, step = 0, SCORED_FIRST
        while at < len(order):
            some = order[at : at + step]
            at, step = at + step, min(4 * step, SCORED_AT_ONCE)
            some = some[least[some] <= self.limit]
            if not len(some):
                break
            self._score_all(batch.take(some))

    def _score_all(self, batch: ConfigBatch) -> None:
        tails, bounds = self.tails, self.bounds
        seconds = batch_seconds(tails.model, tails.workload, bounds.cluster, tails.framework, batch, tells_waits=False)
        step_s = np.zeros(len(batch))
        for name in SECONDS:
            if name != "hidden_s":
                step_s = step_s + seconds[name]
        self.num_scored += len(batch)
        fast = np.flatnonzero(step_s <= self.limit)
        if not len(fast):
            return
        batch, step_s = batch.take(fast), step_s[fast]
        self._hold(batch, step_s)
        self._lower_limit()

    def _hold(self, batch: ConfigBatch, step_s: FloatArray) -> None:
        """Score configs in memory."""
        tails, bounds = self.tails, self.bounds
        held = batch_bytes(tails.model, tails.workload, bounds.cluster, tails.framework, batch)
        peak = np.asarray(sum(held[f"{name}_bytes"] for name in KINDS), dtype=np.float64)
        needs = needed_bytes(peak, held["fragmentation_bytes"], self.margin)
        offers = np.asarray(held["capacity_bytes"] - held["reserved_bytes"], dtype=np.float64)
        self._best.append(Found(batch, step_s, peak, needs, offers))

    def _lower_limit(self) -> None:
        feasible = np.concatenate([each.step_s[each.needed_bytes <= each.usable_bytes] for each in self._best])
        if len(feasible) >= self.wanted:
            self.limit = float(np.partition(feasible, self.wanted - 1)[self.wanted - 1]) * (1.0 + TIE)

    def _found(self) -> Found:
        none = self.cells.take(np.zeros(0, dtype=np.int64))
        found = [*self._best, Found(none, *(np.zeros(0) for _ in range(4)))]
        rest = (np.concatenate([getattr(each, field.name) for each in found]) for field in fields(Found)[1:])
        return Found(ConfigBatch.concatenate([each.batch for each in found]), *rest)

    # -- nothing fits -----------------------------------------------------------------------------------------------

    def _nearest(self) -> Found:
        """Scored configs, the one that lacks least memory among them."""
        smallest = self.tails.sizes[self.has_size.argmax(axis=1)]
        rows = self.tails.recomputes.cross(
            self.tails.zeros.cross(self.rows | {"micro_batch_size": smallest} | {"row": np.arange(len(smallest))})
        )
        of = rows.pop("row")
        batch = as_batch(rows)
        lacking = np.full(len(smallest), np.inf)
        np.minimum.at(lacking, of, self._lacking(batch))
        order, at, self._best = np.argsort(lacking, kind="stable"), 0, []
        least = np.inf
        while at < len(order) and lacking[order[at]] < least:
            some = order[at : at + NEAREST]
            at += NEAREST
            batch = self.tails.configs(filtered(self.rows, some))
            each = self._lacking(batch)
            few = np.argsort(each, kind="stable")
            for start in range(0, len(few), 1000):
                chosen = few[start : start + 1000]
                if each[chosen[0]] >= least:
                    break
                self._hold(batch.take(chosen), np.zeros(len(chosen)))
                last = self._best[-1]
                least = min(least, float((last.needed_bytes - last.usable_bytes).min()))
        return self._found()

    def _lacking(self, batch: ConfigBatch) -> FloatArray:
        held = self.bounds.mean_peak(batch, self.bounds.held(batch))
        return needed_bytes(held, np.zeros(len(batch)), self.margin) - self.bounds.usable(batch)


def _under(batch: ConfigBatch, schedule: int, vpp: int) -> ConfigBatch:
    size = len(batch)
    return replace(batch, schedule=np.full(size, schedule, dtype=np.int64), vpp=np.full(size, vpp, dtype=np.int64))
