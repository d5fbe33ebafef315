"""Families of configs that are priced at once, and what they take at least: the space from above.

A *cell* is a choice of degrees but for pp and dp: with a micro-batch, a recompute choice and a number of chunks it is a
*family*, all configs of which take at least ``Bounds.mean_step`` seconds whatever their pp, dp, schedule and ZeRO.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import ConfigBatch, IntArray, rank_tokens
from meshwright.planner.bounds import Bounds, Passes
from meshwright.planner.space import Space
from meshwright.planner.tables import as_batch, filtered

FloatArray = NDArray[np.float64]

CELL = ("tp", "cp_ring", "cp_ulysses", "sequence_parallel", "vocab_parallel", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Family:
    """Some families: the cell and the place of the micro-batch of each, a config of each, and what it takes."""

    cell: IntArray
    size: IntArray
    batch: ConfigBatch
    passes: Passes
    least_s: FloatArray

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, rows: NDArray[np.int64]) -> Family:
        """The families at these positions."""
        return Family(
            self.cell[rows], self.size[rows], self.batch.take(rows), self.passes.take(rows), self.least_s[rows]
        )


@dataclass(frozen=True, slots=True)
class Sized:
    """Cells with the places of micro-batches, the fastest first, and what each takes at least."""

    cell: IntArray
    size: IntArray
    least_s: FloatArray

    def __len__(self) -> int:
        return len(self.cell)

    def slice(self, start: int, end: int) -> Sized:
        """Those from one position up to another."""
        return Sized(self.cell[start:end], self.size[start:end], self.least_s[start:end])


class Families:
    """The cells of a space, and how they are taken apart."""

    def __init__(self, space: Space, bounds: Bounds) -> None:
        self.tails, self.bounds = space.tails, bounds
        self.cells, cell = as_batch(space.degrees).distinct(*CELL)
        order = np.argsort(cell, kind="stable")
        self.rows = filtered(space.degrees, order)  # of degrees; those of a cell stand together
        self._cell = cell[order]
        self._start = np.searchsorted(self._cell, np.arange(len(self.cells)))
        self._end = np.append(self._start[1:], len(self._cell))
        self.has_size = self.tails.has_size(self.rows)  # [rows, sizes]
        self._any_size = np.logical_or.reduceat(self.has_size, self._start, axis=0)  # [cells, sizes]
        self._recomputes = np.unique(self.tails.recomputes.columns["recompute"]).tolist()
        chunks = self.tails.chunks
        self._chunks = np.unique(chunks.columns["ep_chunks"]).tolist()
        self._chunked = {each: chunks.keys[chunks.owner][chunks.columns["ep_chunks"] == each] for each in self._chunks}

    def cells_at_least(self) -> FloatArray:
        """Least seconds of each cell: those with its largest micro-batch, or with its smallest.

        From two sequences on a micro-batch takes less for each of them, the more there are: matmuls are more efficient
        and fewer messages are longer.
        """
        ends = [self._any_size.argmax(axis=1), self._any_size.shape[1] - 1 - self._any_size[:, ::-1].argmax(axis=1)]
        every = np.arange(len(self.cells))
        return np.minimum(*(self._at_least(every, end) for end in ends))

    def sized(self, cells: IntArray, limit: float) -> Sized:
        """Cells with each micro-batch with which they may take no more than ``limit``, the fastest first."""
        place, size = np.nonzero(self._any_size[cells])
        cell = cells[place]
        least = self._at_least(cell, size)
        order = np.argsort(least, kind="stable")
        order = order[least[order] <= limit]
        return Sized(cell[order], size[order], least[order])

    def families(self, sized: Sized, limit: float) -> Family:
        """With recompute and chunks those that may take no more than ``limit``, the fastest first.

        What is too slow with the least recompute is so with more.
        """
        pieces = []
        for chunks in self._chunks:
            divides = rank_tokens(self._batch(sized.cell, sized.size, 0, chunks), self.tails.workload) % chunks == 0
            kept = np.flatnonzero(np.isin(self.cells.ep[sized.cell], self._chunked[chunks]) & divides)
            pieces.append((sized.cell[kept], sized.size[kept], np.full(len(kept), chunks)))
        cell, size, chunk = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
        found = []
        for recompute in self._recomputes:
            batch = self._batch(cell, size, recompute, chunk)
            passes = self.bounds.passes(batch)
            least = self.bounds.mean_step(batch, passes)
            fast = np.flatnonzero(least <= limit)
            found.append(Family(cell, size, batch, passes, least).take(fast))
            if recompute == self._recomputes[0]:
                cell, size, chunk = cell[fast], size[fast], chunk[fast]
        family = Family(
            cell=np.concatenate([part.cell for part in found]),
            size=np.concatenate([part.size for part in found]),
            batch=ConfigBatch.concatenate([part.batch for part in found]),
            passes=Passes.concatenate([part.passes for part in found]),
            least_s=np.concatenate([part.least_s for part in found]),
        )
        return family.take(np.argsort(family.least_s, kind="stable"))

    def placed(self, family: Family) -> tuple[ConfigBatch, IntArray]:
        """Families on every pp and dp they can have; and which family each of these is."""
        counts = (self._end - self._start)[family.cell]
        of = np.repeat(np.arange(len(family)), counts)
        row = self._start[family.cell][of] + np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = np.flatnonzero(self.has_size[row, family.size[of]])
        of, row = of[kept], row[kept]
        return replace(family.batch.take(of), pp=self.rows["pp"][row], dp=self.rows["dp"][row]), of

    def _at_least(self, cell: IntArray, size: IntArray) -> FloatArray:
        """Least seconds under the least recompute and any chunks."""
        batch = self._batch(cell, size, self._recomputes[0], 1)
        return self.bounds.mean_step(batch, self.bounds.passes(batch, exchanges=len(self._chunks) == 1))

    def _batch(self, cell: IntArray, size: IntArray, recompute: int, chunks: int | IntArray) -> ConfigBatch:
        return replace(
            self.cells.take(cell),
            micro_batch_size=self.tails.sizes[size],
            recompute=np.full(len(cell), recompute, dtype=np.int64),
            ep_chunks=np.broadcast_to(np.asarray(chunks, dtype=np.int64), cell.shape),
        )
