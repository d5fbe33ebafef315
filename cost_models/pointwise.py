"""The memory-bound kernels of each target, counted: launches, and passes over each operator's tensor.

``framework.PointwiseCost`` says what a pass is. Each table names the project and the file that it is read from.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost_models.framework import Pointwise, PointwiseCost

P = PointwiseCost

# One ATen kernel after another, as Hugging Face's modules call them: operands of each operator counted once, on
# transformers 5.23 and torch 2.13 (models/llama/modeling_llama.py, autograd's derivatives, cross entropy over float32
# logits, executors/loss.py, torch.optim.AdamW). An RMSNorm that calls functional.rms_norm costs as little as LayerNorm;
# GPT-2's gelu, written out, passes 18 and 29 times instead of 2 and 3.
EAGER_TORCH = Pointwise(
    rms_norm=PointwiseCost(
        forward_kernels=8,
        forward_passes=2,
        forward_float32_passes=5,
        forward_casts=2,
        backward_kernels=16,
        backward_passes=6,
        backward_float32_passes=18,
        backward_casts=2,
    ),
    layer_norm=PointwiseCost(forward_kernels=1, forward_passes=2, backward_kernels=1, backward_passes=3),
    rotary=PointwiseCost(forward_kernels=10, forward_passes=10, backward_kernels=18, backward_passes=16),
    activation=PointwiseCost(forward_kernels=1, forward_passes=2, backward_kernels=1, backward_passes=3),
    gated_activation=PointwiseCost(forward_kernels=2, forward_passes=5, backward_kernels=3, backward_passes=9),
    residual=PointwiseCost(forward_kernels=1, forward_passes=3, backward_kernels=1, backward_passes=3),
    branch=PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=1, backward_passes=3),
    embedding=PointwiseCost(forward_kernels=1, forward_passes=2, backward_kernels=1, backward_passes=1),
    embedding_table=PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=1),
    loss=PointwiseCost(
        forward_kernels=3,
        forward_passes=0,
        forward_float32_passes=3,
        forward_casts=1,
        backward_kernels=4,
        backward_passes=0,
        backward_float32_passes=5,
        backward_casts=1,
    ),
    sharded_loss=PointwiseCost(
        forward_kernels=16,
        forward_passes=0,
        forward_float32_passes=6,
        forward_casts=1,
        backward_kernels=10,
        backward_passes=0,
        backward_float32_passes=8,
        backward_casts=2,
    ),
    routing=PointwiseCost(forward_kernels=12, forward_passes=1, backward_kernels=8, backward_passes=1.5),
    adamw=PointwiseCost(forward_kernels=9, forward_passes=25, backward_kernels=0, backward_passes=0),
    sgd=PointwiseCost(forward_kernels=1, forward_passes=3, backward_kernels=0, backward_passes=0),
    accumulate=PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=1, backward_passes=3),
)

# MPT of llm-foundry under Composer, as of 2023: a bias everywhere, whose gradient is a sum of its own; queries, keys
# and values cut from one tensor, gradients concatenated (and the kernel's query gradient summed in float32); a fused
# cross entropy (flash_attn's), and after each backward two training metrics that take cross entropy over the logits
# again, in float32 (llmfoundry/models/mpt/modeling_mpt.py: ComposerMPTCausalLM; composer/trainer/trainer.py:
# _eval_train_metrics; composer/metrics/nlp.py); decoupled AdamW (composer/optim) after a clip of the norm
MPT = replace(
    EAGER_TORCH,
    rms_norm=PointwiseCost(forward_kernels=1, forward_passes=2, backward_kernels=2, backward_passes=5),
    layer_norm=PointwiseCost(forward_kernels=1, forward_passes=2, backward_kernels=2, backward_passes=5),
    bias=PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=1, backward_passes=1),
    split=PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=3, backward_passes=4),
    loss=PointwiseCost(
        forward_kernels=9,
        forward_passes=2,
        forward_float32_passes=8,
        forward_casts=2,
        backward_kernels=1,
        backward_passes=2,
    ),
    adamw=PointwiseCost(forward_kernels=12, forward_passes=25, backward_kernels=0, backward_passes=0),
)

# Fused kernels, as Apex and Megatron-Core with Transformer Engine have them: one pass in, one out, gradients of biases
# and norms summed beside; bias, activation, dropout and residual addition in one kernel each; a fused Adam.
FUSED = Pointwise(
    rms_norm=P(forward_kernels=1, forward_passes=2, backward_kernels=2, backward_passes=4),
    layer_norm=P(forward_kernels=1, forward_passes=2, backward_kernels=2, backward_passes=4),
    rotary=P(forward_kernels=2, forward_passes=2, backward_kernels=2, backward_passes=2),
    activation=P(forward_kernels=1, forward_passes=2, backward_kernels=2, backward_passes=4),
    gated_activation=P(forward_kernels=1, forward_passes=3, backward_kernels=1, backward_passes=5),
    residual=P(forward_kernels=1, forward_passes=3, backward_kernels=1, backward_passes=3),
    branch=P(forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0),
    embedding=P(forward_kernels=3, forward_passes=5, backward_kernels=3, backward_passes=4),
    embedding_table=P(forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=1),
    loss=P(
        forward_kernels=8,
        forward_passes=0,
        forward_float32_passes=8,
        forward_casts=1,
        backward_kernels=4,
        backward_passes=0,
        backward_float32_passes=2,
        backward_casts=1,
    ),
    sharded_loss=P(
        forward_kernels=12,
        forward_passes=0,
        forward_float32_passes=8,
        forward_casts=1,
        backward_kernels=4,
        backward_passes=0,
        backward_float32_passes=2,
        backward_casts=1,
    ),
    routing=P(forward_kernels=12, forward_passes=1, backward_kernels=8, backward_passes=1),
    # scores, choice, weights, auxiliary loss, counts of rows and their places (megatron/core/transformer/moe/router.py,
    # moe_utils.py, token_dispatcher.py: preprocess), each a kernel over [tokens, experts] in float32, about
    router=P(
        forward_kernels=18,
        forward_passes=0,
        forward_float32_passes=18,
        backward_kernels=22,
        backward_passes=0,
        backward_float32_passes=22,
    ),
    adamw=P(forward_kernels=4, forward_passes=11, backward_kernels=0, backward_passes=0),
    sgd=P(forward_kernels=1, forward_passes=3, backward_kernels=0, backward_passes=0),
    accumulate=P(forward_kernels=0, forward_passes=0, backward_kernels=1, backward_passes=2),
)

# Blocks through torch.compile, the loss not: norms join the addition before them; rotary tables are complex, which the
# compiler leaves alone (cast, product and cast back in float32); keys and values of a group are written out for every
# head (torchtitan/models/llama/model.py: apply_rotary_emb, repeat_kv)
COMPILED = replace(
    FUSED,
    rms_norm=P(forward_kernels=1, forward_passes=1, backward_kernels=2, backward_passes=4),
    residual=P(forward_kernels=1, forward_passes=3, backward_kernels=0, backward_passes=2),
    rotary=P(forward_kernels=6, forward_passes=10, backward_kernels=6, backward_passes=10),
    quantize=P(forward_kernels=2, forward_passes=2.5, backward_kernels=3, backward_passes=3.5),
    embedding=EAGER_TORCH.embedding,
    loss=EAGER_TORCH.loss,
    sharded_loss=EAGER_TORCH.sharded_loss,
)

# Megatron-LM before flash attention: scores scaled, masked and normalised in one kernel, then dropped out of (the
# mask is a byte a number); dropout behind every attention and feed-forward layer, fused with bias and addition.
MEGATRON_2021 = replace(
    FUSED,
    softmax=P(forward_kernels=3, forward_passes=4.5, backward_kernels=3, backward_passes=5.5),
    dropout=P(forward_kernels=3, forward_passes=0.5, backward_kernels=3, backward_passes=2.5),
    loss=FUSED.loss,
)

# Transformer Engine: what goes into a matmul in fewer bits is read once and written twice, by rows and by columns
# (transformer_engine/common/cast; the input of one behind a norm is cast in the norm: modules/layernorm_linear.py)
TRANSFORMER_ENGINE = replace(
    FUSED, quantize=P(forward_kernels=2, forward_passes=2, backward_kernels=2, backward_passes=2)
)
# cross_entropy_fusion_impl = "te": logits read twice and overwritten with their gradient, which is scaled in backward
# (transformer_engine/pytorch/triton/cross_entropy.py)
TE_LOSS = P(forward_kernels=4, forward_passes=3, backward_kernels=1, backward_passes=2)
# scores masked and normalised in one kernel, nothing dropped: the mask is a byte a number
MASKED_SOFTMAX = P(forward_kernels=2, forward_passes=2.5, backward_kernels=2, backward_passes=3)
