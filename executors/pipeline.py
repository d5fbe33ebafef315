"""Pipeline parallelism: the stages of this rank under a schedule of ``torch.distributed.pipelining``.

Stages exchange hidden states ``[micro_batch_size, sequence, hidden]`` (with sequence parallelism this rank's shard of
the sequence) and their gradients point to point; shapes are given to torch beforehand, so it runs no trial forward.
Tokens and targets are not sent: pipeline peers are given the same batch. The runtime accumulates gradients and leaves
them unscaled.

``zb-h1``, ``zbv`` and ``dualpipev`` split some backwards: gradients of a stage's input first, those of its matrices
later (``weight_gradients``), where FSDP's hooks do not see them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from meshwright.cost_models.strategy import Schedule
from meshwright.executors.data_parallel import DataParallel
from meshwright.executors.expert_parallel import ExpertParallel
from meshwright.executors.mesh import Mesh
from meshwright.executors.stage import StageModule
from meshwright.executors.tensor_parallel import TensorParallel
from meshwright.executors.weight_gradients import WeightGradients


class Chunk:
    """One stage on this rank, ready to run: its place in the pipeline, its module, and how that was split."""

    def __init__(
        self,
        index: int,
        module: StageModule,
        tensor_parallel: TensorParallel,
        data_parallel: DataParallel,
        weight_gradients: WeightGradients | None,
        experts: ExpertParallel | None = None,
    ) -> None:
        self.index = index
        self.module = module
        self.tensor_parallel = tensor_parallel
        self.data_parallel = data_parallel
        self.weight_gradients = weight_gradients  # where the schedule splits backward
        self.experts = experts  # where the stage has any


class _Unsharded(nn.Module):
    """Hides from the runtime that a stage is sharded: it would set FSDP's switches, which are ours to set."""

    def __init__(self, module: StageModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *hidden: Tensor, tokens: Tensor, targets: Tensor) -> Any:
        return self.module(*hidden, tokens=tokens, targets=targets)


_ONE_STAGE_A_RANK: dict[Schedule, Any] = {Schedule.GPIPE: ScheduleGPipe, Schedule.ONE_F_ONE_B: Schedule1F1B}
_STAGES_OF_A_RANK: dict[Schedule, Any] = {
    Schedule.INTERLEAVED: ScheduleInterleaved1F1B,
    Schedule.ZB_H1: ScheduleInterleavedZeroBubble,
    Schedule.ZBV: ScheduleZBVZeroBubble,
    Schedule.DUALPIPEV: ScheduleDualPipeV,
}


class _Stage(PipelineStage):
    def __init__(self, chunk: Chunk, num_stages: int, device: torch.device, **kwargs: Any) -> None:
        put_off = chunk.weight_gradients.take if chunk.weight_gradients else None
        module = _Unsharded(chunk.module)
        super().__init__(module, chunk.index, num_stages, device, dw_builder=put_off, **kwargs)
        self._chunk = chunk

    # torch makes a buffer for each micro-batch of a step beforehand, of hidden states and of gradients, and keeps them;
    # here they are made when they are received into, and dropped once used

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with _shapes_alone(self):
            super()._setup_forward_recv_info(num_microbatches, has_backward)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with _shapes_alone(self):
            super()._setup_backward_recv_info(num_microbatches)

    if not hasattr(PipelineStage, "_setup_forward_recv_info"):  # the same in torch 2.11

        def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
            with _shapes_alone(self):
                return super()._prepare_forward_infra(*args, **kwargs)

        def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
            with _shapes_alone(self):
                super()._prepare_backward_infra(*args, **kwargs)

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        if not self.is_last:  # torch 2.11 would compare the loss with the stand-in for it
            super()._validate_fwd_outputs(outputs)  # type: ignore[misc]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        _make_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        _make_buffers(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Any, ...]:
        received: tuple[Any, ...] = super()._retrieve_recv_activations(fwd_chunk_id)
        _drop_buffers(self.args_recv_info[fwd_chunk_id])
        return received

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Any, ...]:
        received: tuple[Any, ...] = super()._retrieve_recv_grads(bwd_chunk_id)
        _drop_buffers(self.grad_recv_info[bwd_chunk_id])
        return received

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._chunk.data_parallel.before_backward(last=last_backward)
        if self._chunk.weight_gradients:
            self._chunk.weight_gradients.put_off = not full_backward
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._chunk.data_parallel.after_weight_gradients(last=last_backward)


@contextmanager
def _shapes_alone(stage: PipelineStage) -> Iterator[None]:
    device, stage.device = stage.device, torch.device("meta")
    try:
        yield
    finally:
        stage.device = device


def _make_buffers(infos: Sequence[Any], device: torch.device) -> None:
    for info in infos:
        if info.buffer is not None:
            info.buffer = torch.empty_like(info.buffer, device=device, requires_grad=info.buffer.requires_grad)


def _drop_buffers(infos: Sequence[Any]) -> None:
    for info in infos:
        if info.buffer is not None:
            info.buffer = torch.empty_like(info.buffer, device="meta", requires_grad=info.buffer.requires_grad)


class Pipeline:
    """Runs ``chunks``, the stages of this rank in the order of the model, on micro-batches of one shape."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        mesh: Mesh,
        schedule: Schedule,
        num_stages: int,
        num_microbatches: int,
        hidden_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        example = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
        stages = [
            _Stage(
                chunk,
                num_stages,
                mesh.device,
                input_args=() if chunk.index == 0 else (example,),
                output_args=(example,),  # of the last stage a stand-in: nothing receives it
                group=mesh.axis("pp").get_group(),
            )
            for chunk in chunks
        ]
        options: dict[str, Any] = {"loss_fn": lambda output, target: output, "scale_grads": False}
        if schedule in _ONE_STAGE_A_RANK:
            self._schedule = _ONE_STAGE_A_RANK[schedule](stages[0], num_microbatches, **options)
        else:
            self._schedule = _STAGES_OF_A_RANK[schedule](stages, num_microbatches, **options)

    def run(self, tokens: Tensor, targets: Tensor) -> None:
        """Forward and backward of all micro-batches, cut from ``[share, sequence]``."""
        self._schedule.step(tokens=tokens, targets=targets, target=targets, return_outputs=False)
