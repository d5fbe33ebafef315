"""The loss over vocabulary-sharded logits: sums and counts, so that micro-batches and ranks can be added up.

The contract is ``loss_fn(logits, targets) -> (sum, count)``: targets are already shifted, ``IGNORED`` (-100) is left
out of both. Meshwright divides by the global count; a loss function never divides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from meshwright.executors.tp_collectives import Group, gather_vocabulary

IGNORED = -100

LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of whole logits and the number of targets that count.

    ``logits`` ``[..., vocab]``, ``targets`` ``[...]`` int64. Half-precision logits are raised to float32 first.
    """
    flat = logits.flatten(0, -2)
    flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    total = functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()


def sharded_cross_entropy(logits: Tensor, targets: Tensor, *, group: Group, vocab_size: int) -> tuple[Tensor, Tensor]:
    """``cross_entropy`` of logits of which each rank holds its columns: no rank ever holds a whole row.

    ``logits`` ``[..., padded_vocab / tp]``: rank ``r`` holds the columns from ``r * padded_vocab / tp`` on; those from
    ``vocab_size`` on are padding and count neither in the sum nor in the gradient. Every rank returns the same values.

    Two all_reduces forward, none backward: the row maxima ``[tokens]``, then the sum of exponentials and the target's
    logit together ``[2, tokens]``; float32 for half types, else the logits' own type (Megatron-LM's vocabulary-parallel
    cross entropy needs three).
    """
    flat = logits.flatten(0, -2)
    total: Tensor = _ShardedCrossEntropy.apply(flat, targets.flatten(), group, vocab_size)
    return total, (targets != IGNORED).sum()


def loss_on_shards(loss_fn: LossFunction | None, *, group: Group | None, vocab_size: int) -> LossFunction:
    """What to call on a rank's logits: the default loss sharded, or the user's ``loss_fn`` on gathered logits.

    With ``group`` None (no tensor parallelism) logits are whole. A user's loss gets ``[..., vocab_size]`` without the
    padding, at the price of one all_gather of the logits per micro-batch and the memory to hold them.
    """
    if group is None:
        return loss_fn or cross_entropy
    if loss_fn is None:

        def sharded(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return sharded_cross_entropy(logits, targets, group=group, vocab_size=vocab_size)

        return sharded
    user_loss = loss_fn

    def gathered(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return user_loss(gather_vocabulary(logits, group)[..., :vocab_size], targets)

    return gathered


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: Group, vocab_size: int) -> Tensor:
        width = logits.shape[-1]
        first = group.rank() * width
        num_real = min(max(vocab_size - first, 0), width)
        rows = _raised(logits)
        if num_real < width:
            rows = rows.clone()
            rows[:, num_real:] = -torch.inf
        maxima = rows.amax(-1)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        counted = targets != IGNORED
        mine = counted & (targets >= first) & (targets < first + num_real)
        columns = torch.where(mine, targets - first, 0)
        picked = torch.where(mine, rows.gather(-1, columns[:, None])[:, 0] - maxima, 0.0)
        sums = torch.stack(((rows - maxima[:, None]).exp_().sum(-1), picked))
        dist.all_reduce(sums, group=group)
        log_sums = sums[0].log()
        ctx.save_for_backward(logits, maxima + log_sums, columns, mine, counted)
        ctx.num_real = num_real
        return torch.where(counted, log_sums - sums[1], 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normalizer, columns, mine, counted = ctx.saved_tensors
        grad = (_raised(logits) - normalizer[:, None]).exp_()
        grad[:, ctx.num_real :] = 0.0
        grad.scatter_add_(-1, columns[:, None], -mine.to(grad.dtype)[:, None])
        grad *= (counted.to(grad.dtype) * grads[0])[:, None]
        return grad.to(logits.dtype), None, None, None


def _raised(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
