"""What CUDA's kernels allocate, where torch on a CPU would choose others: named substitutions for fake tensors.

A dry run's tensors are fake and on the CPU, so operators that torch implements per device would save for backward what
the CPU's kernels save. ``cuda_kernels`` puts in their place what runs on a GPU:

* ``scaled_dot_product_attention``: for half types without a mask the flash kernel, which saves queries, keys, values
  (grouped heads unrepeated), its output, and a float32 log-sum-exp ``[batch, heads, sequence]``; else the
  memory-efficient kernel, or the written-out one for what that refuses (grouped heads). torch's own choice, in
  ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``.
* attention in parts, under context parallelism: the flash kernel, as on CUDA (``attention_kernels``).
* ``rms_norm``: the fused kernel, which saves its input and a float32 number a row (on a CPU: float32 copies).

``workspace_bytes`` is what a kernel allocates for itself while it runs, which no operator returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from meshwright.executors import attention_kernels

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """While entered, the functions named in this module's docstring do what they do on CUDA; for fake tensors only."""
    with (
        patch.object(functional, "scaled_dot_product_attention", _attention),
        patch.object(functional, "rms_norm", _rms_norm),
        patch.object(attention_kernels, "on_cuda", lambda x: True),
    ):
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    out: Tensor
    if has_torch_function((query, key, value)):  # context parallelism catches the call, as it does torch's own
        out = handle_torch_function(
            functional.scaled_dot_product_attention, (query, key, value), query, key, value, attn_mask, dropout_p,
            is_causal, scale, enable_gqa,
        )  # fmt: skip
    elif attn_mask is None and query.dtype in _HALF and query.shape[-1] == value.shape[-1] <= 256:
        out = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    elif query.dtype in (*_HALF, torch.float32) and not enable_gqa:
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        out = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]
    else:
        out = _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return out


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A boolean mask as numbers to add, for all heads, as the memory-efficient kernel wants it."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        rows = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if weight is not None and weight.dtype is not x.dtype:  # torch writes it out then
        return torch.rms_norm(x, normalized_shape, weight, eps)
    normed: Tensor = _RmsNorm.apply(x, weight)
    return normed


def workspace_bytes(operator: Any, args: Sequence[Any]) -> int:
    """What CUDA's kernel of an operator allocates while it runs.

    Flash attention's backward (FlashAttention-2, ``csrc/flash_attn/flash_api.cpp``, ``mha_bwd``): the gradient of the
    queries in float32 and a float32 number a row, both for a sequence rounded up to 128, and with grouped heads the
    gradients of keys and values before they are summed over a group.
    """
    if operator is _aten._scaled_dot_product_flash_attention_backward.default:
        (batch, heads, length, width), (_, kv_heads, kv_length, _) = args[1].shape, args[2].shape
    elif operator is _aten._flash_attention_backward.default:
        (batch, length, heads, width), (_, kv_length, kv_heads, _) = args[1].shape, args[2].shape
    else:
        return 0
    rows = batch * heads * (-(-length // 128) * 128)
    accumulated = rows * (-(-width // 32) * 32) * 4 + rows * 4
    repeated = 2 * batch * heads * kv_length * width * args[2].element_size() if heads != kv_heads else 0
    return int(accumulated + repeated)
