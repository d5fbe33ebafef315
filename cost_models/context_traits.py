"""How a target runs attention over the ranks of context parallelism: facts about its code."""

from __future__ import annotations

from meshwright.profiler.record import record


@record
class Merge:
    """What a ring step costs beside its kernels: partial results put together, in passes over a tensor.

    Passes are of the output of this rank's heads (``output_*``, forward, and backward the gradient of the queries, of
    the same size) and of keys and values together (``kv_*``, backward). A pass is one read or one write in the compute
    dtype, a ``float32`` pass one in float32; kernels are those of one step.
    """

    forward_kernels: float = 0.0
    output_passes: float = 0.0
    output_float32_passes: float = 0.0
    backward_kernels: float = 0.0
    query_passes: float = 0.0
    query_float32_passes: float = 0.0
    kv_passes: float = 0.0
    kv_float32_passes: float = 0.0


@record
class ContextTraits:
    """Traits of a target's context parallelism; ``Framework`` says what a target is.

    On a ring keys and values are handed on ``cp_ring - 1`` times, one message beside the kernel of each step, and
    backward their gradients as often. A target that ``gathers`` has keys and values of all places gathered before one
    pass of the kernel, and their gradients reduce-scattered after it, with nothing beside. ``bidirectional`` is
    TokenRing (arXiv 2412.20501): queries travel one way, outputs and what they are merged by come back the other.
    """

    ring: bool = True  # runs cp_ring above 1
    ulysses: bool = False  # runs cp_ulysses above 1
    ring_windows: bool = True  # a ring runs attention with a sliding window
    windows: bool = True  # kernels of a rank under cp skip what a sliding window masks
    gathers: bool = False
    bidirectional: bool = False
    balanced: bool = (
        True  # a place has chunks from both ends of the sequence, so that a causal mask leaves all equal work
    )
    skips_places: bool = True  # does not compute what a causal mask hides of another place's block
    overlap: float = 1.0  # share of a ring's messages beside the kernels
    whole_heads: bool = False  # keys and values travel repeated for every query head
    float32_grads: bool = False  # their gradients travel in float32
    exchanges_together: bool = False  # Ulysses: queries, keys and values in one all_to_all
    merge: Merge = Merge()
