"""Options of a few fields by a key, and how rows of columns are crossed with them: what spaces are built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from meshwright.cost_models.framework import Framework
from meshwright.cost_models.strategy import BoolArray, ConfigBatch, IntArray

Columns = dict[str, IntArray]


class Table:
    """Options of some fields that depend on one key, such as the micro-batch sizes for each dp.

    ``owner[i]`` is the position in ``keys`` of the key that option ``i`` belongs to; options of a key stand together.
    """

    def __init__(
        self,
        keys: IntArray,
        owner: IntArray,
        columns: Columns,
        key_of: Callable[[Columns], IntArray],
        offered: Callable[[Table, Framework], BoolArray],
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
        offered: Callable[[Table, Framework], BoolArray] = lambda table, framework: np.ones(len(table.owner), np.bool_),
    ) -> Table:
        """From the options of each key, in the order of ``names``."""
        keys = np.array(sorted(options), dtype=np.int64)
        owner = np.repeat(np.arange(len(keys)), [len(options[key]) for key in keys.tolist()])
        rows = np.array([row for key in keys.tolist() for row in options[key]], dtype=np.int64)
        columns = dict(zip(names, rows.reshape(-1, len(names)).T, strict=True))
        return cls(keys, owner, columns, key_of, offered)

    def keep(self, mask: BoolArray) -> Table:
        """The options under a mask."""
        return Table(self.keys, self.owner[mask], filtered(self.columns, mask), self.key_of, self.offered)

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
        return filtered(columns, rows) | {name: column[option] for name, column in self.columns.items()}


def weight(columns: Columns, tables: Sequence[Table]) -> IntArray:
    """How many candidates each row stands for."""
    product = np.ones(len(columns["tp"]), dtype=np.int64)
    for table in tables:
        product = product * table.count(columns)
    return product


def filtered(columns: Columns, selection: Any) -> Columns:
    """The rows at an index array or under a mask."""
    return {name: column[selection] for name, column in columns.items()}


def as_batch(columns: Columns) -> ConfigBatch:
    """Rows as configs; fields that they lack take their defaults."""
    return ConfigBatch.from_columns(columns, len(columns["tp"]))
