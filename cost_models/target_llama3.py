"""Meta's training of Llama 3 (arXiv 2407.21783, section 3.3.2), as far as the paper tells it."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost_models.context_traits import ContextTraits
from meshwright.cost_models.framework import AttentionKernel
from meshwright.cost_models.memory_traits import MemoryTraits
from meshwright.cost_models.pointwise import FUSED
from meshwright.cost_models.strategy import Recompute, Schedule
from meshwright.cost_models.target_torch import MESHWRIGHT

# FSDP shards optimizer states and gradients, weights stay gathered between forward and backward; pipelines are
# interleaved with any number of micro-batches, and the first and last stage have a layer less; keys and values are
# gathered over cp before attention, queries being chunks from both ends; float32 gradients are accumulated and reduced.
# Not told, and taken as Megatron's: sequence parallelism, its gathers in backward, fused kernels, a split vocabulary.
# Inferred: of a feed-forward layer gate and up are kept, not their product, without which 8,192 tokens would not fit
# into 80 GB without recompute, as the paper says they do; a chunk's gradients are reduced before the next chunk's last
# backward, so that one flat buffer is there at a time; FlashAttention-2, the latest of its time
LLAMA3_4D = replace(
    MESHWRIGHT,
    name="llama3-4d",
    schedules=(Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED),
    zero_stages=(1, 2),
    recomputes=(Recompute.NONE, Recompute.FULL),
    context_parallel=True,
    context=ContextTraits(gathers=True),
    expert_parallel=False,
    fused_projections=True,
    windowed_attention=True,
    eager_rms_norm=False,
    regathers_sequence=True,
    reduces_once=True,
    receives_ahead=False,
    copies_exposed=False,
    defers_products=False,
    pointwise=FUSED,
    attention=AttentionKernel.FLASH,
    memory=MemoryTraits(gated_tensors=2.0, units=1.0),
)
