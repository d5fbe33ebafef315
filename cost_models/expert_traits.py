"""How a target sends tokens to experts and runs them: facts about its dispatcher, its kernels and its CUDA graphs."""

from __future__ import annotations

from enum import StrEnum

from meshwright.profiler.record import record


class Dispatch(StrEnum):
    """What of a token crosses the links on its way to experts, and back."""

    # a copy for every expert that it takes: all_to_all of permuted rows (Megatron-Core, MoEAlltoAllTokenDispatcher)
    EACH_EXPERT = "each expert"
    # one copy for every rank that has any of its experts, and between nodes one for every node, passed on inside
    # (DeepEP, github.com/deepseek-ai/DeepEP; its branch HybridEP; Megatron-Core, MoEFlexTokenDispatcher)
    EACH_RANK = "each rank"


@record
class ExpertTraits:
    """Traits of a target's expert layers; ``Framework`` says what a target is.

    ``overlap`` is the share of an exchange that hides behind compute of another micro-batch, as where forward of one
    and backward of another run side by side (Megatron-Core, ``overlap_moe_expert_parallel_comm``); what a config's
    ``ep_chunks`` hide comes out of ``expert_exchange``.
    """

    dispatch: Dispatch = Dispatch.EACH_EXPERT
    overlap: float = 0.0
    exchange_factor: float = 1.0  # seconds of an exchange over what its bytes cost
    multiprocessors: int = 0  # that an exchange takes from compute beside it; 0: as other collectives on the device
    calls_each_expert: float = 0.0  # launches of each projection for each of a rank's experts; 0: one for all of them
    casts_each_expert: float = 0.0  # more of them in fewer bits than the compute dtype
    pads_rows: bool = False  # in fewer bits, copies rows so that each expert's have an even number, and back
    fused: bool = False  # the activation, and in fewer bits the casts beside it, are part of the experts' matmuls
    dense_in_graph: bool = False  # all kernels but those of the experts are replayed in CUDA graphs
    reads_counts: bool = True  # the host waits for the number of rows of each expert before it launches them
