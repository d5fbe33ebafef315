"""What a target's allocator and runtime add to the tensors of a step: facts and measured constants of a framework."""

from __future__ import annotations

from meshwright.profiler.record import record


@record
class MemoryTraits:
    """``fragmentation`` is what the caching allocator holds on top of all tensors at the peak, as a share of them.

    ``margin`` is the share by which measured peaks exceed predicted ones (``recommended.derive``), ``margin_source``
    the peaks that say so; both are read from ``memory_margins.json``.
    """

    fragmentation: float = 0.0
    margin: float = 0.0
    margin_source: str = ""
