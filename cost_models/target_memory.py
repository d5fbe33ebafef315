"""What each target's code keeps, reduces and updates: the memory traits of ``targets``.

Paths are files of the target's own repository, or of torch. Constants are shares that an allocator holds on top of
tensors; all else are facts of code.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost_models.memory_traits import HeldBlocks, LossTensors, MemoryTraits, UpdateTensors
from meshwright.profiler.units import GIB

# Masks of its fused bias, dropout and sum are kept whatever the rate (peaks of arXiv 2411.05288, run at rate 0, hold a
# byte a number more twice a layer: 64 rows); gate and up are one tensor; float32 logits become their exponentials
# (megatron/core/tensor_parallel/cross_entropy.py), beside which their float32 copy and the logits still exist.
MEGATRON_LM_MEMORY = MemoryTraits(
    fragmentation=0.095,  # median of 16 runs of arXiv 2411.05288 that publish both peaks, 5.7 to 12.2 %
    gated_tensors=3.0,
    masks_always=True,
    loss=LossTensors(kept_float32=1.0, beside=1.0, beside_float32=1.0),
    update=UpdateTensors(),  # megatron/optimizer/optimizer.py: _copy_model_grads_to_main_grads
    reduces_in_place=True,  # megatron/model/distributed.py: one contiguous buffer
)

# Transformer Engine keeps what a matmul reads as it was cast for it, beside what other operators keep (pytorch/module/
# layernorm_linear.py, linear.py, grouped_linear.py: saved as columns alone). SwiGLU is one kernel, weighted by the
# router, so that what experts put out is not needed again (megatron/core/fusions/fused_bias_swiglu.py). The loss
# writes its gradient over the logits (transformer_engine/pytorch/triton/cross_entropy.py).
MEGATRON_CORE_MEMORY = MemoryTraits(
    fragmentation=MEGATRON_LM_MEMORY.fragmentation,
    gated_tensors=3.0,
    expert_rows=1.0,
    float8_inputs=True,
    loss=LossTensors(kept=1.0),
    update=UpdateTensors(),  # megatron/core/optimizer/distrib_optimizer.py: _copy_model_grads_to_main_grads
    reduces_in_place=True,  # megatron/core/distributed/param_and_grad_buffer.py
    builds_whole=True,  # megatron/training/training.py: get_model, wrapped when it is there, unless on meta
)

# Megatron-Bridge's recipes with FSDP build on meta (scripts/performance/utils/overrides.py) and keep activations of
# some layers on the host: 5 to 40 of 80 (Llama 3 70B), 10 to 92 of 126 (Llama 3.1 405B), by the memory of the GPU
# (scripts/performance/configs/llama: cpu_offloading_num_layers).
OFFLOAD_MEMORY = replace(MEGATRON_CORE_MEMORY, offloads=True, builds_whole=False)

# megatron/core/fusions/fused_cross_entropy.py works in a float32 copy
NEMO_MEMORY = replace(MEGATRON_CORE_MEMORY, loss=LossTensors(kept_float32=1.0, beside=1.0))

# reserved peaks of torch's FSDP2 over allocated ones as predicted: median of 11 runs of torchtitan of December 2024 and
# June 2025, 8B to 405B, 1.5 to 23 %; 12 % and 11 % of halves of them
FSDP_FRAGMENTATION = 0.115

# blocks and the loss compiled: gate and up are kept, not the activated gate, logits in bf16 and their gradient
TORCHTITAN_MEMORY = MemoryTraits(
    fragmentation=FSDP_FRAGMENTATION,
    gated_tensors=3.0,
    loss=LossTensors(kept=1.0, beside=1.0),
    # torch/distributed/tensor/parallel/loss.py, kernel by kernel in float32: the log-softmax is kept, and in backward
    # its gradient, its exponential, their sum and the product exist
    sharded_loss=LossTensors(kept_float32=1.0, beside_float32=4.0),
)

# the loss was not compiled from December 2024 to April 2025 (torchtitan e8977b0): log-softmax in float32, of which the
# backward holds two gradients besides
TORCHTITAN_2024_MEMORY = replace(TORCHTITAN_MEMORY, loss=LossTensors(kept_float32=1.0, beside_float32=2.0))
TORCHTITAN_EAGER_MEMORY = replace(TORCHTITAN_2024_MEMORY, gated_tensors=4.0)

LLM_FOUNDRY_MEMORY = MemoryTraits(fragmentation=FSDP_FRAGMENTATION)

# modules are gathered one by one, with what is prefetched at most a billion numbers: about half a block
# (deepspeed/runtime/zero/config.py: max_live_parameters)
DEEPSPEED_MEMORY = MemoryTraits(fragmentation=FSDP_FRAGMENTATION, units=0.5, outer_apart=True)

# Logits are cast to float32, over which the loss writes its gradient, then cast back, beside the metrics' differences
# and exponentials. All that a rank updates is one flat tensor of float32 gradients, with torch's AdamW over it: the
# square root and the denominator (torch/optim/adamw.py), for which no block of the backward is large enough.
INTERNEVO_MEMORY = MemoryTraits(
    gated_tensors=3.0,
    loss=LossTensors(kept_float32=1.0, beside=1.0, beside_float32=2.0),
    update=UpdateTensors(temporaries=2.0, frees_grads=True),  # internlm/solver/optimizer/hybrid_zero_optim.py
    reuses_blocks=False,
    bucket_numbers=512 * 1024**2,  # configs/7B_sft.py: reduce_bucket_size
    units=1.0,  # internlm/train/training_internlm.py: wrap_FSDP_model, attention and feed-forward each
    outer_apart=True,
)

# The softmax is kept, worked out beside the float32 logits, and their gradient is written into it (parallel/
# tensor_parallel/functional.py: _ShardedCrossEntropy); what else it keeps says ``held_blocks``.
NANOTRON_MEMORY = MemoryTraits(
    loss=LossTensors(kept_float32=1.0, beside_float32=1.0),
    # Fitted on 1,070 reserved peaks of four Llamas on H100: median error 4.0 %. Fitted on two of the models the others
    # are met within 4.5 %, either way round; activations are then 0.12 and 0.19, outputs 49 and 50, the base 0.18 and
    # 0.16 GiB. 1,024 launches, what a stream takes before its host waits, are 50 outputs of about 20 kernels each.
    blocks=HeldBlocks(activations=0.15, pending_outputs=50.0, base_bytes=0.17 * GIB),
    # what no run of the 1,070 came near: the largest reserved peak is 69.8 GiB, of 80 less 2.5 for a context. Process
    # groups hold it: all ranks, tp, dp, pp, tp x pp, each with NCCL's buffers (parallel/context.py)
    communicators_bytes=7.7 * GIB,
)
# where ranks meet before each collective the host does not run ahead
NANOTRON_2024_MEMORY = replace(
    NANOTRON_MEMORY, blocks=HeldBlocks(activations=0.15, pending_outputs=2.2, base_bytes=0.17 * GIB)
)
