"""Which plans are recommended: those that fit with a margin of what predictions of memory have been seen to miss.

A plan *fits* when its predicted tensors are at most what the device offers: capacity less context and other processes.
It is *recommended* when more than that is at most what the device offers::

    (tensors + fragmentation) * (1 + margin)

``fragmentation`` is what the caching allocator holds on top of tensors; ``margin`` the share by which measured peaks
exceed predicted ones, a trait of a target that ``margin_fit`` derives from published peaks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.framework import Framework
from meshwright.profiler.record import record

ASKED_FOR = "asked for"


@record
class MemoryMargin:
    """What must stay free beside tensors and fragmentation, as a share of both, and where that figure is from."""

    share: float
    source: str


def margin_of(framework: Framework, asked: float | None = None) -> MemoryMargin | None:
    """The margin of a target, or the one ``asked`` for in its place; ``None`` for 0: then what fits is enough.

    Raises ``InputError`` unless what is asked for is a share from 0 up to 1.
    """
    if asked is None:
        return MemoryMargin(share=framework.memory.margin, source=framework.memory.margin_source)
    if not 0 <= asked < 1:
        raise InputError(f"the memory margin is a share from 0 up to 1, found {asked}")
    return MemoryMargin(share=asked, source=ASKED_FOR) if asked else None


def needed_bytes(
    peak_bytes: NDArray[Any], fragmentation_bytes: NDArray[Any], margin: MemoryMargin | None
) -> NDArray[np.float64]:
    """What a device must offer for a plan to be taken: its tensors alone where there is no margin."""
    if margin is None:
        return np.asarray(peak_bytes, dtype=np.float64)
    return np.asarray((np.asarray(peak_bytes, dtype=np.float64) + fragmentation_bytes) * (1.0 + margin.share))
