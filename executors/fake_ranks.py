"""One rank of many without the others: a fake process group, fake tensors, and a plan applied to a model on meta.

torch's fake process group answers every collective at once with nothing; fake tensors have shapes and no values. Two
things of torch and transformers ask for values and are answered here: the vote that starts a pipeline (its outcome is
known: shapes are given beforehand) and Hugging Face's look for packed sequences in positions (there are none). And one
thing is missing: what is sent stays alive as long as the handle of the sending does, with NCCL and gloo alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshwright import InputError

if TYPE_CHECKING:
    from meshwright.executors.parallel_model import ParallelModel


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """A default process group of ``world_size`` ranks of which this process is ``rank``; nothing is ever sent.

    Raises ``InputError`` where there is a process group already, or the rank is not one of them.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be 0 to {world_size - 1}, found {rank}")
    if dist.is_initialized():
        raise InputError("a dry run makes its own process group: call it before init_process_group, not after")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def without_peers() -> Iterator[None]:
    """Pipelines run with nobody at the other end: no vote on shapes, and what is sent is held as by a real sending."""
    with ExitStack() as stack:
        if hasattr(_PipelineSchedule, "_warmup_p2p"):  # torch 2.11 holds no vote
            stack.enter_context(patch.object(_PipelineSchedule, "_warmup_p2p", _know_shapes))
        stack.enter_context(patch.object(schedules, "_batch_p2p", partial(_held, schedules._batch_p2p)))
        yield


@contextmanager
def fake_tensors() -> Iterator[None]:
    """All tensors made inside are fake and on the CPU; so are those on the meta device once ``to_empty`` moved them."""
    with ExitStack() as stack:
        stack.enter_context(without_peers())
        stack.enter_context(patch.object(functional, "grouped_mm", partial(_grouped_mm, functional.grouped_mm)))
        masking = sys.modules.get("transformers.masking_utils")
        if masking is not None:
            stack.enter_context(patch.object(masking, "find_packed_sequence_indices", lambda position_ids: None))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _know_shapes(schedule: Any, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
    from torch.distributed.pipelining._utils import InferenceMode

    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


class _GroupedProduct(torch.autograd.Function):
    """``grouped_mm`` of rows ``[rows, inputs]`` sorted by expert with ``[experts, inputs, outputs]``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(rows.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows, weights = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weights)


def _grouped_mm(original: Callable[..., Tensor], rows: Tensor, weights: Tensor, **options: Any) -> Tensor:
    """torch's stand-in for fake tensors knows bfloat16 alone, the kernels know more."""
    if rows.dtype is torch.bfloat16:
        return original(rows, weights, **options)
    if weights.dim() == 2:  # gradients of the matrices, from rows of both sides
        return rows.new_empty(options["offs"].shape[0], rows.shape[0], weights.shape[1])
    product: Tensor = _GroupedProduct.apply(rows, weights)
    return product


class _Sending:
    """Handles of sends, which hold what is sent."""

    def __init__(self, works: list[Any], sent: list[Any]) -> None:
        self._works, self._sent = works, sent

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _held(batch: Callable[..., list[Any]], operations: list[Any], desc: str | None = None) -> list[Any]:
    works = batch(operations, desc)
    return [_Sending(works, [operation.tensor for operation in operations])] if works else []


def give_memory(parallel: ParallelModel, device: torch.device) -> None:
    """Give a model that was split on the meta device memory: fake inside ``fake_tensors``, else real, without values.

    Call it before the first step. Parameters become new objects (ties are kept), so the few places that hold on to
    parameters are told.
    """
    made: dict[int, nn.Parameter] = {}

    def new(weight: nn.Parameter) -> nn.Parameter:
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(_made(weight, device), weight.requires_grad)
        return made[id(weight)]

    before = list(parallel.parameters())  # alive until all are replaced, so that no id is used again
    for chunk in parallel._chunks:
        for part in chunk.module.modules():
            part._parameters.update(
                {name: new(weight) for name, weight in part._parameters.items() if weight is not None}
            )
            part._buffers.update(
                {name: _made(value, device) for name, value in part._buffers.items() if value is not None}
            )
        chunk.data_parallel._units = [
            ([made.get(id(weight), weight) for weight in unit], group) for unit, group in chunk.data_parallel._units
        ]
    parallel._tied = [made.get(id(weight), weight) for weight in parallel._tied]
    del before


def _made(tensor: Tensor, device: torch.device) -> Tensor:
    if isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=device)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
