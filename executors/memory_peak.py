"""The moment at which most bytes are alive, and what they are: from the births and deaths that a tracker noted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.estimate import KINDS
from meshwright.profiler.record import record

TIMELINE_POINTS = 200


@dataclass(slots=True)
class Block:
    """One storage from birth to death, times in events; ``kind`` None until it is decided by lifetime."""

    num_bytes: int
    born: int
    kind: str | None
    window: int | None  # the forward of a stage in which it was born, by number
    phase: str
    module: str
    operator: str
    shape: tuple[int, ...]
    dtype: str
    died: int | None = None


@record
class LiveTensor:
    """One storage alive at the peak: where it was born and as what."""

    num_bytes: int
    kind: str
    module: str
    phase: str
    operator: str
    shape: tuple[int, ...]  # of the tensor that was the first to use the storage
    dtype: str


@record
class TimePoint:
    """Bytes alive at one moment, by kind in the order of ``KINDS``."""

    event: int
    num_bytes: tuple[int, ...]


@record
class Peak:
    """What is alive when most is; ``bytes_by_kind`` in the order of ``KINDS``.

    ``module`` and ``phase`` are those of the tensor whose birth makes the peak; ``step`` counts from 0.
    """

    bytes_by_kind: tuple[int, ...]
    step: int
    step_peaks: tuple[int, ...]  # of each step
    phase: str
    module: str
    operator: str
    tensors: tuple[LiveTensor, ...]  # all that are alive then, the largest first
    timeline: tuple[TimePoint, ...]  # over the step with the peak

    @property
    def peak_bytes(self) -> int:
        """All of them together."""
        return sum(self.bytes_by_kind)

    def kind(self, name: str) -> int:
        """Bytes of one kind."""
        return self.bytes_by_kind[KINDS.index(name)]


def decide_kinds(blocks: Sequence[Block], windows: Sequence[int]) -> None:
    """Give each block without a kind the one that its lifetime says; ``windows`` are the ends of stages' forwards."""
    for block in blocks:
        if block.kind is None:
            ended = windows[block.window] if block.window is not None and block.window < len(windows) else None
            outlives = ended is not None and (block.died is None or block.died > ended)
            block.kind = "activations" if outlives else "working"


def find_peak(blocks: Sequence[Block], windows: Sequence[int], steps: Sequence[int], clock: int) -> Peak:
    """The peak over all events up to ``clock``; ``steps`` are the events at which steps began."""
    decide_kinds(blocks, windows)
    changes = np.zeros((clock + 2, len(KINDS)), dtype=np.int64)
    for block in blocks:
        kind = KINDS.index(block.kind or "working")
        changes[block.born, kind] += block.num_bytes
        if block.died is not None:
            changes[block.died, kind] -= block.num_bytes
    alive = changes.cumsum(axis=0)
    totals = alive.sum(axis=1)
    edges = [*steps, clock]  # the events of a step come after its number
    peaks = [int(totals[start : stop + 1].max()) for start, stop in pairwise(edges)]
    at = int(totals.argmax())
    step = max(0, int(np.searchsorted(steps, at, side="left")) - 1)
    there = sorted(
        (block for block in blocks if block.born <= at and (block.died is None or block.died > at)),
        key=lambda block: -block.num_bytes,
    )
    last = next(block for block in blocks if block.born == at)
    start, stop = (edges[step], edges[step + 1] + 1) if steps else (0, clock + 1)
    return Peak(
        bytes_by_kind=tuple(int(value) for value in alive[at]),
        step=step,
        step_peaks=tuple(peaks),
        phase=last.phase,
        module=last.module,
        operator=last.operator,
        tensors=tuple(
            LiveTensor(
                num_bytes=block.num_bytes,
                kind=block.kind or "working",
                module=block.module,
                phase=block.phase,
                operator=block.operator,
                shape=block.shape,
                dtype=block.dtype,
            )
            for block in there
        ),
        timeline=_decimated(alive, totals, start, stop),
    )


def _decimated(alive: NDArray[np.int64], totals: NDArray[np.int64], start: int, stop: int) -> tuple[TimePoint, ...]:
    """The highest moment of each of ``TIMELINE_POINTS`` equal stretches."""
    edges = np.unique(np.linspace(start, stop, TIMELINE_POINTS + 1).astype(int))
    points = [first + int(totals[first:last].argmax()) for first, last in pairwise(edges)]
    return tuple(TimePoint(event=int(at) - start, num_bytes=tuple(int(value) for value in alive[at])) for at in points)
