"""What degrees can be combined with: schedules, micro-batches, ZeRO, recompute, chunks of the expert exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost_models.framework import Framework, combines, runs_pipeline
from meshwright.cost_models.strategy import (
    REASONS,
    RECOMPUTES,
    SCHEDULES,
    BoolArray,
    ConfigBatch,
    IntArray,
    legal,
    rank_tokens,
)
from meshwright.cost_models.workload import Workload
from meshwright.planner.tables import Columns, Table, as_batch, filtered
from meshwright.profiler.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Numbers:
    """Configs by row of degrees that are legal, and how many candidates in all were not and why."""

    legal: IntArray
    chunked: int  # ep_chunks does not divide a rank's tokens
    not_run: int  # the target does not run the combination


class Tails:
    """The options of every field that is no degree, with the rules about them."""

    def __init__(
        self,
        model: ModelSpec,
        workload: Workload,
        framework: Framework,
        schedules: Table,
        micro_batches: Table,
        zeros: Table,
        recomputes: Table,
        chunks: Table,
    ) -> None:
        self.model, self.workload, self.framework = model, workload, framework
        self.micro_batches, self.zeros, self.recomputes, self.chunks = micro_batches, zeros, recomputes, chunks
        every = dict(schedules.columns) | {"pp": schedules.keys[schedules.owner], "tp": np.ones_like(schedules.owner)}
        verdict = legal(as_batch(every), model, workload)  # heads, tokens and batches are fine with one of each
        self.schedules = schedules.keep(verdict < 0)
        self.broken = {
            REASONS[number]: schedules.keep(verdict == number) for number in np.unique(verdict[verdict >= 0])
        }
        self.sizes = np.unique(micro_batches.columns["micro_batch_size"])

    # -- counting -----------------------------------------------------------------------------------------------------

    def numbers(self, degrees: Columns) -> Numbers:
        """Count what ``degrees``, legal but for their tails, can be combined with."""
        few, row = as_batch(degrees).distinct("tp", "cp", "pp", "dp", "sequence_parallel", "ep")
        rows = {name: getattr(few, name) for name in ("tp", "cp", "pp", "dp", "sequence_parallel", "ep")}
        chunks = self.num_chunks(few)  # [rows, sizes]
        run = self.runs(rows)  # [rows, schedules, sizes]
        combined = self.combinations(rows)  # [rows, schedules, recomputes]
        legal_ones = np.einsum("rsm,rsc,rm->r", run, combined, chunks)
        sized = self.has_size(rows)
        others = self.schedules.count(rows) * self.zeros.count(rows) * self.recomputes.count(rows)
        every = others * (sized * self.chunks.count(rows)[:, None]).sum(axis=1)
        divided = others * (sized * chunks).sum(axis=1)
        times = np.bincount(row, minlength=len(few))
        return Numbers(
            legal=legal_ones[row],
            chunked=int(((every - divided) * times).sum()),
            not_run=int(((divided - legal_ones) * times).sum()),
        )

    def has_size(self, rows: Columns) -> BoolArray:
        """Which of ``sizes`` a row's data ranks can have as micro-batch: ``[rows, sizes]``."""
        table = self.micro_batches
        by_key = np.zeros((len(table.keys), len(self.sizes)), dtype=np.bool_)
        by_key[table.owner, np.searchsorted(self.sizes, table.columns["micro_batch_size"])] = True
        return np.asarray(by_key[np.searchsorted(table.keys, table.key_of(rows))])

    def num_chunks(self, rows: ConfigBatch) -> IntArray:
        """Into how many numbers of chunks a rank's tokens can be cut: ``[rows, sizes]``."""
        found = np.zeros((len(rows), len(self.sizes)), dtype=np.int64)
        options = self.chunks.columns["ep_chunks"]
        offered = self.chunks.keys[self.chunks.owner]
        tokens = np.stack([rank_tokens(_with_size(rows, size), self.workload) for size in self.sizes.tolist()], axis=1)
        for option in np.unique(options).tolist():
            has = np.isin(rows.ep, offered[options == option])
            found += has[:, None] & (tokens % option == 0)
        return found

    def runs(self, rows: Columns) -> IntArray:
        """How many numbers of chunks a rank the target runs with a schedule: ``[rows, schedules, sizes]``."""
        few, row = as_batch(rows).distinct("pp", "dp")
        columns = {"pp": few.pp, "dp": few.dp, "tp": np.ones(len(few), dtype=np.int64), "row": np.arange(len(few))}
        columns = self.micro_batches.cross(self.schedules.cross(columns))
        run = runs_pipeline(as_batch(columns), self.framework, self.model, self.workload)
        columns = filtered(columns, run)
        found = np.zeros((len(few), len(SCHEDULES), len(self.sizes)), dtype=np.int64)
        size = np.searchsorted(self.sizes, columns["micro_batch_size"])
        np.add.at(found, (columns["row"], columns["schedule"], size), 1)
        return found[row]

    def combinations(self, rows: Columns) -> IntArray:
        """How many ways of ZeRO go with a schedule and a recompute: ``[rows, schedules, recomputes]``."""
        few, row = as_batch(rows).distinct("dp", "cp")
        names = np.arange(len(SCHEDULES))
        columns = {"dp": few.dp, "cp": few.cp, "cp_ring": few.cp, "tp": np.ones(len(few), dtype=np.int64)}
        columns = filtered(columns | {"row": np.arange(len(few))}, np.repeat(np.arange(len(few)), len(names)))
        columns["schedule"] = np.tile(names, len(few))
        columns = self.recomputes.cross(self.zeros.cross(columns))
        columns = filtered(columns, combines(as_batch(columns), self.framework))
        found = np.zeros((len(few), len(SCHEDULES), len(RECOMPUTES)), dtype=np.int64)
        np.add.at(found, (columns["row"], columns["schedule"], columns["recompute"]), 1)
        return found[row]

    # -- multiplying out ----------------------------------------------------------------------------------------------

    def configs(self, degrees: Columns) -> ConfigBatch:
        """Every legal config with these degrees."""
        full = self.schedules.cross(degrees)
        for table in (self.micro_batches, self.zeros, self.recomputes, self.chunks):
            full = table.cross(full)
        return self.run(as_batch(full))

    def run(self, batch: ConfigBatch) -> ConfigBatch:
        """Of canonical configs with legal degrees those that are legal and run."""
        mask = rank_tokens(batch, self.workload) % batch.ep_chunks == 0
        mask &= runs_pipeline(batch, self.framework, self.model, self.workload)
        mask &= combines(batch, self.framework)
        return batch if mask.all() else batch.take(mask)


def _with_size(batch: ConfigBatch, size: int) -> ConfigBatch:
    return replace(batch, micro_batch_size=np.full(len(batch), size, dtype=np.int64))
