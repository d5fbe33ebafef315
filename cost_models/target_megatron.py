"""Targets in the way of Megatron-LM: its versions and heirs, nanotron and InternEvo."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost_models import context_traits
from meshwright.cost_models.expert_traits import ExpertTraits
from meshwright.cost_models.framework import (
    AttentionKernel,
    Framework,
    HostCost,
    Selective,
)
from meshwright.cost_models.pointwise import (
    EAGER_TORCH,
    FUSED,
    MASKED_SOFTMAX,
    MEGATRON_2021,
    TE_LOSS,
    TRANSFORMER_ENGINE,
    P,
)
from meshwright.cost_models.strategy import Partition, Recompute, Schedule
from meshwright.cost_models.target_memory import (
    INTERNEVO_MEMORY,
    MEGATRON_CORE_MEMORY,
    MEGATRON_LM_MEMORY,
    NANOTRON_2024_MEMORY,
    NANOTRON_MEMORY,
    NEMO_MEMORY,
    OFFLOAD_MEMORY,
)

_MEGATRON = Framework(
    name="megatron",
    schedules=(Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED),
    zero_stages=(0, 1),
    recomputes=(Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL),
    context_parallel=True,
    context=context_traits.TRANSFORMER_ENGINE,
    expert_parallel=True,
    partial_sharding=False,
    vocab_parallel=True,
    tensor_parallel_moe=True,
    fused_projections=True,
    windowed_attention=True,
    masters_are_parameters=False,
    shards_rows=False,
    eager_rms_norm=False,
    regathers_sequence=True,  # the input of a column-cut matmul is kept sharded and gathered again in backward
    overlap_dp_reduce=0.0,
    overlap_dp_gather=0.0,
    overlap_tp=0.0,
    overlap_pp=0.0,
    pointwise=FUSED,
    selective=Selective(rest=0.0, core=1.0),  # attention between its projections
    recompute_stops_early=False,
    reduces_once=True,
    receives_ahead=False,
    splits_hops=True,
    vocab_multiple=128,
    torch_schedules=False,
    half_precision=True,
    experts=ExpertTraits(calls_each_expert=1.0),
)

# Megatron-LM with --use-flash-attn (since January 2023), and its forks; dropout off. Since 2022 a column-cut matmul
# sums the gradient of its input beside the gradient of its weights (megatron/core/tensor_parallel/layers.py:
# LinearWithGradAccumulationAndAsyncCommunication); backward of a layer in arXiv 2205.05198, table 4, tells how much
# hides
MEGATRON_LM = replace(
    _MEGATRON,
    name="megatron-lm",
    blocking_hops=(Schedule.ONE_F_ONE_B,),
    overlap_tp_backward=0.4,
    host=HostCost(launch_factor=3.0, microbatch_s=1e-3, step_s=0.01),
    pointwise_factor=1.2,
    memory=MEGATRON_LM_MEMORY,
)

# embedding and head split over all stages of a pipeline (sail-sg/VocabularyParallelism; arXiv 2411.05288, section 5):
# their passes lie between those of the stages, and two micro-batches more are in flight, or one where a rank waits once
MEGATRON_LM_VOCAB_1, MEGATRON_LM_VOCAB_2 = (
    replace(
        MEGATRON_LM,
        name=f"megatron-lm-vocab-{number}",
        version_of="megatron-lm",
        memory=replace(MEGATRON_LM_MEMORY, held_more=3 - number),
    )
    for number in (1, 2)
)

# the same with the passes of embedding and head between those of each micro-batch (nnScaler, OSDI 2024),
# which takes half as many micro-batches again (arXiv 2411.05288, section 5)
MEGATRON_LM_INTERLACED = replace(
    MEGATRON_LM,
    name="megatron-lm-interlaced",
    version_of="megatron-lm",
    memory=replace(MEGATRON_LM_MEMORY, held_factor=1.5),
)

# with attention written out, as in arXiv 2205.05198 and 2401.10241
MEGATRON_LM_2022 = replace(
    MEGATRON_LM,
    name="megatron-lm-2022",
    version_of="megatron-lm",
    differs_in=("pointwise_factor",),  # other kernels
    pointwise=MEGATRON_2021,
    context_parallel=False,  # it came with flash attention
    attention=AttentionKernel.WRITTEN_OUT,
    blocking_hops=(Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED),
)

# before 2022, as in arXiv 2104.04473
MEGATRON_LM_2021 = replace(MEGATRON_LM_2022, name="megatron-lm-2021", overlap_tp_backward=0.0)

# arXiv 2402.15627, section 3.2: gathers and reductions of ZeRO and of tensor parallelism run beside compute. Left out:
# parallel blocks and sliding windows of its own models, which are less work than the model named.
MEGASCALE = replace(
    _MEGATRON,
    name="megascale",
    version_of="megatron-lm",
    differs_in=("overlap_dp_reduce", "overlap_dp_gather", "overlap_tp"),
    zero_stages=(0, 1, 2),
    overlap_dp_reduce=1.0,
    overlap_dp_gather=1.0,
    overlap_tp=1.0,
    memory=MEGATRON_LM_MEMORY,
)

# The causal kernel reads the triangle of the scores that the mask keeps and writes them whole (megatron/fused_kernels/
# scaled_upper_triang_masked_softmax.h), dropout passes over all; the gradient of a bias is a sum of its own, queries,
# keys and values are cut from one tensor, their gradients made contiguous and concatenated, the context transposed
# (megatron/model/transformer.py: ParallelAttention)
MEGATRON_DEEPSPEED = replace(
    _MEGATRON,
    name="megatron-deepspeed",
    schedules=(Schedule.ONE_F_ONE_B,),
    zero_stages=(0, 1, 2),
    pointwise=replace(
        MEGATRON_2021,
        softmax=P(forward_kernels=3, forward_passes=4, backward_kernels=3, backward_passes=4.5),
        bias=P(forward_kernels=0, forward_passes=0, backward_kernels=1, backward_passes=1),
        split=P(forward_kernels=1, forward_passes=2 / 3, backward_kernels=4, backward_passes=4 + 2 / 3),
    ),
    attention=AttentionKernel.WRITTEN_OUT,
    context_parallel=False,
    splits_hops=True,  # deepspeed/runtime/pipe/engine.py: is_pipe_partitioned wherever a model is cut by tp
    pads_whole_vocab=False,  # as vTrain's runs have it, whose heads are three times slower a word with tp 1
    host=HostCost(
        launch_factor=8.2, collective_s=1e-4, skew_s=1.8e-4, microbatch_s=4.1e-4, step_s=1.6e-3, run_ahead=4.1
    ),
    pointwise_factor=1.58,
    dp_factor=0.78,
    memory=MEGATRON_LM_MEMORY,
    calibrated_on="vTrain's runs of GPTs on A100",
)

MEGATRON_BRIDGE = replace(
    _MEGATRON,
    name="megatron-bridge",
    zero_stages=(0, 1, 3),
    attention=AttentionKernel.FLASH3,
    pointwise=replace(TRANSFORMER_ENGINE, loss=TE_LOSS, sharded_loss=TE_LOSS, softmax=MASKED_SOFTMAX),
    overlap_dp_reduce=1.0,
    overlap_dp_gather=1.0,
    # userbuffers, on in all performance recipes with tp > 1: gathers and scatters in as many parts as there are ranks
    # beside the parts of the matmul, or whole beside another matmul; the first or last part of each is exposed
    # (transformer_engine/pytorch/module/base.py: initialize_ub; NeMo, tp_overlap_configs/userbuffers.py)
    overlap_tp=0.7,
    float8=True,
    float8_gathers=True,  # casts in the norm, then gathers (module/layernorm_linear.py); fp8_param_gather
    block_scaled_factor=1.04,  # of steps with either, of one version: Llama 3 8B on B200 and GB300, 25.11
    # a cast and a matmul for each expert, from one call of C++ for each projection
    # (transformer_engine/pytorch/module/grouped_linear.py)
    experts=ExpertTraits(exchange_factor=1.3, calls_each_expert=1.0, casts_each_expert=1.0, pads_rows=True),
    # Transformer Engine falls back to it for a learnable softmax unless cuDNN is new enough (its issue 2318; Bridge,
    # models/gpt_oss/gpt_oss_provider.py): steps of gpt-oss until 26.04 are met within 6 % so, else 40 % too fast
    sinks_written_out=True,
    memory=MEGATRON_CORE_MEMORY,
)

MEGATRON_BRIDGE_OFFLOAD = replace(
    MEGATRON_BRIDGE,
    name="megatron-bridge-offload",
    version_of="megatron-bridge",
    memory=OFFLOAD_MEMORY,
)

# NeMo 2 on the same Megatron-Core: Megatron's own fused cross entropy (nemo/collections/llm/gpt/model/base.py:
# cross_entropy_loss_fusion), squared ReLU as two operators of torch (nemo/collections/llm/fn/activation.py)
NEMO = replace(
    MEGATRON_BRIDGE,
    name="nemo",
    version_of="megatron-bridge",
    pointwise=replace(
        TRANSFORMER_ENGINE,
        squared_relu=P(forward_kernels=2, forward_passes=4, backward_kernels=4, backward_passes=10),
    ),
    memory=NEMO_MEMORY,
)

# Containers 24.01 to 24.07: the launcher turns cuDNN's attention off (NVIDIA/NeMo-Framework-Launcher, conf/config.yaml:
# NVTE_FUSED_ATTN: 0 from February to August 2024), which leaves FlashAttention-2
NEMO_2024 = replace(NEMO, name="nemo-2024", attention=AttentionKernel.FLASH)

# without userbuffers: only in backward, inputs are gathered beside the matmul of their gradient, which is scattered
# beside that of the weights' (module/layernorm_linear.py): two of three exchanges. So with nvfp4 (Megatron-Bridge,
# scripts/performance/configs/llama: tp_comm_overlap) and on Google's A3 Mega (AI-Hypercomputer/gpu-recipes,
# src/frameworks/a3mega/nemo-configs: ub_tp_comm_overlap)
MEGATRON_BRIDGE_NCCL, NEMO_NCCL = (
    replace(
        target,
        name=f"{target.name}-nccl",
        version_of="megatron-bridge",
        differs_in=("overlap_tp",),
        overlap_tp=0.0,
        overlap_tp_backward=0.67,
    )
    for target in (MEGATRON_BRIDGE, NEMO)
)

# eager torch, launches slow to come: Python between kernels, a coalesced call for every gather and scatter of tensor
# parallelism; ZeRO 1 scatters and gathers between steps, with nothing beside it
NANOTRON = replace(
    _MEGATRON,
    name="nanotron",
    host=HostCost(
        launch_factor=9.6,
        collective_s=5.9e-5,
        pipelined_collective_s=2.2e-4,
        hop_s=9e-5,
        step_s=0.03,
        run_ahead=11.0,
    ),
    overlap_dp_reduce=0.9,
    overlap_dp_scatter=0.0,
    overlap_tp=0.7,
    schedules=(Schedule.GPIPE, Schedule.ONE_F_ONE_B),
    recomputes=(Recompute.NONE, Recompute.FULL),
    expert_parallel=False,
    context_parallel=False,
    pointwise=replace(EAGER_TORCH, rms_norm=FUSED.rms_norm, adamw=EAGER_TORCH.adamw),
    fused_projections=True,
    regathers_sequence=True,
    partition=Partition.BY_COST,
    splits_hops=False,
    vocab_multiple=1,
    half_precision=False,
    memory=NANOTRON_MEMORY,
)

# as it was when 64 nodes were measured: sends of 0.2 s, and ranks meet before each collective, as where torch checks
# that they call the same one (TORCH_DISTRIBUTED_DEBUG=DETAIL: a barrier whose root meets the others one after another,
# torch/csrc/distributed/c10d/ProcessGroupWrapper.cpp). Both constants come out the same, within 1 %, on either half of
# the models; steps of the other half are then met within 2.2 and 2.6 % (median). That it is this switch is inferred: a
# collective costs so much more for each rank of its group, over tp and over dp alike. The host does not run ahead: few
# outputs wait.
NANOTRON_2024 = replace(
    NANOTRON,
    name="nanotron-2024",
    version_of="nanotron",
    differs_in=("host.hop_s", "host.checked_collective_s", "host.pipelined_collective_s"),
    host=replace(NANOTRON.host, hop_s=0.2, checked_collective_s=2e-4, pipelined_collective_s=0.0),
    memory=NANOTRON_2024_MEMORY,
)

# InternLM under InternEvo: logits cast to float32, flash_attn's cross entropy, and for each micro-batch the metrics of
# internlm/model/metrics.py (AccPerplex: maxima twice, argmax, difference, exponential, sum; the loss again); the update
# flattens, casts, unscales and clips gradients and runs torch's AdamW (internlm/solver/optimizer/hybrid_zero_optim.py)
_INTERNLM_LOSS = P(
    forward_kernels=16,
    forward_passes=0,
    forward_float32_passes=11,
    forward_casts=1,
    backward_kernels=2,
    backward_passes=0,
    backward_float32_passes=2,
    backward_casts=1,
)
INTERNEVO = replace(
    _MEGATRON,
    name="internevo",
    memory=INTERNEVO_MEMORY,
    partition=Partition.LATER,
    zero_stages=(0, 1, 3),
    partial_sharding=True,
    attention=AttentionKernel.FLASH,
    pointwise=replace(
        FUSED,
        loss=_INTERNLM_LOSS,
        sharded_loss=_INTERNLM_LOSS,
        adamw=P(forward_kernels=14, forward_passes=29, backward_kernels=0, backward_passes=0),
    ),
    overlap_dp_reduce=1.0,
    # norms, scale and metrics are read back, the next batch is fetched, parameter after parameter is handled in Python
    host=HostCost(microbatch_s=1e-3, step_s=0.45),
    overlap_dp_gather=0.0,  # overlap_sync_param is off in every config of configs/
    broadcasts_weights=True,
    context_parallel=False,
    expert_parallel=False,
)
