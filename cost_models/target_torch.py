"""Targets on torch's own FSDP and pipelines: our executors, torchtitan, llm-foundry; and DeepSpeed's ZeRO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshwright.cost_models.context_traits import DEEPSPEED_ULYSSES, OURS, TORCH_2024
from meshwright.cost_models.framework import (
    AttentionKernel,
    Framework,
    HostCost,
    Selective,
)
from meshwright.cost_models.memory_traits import MemoryTraits
from meshwright.cost_models.pointwise import (
    COMPILED,
    EAGER_TORCH,
    FUSED,
    MEGATRON_2021,
    MPT,
)
from meshwright.cost_models.strategy import Recompute, Schedule
from meshwright.cost_models.target_memory import (
    DEEPSPEED_MEMORY,
    FSDP_FRAGMENTATION,
    LLM_FOUNDRY_MEMORY,
    TORCHTITAN_2024_MEMORY,
    TORCHTITAN_EAGER_MEMORY,
    TORCHTITAN_MEMORY,
)

MESHWRIGHT = Framework(
    name="meshwright",
    schedules=tuple(Schedule),
    defers_products=True,
    zero_stages=(0, 1, 2, 3),
    recomputes=(Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL),
    context_parallel=True,
    expert_parallel=True,
    expert_chunks=(1, 2, 4),
    partial_sharding=False,
    vocab_parallel=True,
    tensor_parallel_moe=True,
    fused_projections=False,
    windowed_attention=False,
    masters_are_parameters=True,
    shards_rows=True,
    eager_rms_norm=True,
    regathers_sequence=False,
    overlap_dp_reduce=1.0,  # FSDP2 reduces a unit while the backward of the one before it runs
    overlap_dp_gather=1.0,  # FSDP2 gathers the next unit while the one at hand runs
    overlap_tp=0.0,
    overlap_pp=0.0,
    pointwise=EAGER_TORCH,
    reduce_copies=1.5,  # read in bf16, written in float32
    copies_exposed=True,  # torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py: copy-in and copy-out
    memory=MemoryTraits(by_operator=True, expert_units=True, fragmentation=FSDP_FRAGMENTATION),
    context=OURS,
)

# what the targets below do not run, or are not modelled to run
_DENSE: dict[str, Any] = {"expert_parallel": False, "expert_chunks": (1,), "tensor_parallel_moe": False}

TORCHTITAN = replace(
    MESHWRIGHT,
    name="torchtitan",
    defers_products=False,
    memory=TORCHTITAN_MEMORY,
    context=TORCH_2024,
    **_DENSE,
    partial_sharding=True,
    pointwise=COMPILED,
    eager_rms_norm=False,
    # torchtitan/parallelisms/parallelize_llama.py: outputs of every second matmul, of attention and of reduce-scatters
    # are kept
    selective=Selective(rest=1.0, core=0.0, projections=0.5, gathers=True, outputs=0.55),  # k, out, up and down are not
    float8=True,
    float8_gathers=True,
    row_scaled_factor=1.7,
    sequence_copies=2.0,  # sequences are split by tokens: chunked and concatenated around each collective
)

TORCHTITAN_2024 = replace(
    TORCHTITAN,
    name="torchtitan-2024",
    version_of="torchtitan",
    memory=TORCHTITAN_2024_MEMORY,
)

# as it was before blocks were compiled by default: Triton's fused RMSNorm, all else kernel by kernel
TORCHTITAN_EAGER = replace(
    TORCHTITAN,
    name="torchtitan-eager",
    version_of="torchtitan",
    pointwise=replace(EAGER_TORCH, rms_norm=FUSED.rms_norm),
    float8=False,
    selective=replace(TORCHTITAN.selective, outputs=0.45),  # of down too, which compiled no backward needs
    memory=TORCHTITAN_EAGER_MEMORY,
)

# matmuls cut along the sequence, each part beside the exchange of the next (torch.distributed._symmetric_memory)
TORCHTITAN_ASYNC_TP = replace(
    TORCHTITAN,
    name="torchtitan-async-tp",
    version_of="torchtitan",
    differs_in=("overlap_tp",),
    overlap_tp=0.2,  # smaller matmuls lose most of what is hidden
    sequence_copies=1.0,  # tokens still move to the front and back
    memory=TORCHTITAN_2024.memory,
)

LLM_FOUNDRY = replace(
    MESHWRIGHT,
    name="llm-foundry",
    memory=LLM_FOUNDRY_MEMORY,
    context_parallel=False,
    **_DENSE,
    shards_rows=False,
    schedules=(Schedule.ONE_F_ONE_B,),
    tensor_parallel=False,
    pipeline_parallel=False,
    zero_stages=(0, 2, 3),
    partial_sharding=True,
    fused_projections=True,
    host=HostCost(step_s=0.01),
    hopper_factor=1.2,  # torch 2.0 and 2.1, CUDA 11.8 and 12.1
    fused_loss=True,
    gather_copies=0.0,  # FSDP1 gathers into the flat parameter itself; gradients of its views are concatenated
    attention=AttentionKernel.TRITON,  # scripts/train/benchmarking/submit_benchmarks.py: --attn_impl triton
    pointwise=MPT,
    eager_rms_norm=False,
    float8=True,
)

# before torch 2.1, a checkpoint without reentry repeats the whole block
LLM_FOUNDRY_TORCH1 = replace(
    LLM_FOUNDRY, name="llm-foundry-torch1", version_of="llm-foundry", recompute_stops_early=False, float8=False
)

DEEPSPEED = replace(
    MESHWRIGHT,
    name="deepspeed",
    memory=DEEPSPEED_MEMORY,
    **_DENSE,
    masters_are_parameters=False,
    shards_rows=False,
    schedules=(Schedule.ONE_F_ONE_B,),
    tensor_parallel=False,
    pipeline_parallel=False,
    zero_stages=(0, 1, 2, 3),
    half_precision=True,
    copies_exposed=False,
    context_parallel=True,
    context=DEEPSPEED_ULYSSES,
)

# ZeRO-3 of early 2021 around Megatron's layers: tensors gathered one by one into lists of parts, at a ninth of what the
# network gives, half of it beside compute
DEEPSPEED_2021 = replace(
    DEEPSPEED,
    name="deepspeed-2021",
    context_parallel=False,
    pointwise=MEGATRON_2021,
    attention=AttentionKernel.WRITTEN_OUT,
    fused_projections=True,
    recompute_stops_early=False,
    vocab_multiple=128,
    overlap_dp_gather=0.5,
    overlap_dp_reduce=0.5,
    dp_factor=9.0,
    calibrated_on="ZeRO-3 in arXiv 2104.04473, table 2",
)
