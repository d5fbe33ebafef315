"""The conjugate collectives of tensor parallelism as differentiable functions on local tensors.

Each is the adjoint of another, which is what makes gradients right (Megatron-LM, arXiv 1909.08053 section 3, and
arXiv 2205.05198 section 4.2 for the two on sequence shards):

=====================  ==================  ==================  ==============================================
function               forward             backward            between
=====================  ==================  ==================  ==============================================
``enter``              identity            all_reduce          replicated input -> column split
``leave``              all_reduce          identity            row split -> replicated output
``gather_sequence``    all_gather          reduce_scatter      sequence shard -> column split
``scatter_sequence``   reduce_scatter      all_gather          row split -> sequence shard
``slice_sequence``     own part (no comm)  all_gather          replicated tensor -> sequence shard
``gather_vocabulary``  all_gather          own part (no comm)  vocabulary shard -> replicated logits
=====================  ==================  ==================  ==============================================

The sequence is the dimension before the last: ``[batch, sequence, hidden]``, or tokens ``[tokens, hidden]``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


_ops = torch.ops._c10d_functional  # functional forms: selective recompute can keep their outputs


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of every rank's ``x``, in a tensor of its own; one all_reduce."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group.group_name))  # type: ignore[no-any-return]


def all_gather_dim(x: Tensor, dim: int, group: Group) -> Tensor:
    """Every rank's ``x`` side by side along ``dim``, in rank order; one all_gather."""
    num_ranks = group.size()
    gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), num_ranks, group.group_name))
    dim %= x.dim()
    stacked = gathered.unflatten(0, (num_ranks, x.shape[0]))
    return stacked.movedim(0, dim).reshape(*x.shape[:dim], num_ranks * x.shape[dim], *x.shape[dim + 1 :])  # type: ignore[no-any-return]


def reduce_scatter_dim(x: Tensor, dim: int, group: Group) -> Tensor:
    """The sum over ranks, of which each rank keeps its part of ``dim``; one reduce_scatter."""
    num_ranks = group.size()
    dim %= x.dim()
    parts = x.unflatten(dim, (num_ranks, x.shape[dim] // num_ranks)).movedim(dim, 0).flatten(0, 1).contiguous()
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(parts, "sum", num_ranks, group.group_name))  # type: ignore[no-any-return]


def own_part(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of ``dim``, as a tensor of its own (never a view)."""
    size = x.shape[dim] // group.size()
    return x.narrow(dim, group.rank() * size, size).clone(memory_format=torch.contiguous_format)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_dim(x, -2, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_dim(grads[0], -2, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_dim(x, -2, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_dim(grads[0], -2, ctx.group), None


class _SliceSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return own_part(x, -2, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_dim(grads[0], -2, ctx.group), None


class _GatherVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_dim(x, -1, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return own_part(grads[0], -1, ctx.group), None


def enter(x: Tensor, group: Group) -> Tensor:
    """Replicated ``x`` into a column split: identity; the gradient's partial sums are added (all_reduce)."""
    return _Enter.apply(x, group)  # type: ignore[no-any-return]


def leave(x: Tensor, group: Group) -> Tensor:
    """Partial sums out of a row split, added (all_reduce); the gradient passes."""
    return _Leave.apply(x, group)  # type: ignore[no-any-return]


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """Sequence shards to the whole sequence (all_gather); the gradient is a partial sum (reduce_scatter)."""
    return _GatherSequence.apply(x, group)  # type: ignore[no-any-return]


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Partial sums over the whole sequence to summed sequence shards (reduce_scatter); backward all_gather."""
    return _ScatterSequence.apply(x, group)  # type: ignore[no-any-return]


def slice_sequence(x: Tensor, group: Group) -> Tensor:
    """A replicated tensor to this rank's part of the sequence; the parts' gradients are gathered (all_gather)."""
    return _SliceSequence.apply(x, group)  # type: ignore[no-any-return]


def gather_vocabulary(x: Tensor, group: Group) -> Tensor:
    """Logits ``[..., vocab / tp]`` to ``[..., vocab]`` on every rank (all_gather); backward keeps the own part."""
    return _GatherVocabulary.apply(x, group)  # type: ignore[no-any-return]
