"""What a target's allocator and runtime add to the tensors of a step: facts and measured constants of a framework."""

from __future__ import annotations

from meshwright.profiler.record import record


@record
class MemoryTraits:
    """``fragmentation`` is what the caching allocator holds on top of all tensors at the peak, as a share of them."""

    fragmentation: float = 0.0
