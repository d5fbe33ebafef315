"""What tensor parallelism does with each module, as records: found by ``tp_find``, applied by ``tensor_parallel``.

A **region** is one pass from replicated to split and back: matrices split by columns (outputs), what happens between
them, and one matrix split by rows (inputs). It is cut between **units** only: attention heads, or single columns of a
feed-forward layer. Units may share outputs (query heads that share keys and values); where tp exceeds the shared units,
each rank holds a copy of the one it needs. What lies between the region's input and the column splits (latent
projections) is kept whole, and computed alike by every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.profiler.anatomy import Anatomy
from meshwright.profiler.record import record
from meshwright.profiler.skeleton import Matrix

IntArray = NDArray[np.int64]


class Split(StrEnum):
    """What tensor parallelism does with one module's parameters."""

    COLUMN = "column"  # outputs, in equal contiguous slices
    FUSED_COLUMN = "fused column"  # outputs, a slice of each of several parts
    SHARED_COLUMN = "shared column"  # outputs of the shared units, copied where tp exceeds their number
    ROW = "row"  # inputs, in equal contiguous slices
    VOCABULARY_EMBEDDING = "vocabulary embedding"  # rows of the token table
    VOCABULARY_HEAD = "vocabulary head"  # outputs, padded to a multiple of tp
    REPLICATED = "replicated"


class Share(StrEnum):
    """What an integer of a module counts, and so what a rank's share of it is."""

    UNITS = "units"
    UNITS_PER_SHARED = "units per shared unit"
    SHARED_UNITS = "shared units"
    WIDTH = "width"  # inputs of the row split
    SHARED_WIDTH = "shared width"
    OUTPUTS = "outputs"  # of the widest column split


@record
class Attribute:
    """An integer that a module's forward reads and that must hold the rank's share."""

    module: str
    name: str
    share: Share


@record
class Region:
    """One pass through split matrices; names are dotted names in the whole model.

    ``unit_outputs[i][u]`` are the outputs of ``columns[i]`` that unit ``u`` is made from; unit ``u`` itself is the
    ``unit_width`` row inputs from ``u * unit_width`` on. ``kept_whole`` are the matrices before the columns,
    ``entries`` those matrices that take the region's input. ``vectors`` are parameters with entries for each unit, and
    ``vector_outputs[i][u]`` those of unit ``u``. ``container`` is the module whose argument ``argument`` (position or
    keyword) is the input of all entries and which uses it for nothing else; empty where there is none.
    ``by_token``: each token passes the region alone, so its input may be given in any order of tokens.
    """

    columns: tuple[str, ...]
    kept_whole: tuple[str, ...]
    entries: tuple[str, ...]
    row: str
    num_units: int
    num_shared: int
    unit_width: int
    unit_outputs: tuple[IntArray, ...]
    vectors: tuple[str, ...]
    vector_outputs: tuple[IntArray, ...]
    container: str
    argument: int | str | None
    by_token: bool
    attributes: tuple[Attribute, ...]

    def outputs(self, column: int, tp: int, rank: int) -> IntArray:
        """Outputs of ``columns[column]`` that rank ``rank`` of ``tp`` holds, in ascending order."""
        units = self.num_units // tp
        return np.unique(self.unit_outputs[column][rank * units : (rank + 1) * units])

    def entries_of(self, vector: str, tp: int, rank: int) -> IntArray:
        """Entries of one of ``vectors`` that rank ``rank`` of ``tp`` holds, in ascending order."""
        units = self.num_units // tp
        return np.unique(self.vector_outputs[self.vectors.index(vector)][rank * units : (rank + 1) * units])

    def inputs(self, tp: int, rank: int) -> slice:
        """Inputs of the row split that rank ``rank`` of ``tp`` holds."""
        width = self.num_units * self.unit_width // tp
        return slice(rank * width, (rank + 1) * width)

    def legal(self, tp: int) -> bool:
        """Whether tp divides the units, divides or is divided by the shared units, and copies whole matrices only."""
        if self.num_units % tp or (self.num_shared % tp and tp % self.num_shared):
            return False
        held = sum(
            len(self.outputs(column, tp, 0)) * tp // self.copies(column, tp) for column in range(len(self.columns))
        )
        return held == sum(len(np.unique(outputs)) for outputs in self.unit_outputs)

    def copies(self, column: int, tp: int) -> int:
        """On how many ranks each output of ``columns[column]`` is held."""
        if tp <= self.num_shared or not np.array_equal(self.outputs(column, tp, 0), self.outputs(column, tp, 1)):
            return 1
        return tp // self.num_shared

    def whole(self, share: Share) -> int:
        """What an integer with that meaning is in the whole model."""
        return self.share(share, 1)

    def share(self, share: Share, tp: int) -> int:
        """What an integer with that meaning is on one rank of ``tp``."""
        units, shared = self.num_units // tp, max(self.num_shared // tp, 1)
        values = {
            Share.UNITS: units,
            Share.SHARED_UNITS: shared,
            Share.UNITS_PER_SHARED: units // shared,
            Share.WIDTH: units * self.unit_width,
            Share.SHARED_WIDTH: shared * self.unit_width,
            Share.OUTPUTS: max(len(self.outputs(column, tp, 0)) for column in range(len(self.columns))),
        }
        return values[share]

    def split(self, column: int) -> Split:
        """What happens to one column split: shared, fused or plain."""
        outputs = self.unit_outputs[column]
        if len(np.unique(outputs)) < outputs.size:
            return Split.SHARED_COLUMN if self.num_shared < self.num_units else Split.FUSED_COLUMN
        in_order = np.array_equal(outputs.ravel(), np.arange(outputs.size))
        return Split.COLUMN if in_order else Split.FUSED_COLUMN

    def within(self, block: str) -> Region:
        """The same region with names relative to a block made names in the whole model."""
        return replace(
            self,
            columns=tuple(f"{block}.{name}" for name in self.columns),
            kept_whole=tuple(f"{block}.{name}" for name in self.kept_whole),
            entries=tuple(f"{block}.{name}" for name in self.entries),
            vectors=tuple(f"{block}.{name}" for name in self.vectors),
            row=f"{block}.{self.row}",
            container=f"{block}.{self.container}" if self.container else "",
            attributes=tuple(
                replace(item, module=f"{block}.{item.module}" if item.module else block) for item in self.attributes
            ),
        )


@record
class TensorParallelRules:
    """How a model is split, for any legal tp; names are dotted names in the whole model.

    ``partial`` are the replicated parameters inside regions (norms on each head's queries and keys, latent
    projections): every rank sees only its own units, so their gradients are partial sums. ``experts`` are the modules
    of stacked experts, which are not split over tp. ``hidden_argument`` is where a block takes the hidden states.
    ``embedding_reaches_blocks``: the first block is given the very tensor that the token table returned.
    """

    anatomy: Anatomy
    matrices: Mapping[str, Matrix]
    regions: tuple[Region, ...]
    experts: tuple[str, ...]
    partial: frozenset[str]
    hidden_argument: int | str
    embedding_reaches_blocks: bool
    vocab_size: int

    def check(self, tp: int, *, sequence_parallel: bool = False) -> None:
        """Raise ``InputError`` with the numbers when the model cannot be split ``tp`` ways."""
        for region in self.regions:
            if not region.legal(tp):
                shared = f", {region.num_shared} of them with keys and values of their own"
                raise InputError(
                    f"tp={tp} does not divide {region.row}, which can be cut between {region.num_units} units"
                    + (shared if region.num_shared < region.num_units else "")
                )
            if sequence_parallel and not region.container and not region.by_token:
                raise InputError(
                    f"sequence_parallel needs the attention around {region.row} in a module of its own, whose input "
                    "goes to the split matrices only"
                )

    @property
    def splits(self) -> dict[str, Split]:
        """What happens to each matrix and the token table, by name; all else is replicated."""
        found = {self.anatomy.token_embedding: Split.VOCABULARY_EMBEDDING, self.anatomy.head: Split.VOCABULARY_HEAD}
        for region in self.regions:
            found |= {name: region.split(index) for index, name in enumerate(region.columns)}
            found[region.row] = Split.ROW
        return found

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the token table as stored: the vocabulary, rounded up to a multiple of tp."""
        return -(-self.vocab_size // tp) * tp
