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
    step_factor: float = 1.0  # seconds of a ring's steps after the first over those of their kernels
    overlap: float = 1.0  # share of a ring's messages beside the kernels
    last_waits: bool = False  # the last message of gradients has no kernel beside it: a rank's own block comes first
    whole_heads: bool = False  # keys and values travel repeated for every query head
    float32_grads: bool = False  # their gradients travel in float32
    exchanges_together: bool = False  # Ulysses: queries, keys and values in one all_to_all
    exchange_copies: float = 4.0  # passes over what Ulysses exchanges: laid out by ranks, and by tokens or heads after
    merge: Merge = Merge()


# executors/ring_attention.py and attention_kernels.merge, operator by operator, sums in float32
OURS = ContextTraits(
    ulysses=True,
    last_waits=True,
    float32_grads=True,
    exchanges_together=True,
    merge=Merge(
        forward_kernels=9,
        output_passes=1,
        output_float32_passes=6,
        backward_kernels=3,
        query_passes=1,
        query_float32_passes=2,
        kv_passes=1,
        kv_float32_passes=2,
    ),
)

# cp_comm_type p2p, a2a and a2a+p2p of Megatron-Core (transformer_engine/pytorch/attention/dot_product_attention/
# context_parallel.py): two compiled kernels a step merge outputs in the compute dtype, gradients of keys and values
# travel in it, behind those that are handed on; kernels of steps take turns on two streams, beside the messages.
# Sliding windows are refused on a ring
TRANSFORMER_ENGINE = ContextTraits(
    ulysses=True,
    ring_windows=False,
    merge=Merge(forward_kernels=2, output_passes=3, backward_kernels=3, query_passes=3, kv_passes=3),
)

# torch's own (torch/distributed/tensor/experimental/_attention.py), of 2024: outputs merged in float32, operator by
# operator, gradients of keys and values handed on in float32; torchtitan repeats keys and values for every head before
# attention (models/llama/model.py: repeat_kv). Its later steps take longer than kernels, merging, copies and messages
# account for, why is not known: step_factor is from Llama 3.1 8B at 65,536 and 131,072 tokens on 8 H100 (torchtitan,
# benchmarks/llama3_h100_202412_torchtitan.md, table 2)
TORCH_2024 = ContextTraits(
    last_waits=True,
    whole_heads=True,
    float32_grads=True,
    ring_windows=False,
    step_factor=1.5,
    merge=Merge(
        forward_kernels=8,
        output_passes=1,
        output_float32_passes=9,
        backward_kernels=3,
        query_passes=1,
        query_float32_passes=2,
        kv_passes=1,
        kv_float32_passes=5,
    ),
)

# deepspeed/sequence/layer.py: DistributedAttention, an all_to_all each of queries, keys, values and outputs; ZeRO
# shards over data and sequence ranks together. It has no ring
DEEPSPEED_ULYSSES = ContextTraits(ring=False, ulysses=True)
