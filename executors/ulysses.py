"""Heads against sequence: the all-to-alls around an attention (DeepSpeed-Ulysses, arXiv 2309.14509).

Before it, a rank has all heads of its part of the sequence, and the attention needs some heads of the whole; after it,
the other way round. Each exchange is one all_to_all, of queries, keys and values together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright import InputError
from meshwright.executors.tp_collectives import Group

_ops = torch.ops._c10d_functional  # functional forms: selective recompute can keep their outputs
_HEADS, _SEQUENCE = 1, 2


def exchange_heads(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """``[batch, heads, own, width]`` each to ``[batch, heads / ranks, ranks * own, width]``, in rank order.

    Heads of keys and values that the ranks cannot share are repeated as often as it takes, and no further.
    Raises ``InputError`` where the ranks do not divide the heads of the queries.
    """
    ranks, heads, kv_heads = group.size(), q.shape[_HEADS], k.shape[_HEADS]
    if heads % ranks:
        raise InputError(f"cp_ulysses={ranks} must divide the {heads} heads that a rank computes: use cp_ring instead")
    group_size = heads // kv_heads
    repeats = next(
        times for times in range(1, group_size + 1) if not group_size % times and not kv_heads * times % ranks
    )
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=_HEADS), v.repeat_interleave(repeats, dim=_HEADS)
    exchanged: tuple[Tensor, Tensor, Tensor] = _Exchange.apply(group, _HEADS, _SEQUENCE, q, k, v)
    return exchanged


def exchange_sequence(out: Tensor, group: Group) -> Tensor:
    """``[batch, heads / ranks, ranks * own, width]`` back to ``[batch, heads, own, width]``."""
    (exchanged,) = _Exchange.apply(group, _SEQUENCE, _HEADS, out)
    return exchanged  # type: ignore[no-any-return]


def _exchange(group: Group, cut: int, join: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor cut along one dimension, a piece for each rank, and the pieces that come joined along the other."""
    ranks = group.size()
    pieces = [x.unflatten(cut, (ranks, x.shape[cut] // ranks)).movedim(cut, 0) for x in tensors]
    sent = torch.cat([piece.reshape(ranks, -1) for piece in pieces], dim=1)
    per_rank = [sent.shape[1]] * ranks
    received = _ops.wait_tensor(_ops.all_to_all_single(sent.view(-1), per_rank, per_rank, group.group_name))
    parts = received.view(ranks, -1).split([piece[0].numel() for piece in pieces], dim=1)
    return tuple(
        part.view(piece.shape).movedim(0, join).flatten(join, join + 1)
        for part, piece in zip(parts, pieces, strict=True)
    )


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, cut: int, join: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = group, join, cut
        return _exchange(group, cut, join, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, cut, join = ctx.exchange
        return None, None, None, *_exchange(group, cut, join, grads)
