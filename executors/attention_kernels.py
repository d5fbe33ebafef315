"""Attention of some queries over some keys, and what it takes to put such parts together exactly.

A part returns its output and, for each query, the logarithm of the sum of exponentials (*lse*) that it was divided by.
Parts over disjoint keys add up to the whole with weights ``exp(lse_part - lse_whole)`` (``merge``). Backward, each part
is worked out from the *whole's* output and lse: the probabilities of a part's keys are then those of the whole, and
gradients of parts are plain sums (FlashAttention-2, arXiv 2307.08691, section 3.1; Ring Attention, arXiv 2310.01889).

Shapes: queries ``[batch, heads, queries, width]``, keys ``[batch, kv_heads, keys, width]``, values ``[batch, kv_heads,
keys, value_width]``, lse ``[batch, heads, queries]`` in float32 for half types. ``kv_heads`` divides ``heads``; heads
are not repeated. On a CPU torch's own flash kernel computes any float type, on CUDA the flash kernel half types.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from meshwright import InputError
from meshwright.profiler.record import record

_aten = torch.ops.aten
HALF_TYPES = (torch.bfloat16, torch.float16)


@record
class Band:
    """Which keys a query may see: those at a distance from 0 on, and below ``window`` where that is not 0.

    The distance of query ``i`` and key ``j`` of a part is ``offset + i - j``.
    """

    offset: int = 0
    window: int = 0

    def clips(self, num_queries: int) -> bool:
        """Whether the far side of the window lies within the part."""
        return 0 < self.window <= self.offset + num_queries - 1

    def is_open(self, num_queries: int, num_keys: int) -> bool:
        """Whether every query sees every key."""
        return self.offset >= num_keys - 1 and not self.clips(num_queries)


def on_cuda(x: Tensor) -> bool:
    """Whether CUDA's kernels compute."""
    return x.device.type == "cuda"


def attend(q: Tensor, k: Tensor, v: Tensor, band: Band | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[batch, heads, queries, value_width]`` and lse of ``q`` over ``k``; each query must see some key."""
    value_width = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    if on_cuda(q):
        out, lse = _cuda_forward(q, k, v, band, scale)
    else:
        causal, mask = _cpu_mask(q, k, band)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out[..., :value_width], lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v`` of one part, from ``out`` and ``lse`` of the whole."""
    key_width, value_width = k.shape[-1], v.shape[-1]
    q, k, v, out, grad = _one_width(q, k, v, out, grad)
    if on_cuda(q):
        grads = _cuda_backward(grad, q, k, v, out, lse, band, scale)
    else:
        causal, mask = _cpu_mask(q, k, band)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    return grads[0][..., :key_width], grads[1][..., :key_width], grads[2][..., :value_width]


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Add a part over other keys to ``out`` and ``lse``, in place; both outputs in the type of ``lse`` at least."""
    whole = torch.logaddexp(lse, other_lse)
    out.mul_((lse - whole).exp_()[..., None]).add_(other_out * (other_lse - whole).exp_()[..., None])
    lse.copy_(whole)


def _one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All widened with zeros to one width, which kernels need: of 8 numbers on CUDA (latent attention, odd heads)."""
    width = max(tensor.shape[-1] for tensor in tensors)
    if on_cuda(tensors[0]):
        width = -(-width // 8) * 8
    return tuple(
        functional.pad(tensor, (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else tensor
        for tensor in tensors
    )


def _cpu_mask(q: Tensor, k: Tensor, band: Band | None) -> tuple[bool, Tensor | None]:
    """The kernel's causal flag (of a part whose first query and key are at one place), or numbers to add."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if band is None or band.is_open(num_queries, num_keys):
        return False, None
    if band.offset == 0 and not band.clips(num_queries):
        return True, None
    places = torch.arange(max(num_queries, num_keys), device=q.device)
    distance = band.offset + places[:num_queries, None] - places[None, :num_keys]
    hidden = distance < 0
    if band.window:
        hidden |= distance >= band.window
    return False, torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -math.inf)


def _cuda_window(q: Tensor, k: Tensor, band: Band | None) -> tuple[bool, int | None, int | None]:
    """The kernel's causal flag and window: keys to the left and right of the diagonal that ends in the last corner."""
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if band is None or band.is_open(num_queries, num_keys):
        return False, None, None
    if band.offset == 0 and num_queries == num_keys and not band.clips(num_queries):
        return True, None, None
    shift = band.offset - (num_keys - num_queries)
    left = band.window - 1 - shift if band.clips(num_queries) else num_keys
    return False, left, min(shift, num_keys)


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, band: Band | None, scale: float) -> tuple[Tensor, Tensor]:
    if q.dtype not in HALF_TYPES:
        raise InputError(
            f"context parallelism on CUDA computes attention in bfloat16 or float16, found {q.dtype}: plan with a "
            "recipe that computes in one of them"
        )
    causal, left, right = _cuda_window(q, k, band)
    out, lse, *_ = _aten._flash_attention_forward(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, q.shape[-2], k.shape[-2], 0.0, causal,
        False, scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    causal, left, right = _cuda_window(q, k, band)
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = _aten._flash_attention_backward(
        *(x.transpose(1, 2) for x in (grad, q, k, v, out)), lse.contiguous(), None, None, q.shape[-2], k.shape[-2], 0.0,
        causal, no_dropout, no_dropout, scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    to_q, to_k, to_v = (x.transpose(1, 2) for x in grads)
    return to_q, to_k, to_v
