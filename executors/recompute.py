"""Recompute: what a block throws away in forward and computes again for backward (Chen et al., arXiv 1604.06174).

``full``
    Only the block's input is kept. The backward first runs the block's forward again, collectives of tensor and context
    parallelism included, up to the last tensor that the backward needs: what follows it (the last projection of the
    block, the residual addition, and the collective behind them) is not repeated.
``selective``
    The outputs of 2-D and grouped matrix products (every projection, experts' too), of fused attention (with its
    log-sum-exp) and of collectives are kept, with the block's input. Norms, rotary positions, activations, residual
    additions, reshapes, casts and dropout are computed again. Batched matrix products and softmax, which are attention
    where it is not fused, are computed again too: their outputs grow with the square of the sequence (Korthikanti et
    al., arXiv 2205.05198). So no projection is computed twice and no collective issued twice. Of a projection split by
    rows over tp the sum is kept, not this rank's part of it (``partial_product``). Attention over the ranks of a ring
    counts as one operator: its messages are not sent again (``kept_outputs``).

Random numbers are replayed, so dropout is the same both times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from meshwright.cost_models.strategy import Recompute

_aten = torch.ops.aten
_collectives = torch.ops._c10d_functional

torch.library.define("meshwright::keep", "(Tensor x) -> Tensor")


@torch.library.impl("meshwright::keep", "default")
def _keep(x: Tensor) -> Tensor:
    """``x``, by an operator that selective recompute keeps."""
    return x


KEPT: frozenset[Any] = frozenset(
    {
        torch.ops.meshwright.keep.default,
        _aten.mm.default,
        _aten.addmm.default,
        _aten._grouped_mm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _collectives.all_reduce.default,
        _collectives.all_gather_into_tensor.default,
        _collectives.reduce_scatter_tensor.default,
        _collectives.all_to_all_single.default,
    }
)


SELECTIVE_PASSES = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)  # the first forward, and the one replayed


def apply_recompute(block: nn.Module, recompute: Recompute) -> None:
    """Make ``block`` recompute as asked; in place, parameter names stay."""
    if recompute is Recompute.NONE:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute is Recompute.SELECTIVE:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # the instance's forward, inside all hooks: FSDP gathers once, tensor-parallel inputs are prepared once
    block.forward = partial(_checkpointed, block.forward, options)


def partial_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, of which only the sum over ranks is used: ``[..., inputs]`` to ``[..., outputs]``.

    Selective recompute does not keep it, and when that sum is at hand in the recomputation does not compute it either:
    the result then is memory without values, which the kept sum replaces.
    """
    if not isinstance(_get_current_dispatch_mode(), SELECTIVE_PASSES):
        return nn.functional.linear(x, weight)
    product: Tensor = _PartialProduct.apply(x, weight)
    return product


def unkept_product(x: Tensor, weight: Tensor) -> Tensor:
    """``partial_product`` without its gradient."""
    if not isinstance(_get_current_dispatch_mode(), SELECTIVE_PASSES):
        return nn.functional.linear(x, weight)
    # torch matches the operators of both passes by their order: those of one pass alone must go unseen
    with _pop_mode_temporarily() as mode:
        if isinstance(mode, _CachedTorchDispatchMode):
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        return nn.functional.linear(x, weight)


def kept_outputs(
    compute: Callable[[], tuple[Tensor, ...]], blank: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What ``compute`` returns, kept under selective recompute as one operator's outputs, and then not computed twice.

    For what is made of many operators and messages, such as ring attention; within a ``torch.autograd.Function``'s
    forward. ``blank`` makes tensors of the same shapes and types, whose values do not matter.
    """
    if not isinstance(_get_current_dispatch_mode(), SELECTIVE_PASSES):
        return compute()
    with _pop_mode_temporarily() as mode:
        outputs = blank() if isinstance(mode, _CachedTorchDispatchMode) else compute()
    return tuple(torch.ops.meshwright.keep(output) for output in outputs)


class _PartialProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return unkept_product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        to_x = grad @ weight if ctx.needs_input_grad[0] else None
        to_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return to_x, to_weight


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, **options, **kwargs)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
