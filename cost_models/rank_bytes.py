"""What a pipeline rank of our own executors holds whatever the moment, and bytes of a moment by kind."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.residency import Numbers, expert_shards, state_bytes
from meshwright.cost_models.saved import BlockBytes
from meshwright.cost_models.step_states import Pipeline
from meshwright.cost_models.strategy import SPLIT_BACKWARD, V_SHAPED
from meshwright.cost_models.tape import Lifetimes
from meshwright.cost_models.traffic import shared_grad_bytes
from meshwright.profiler.model import BlockKind

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KindBytes:
    """Bytes of one pipeline rank at one moment, by kind: arrays of shape ``[num_configs]``."""

    params: FloatArray
    grads: FloatArray
    optimizer: FloatArray
    activations: FloatArray
    gathered: FloatArray
    working: FloatArray
    communication: FloatArray

    @property
    def total(self) -> FloatArray:
        """Their sum."""
        return np.asarray(sum(getattr(self, field.name) for field in fields(self)))


class Rank:
    """One pipeline rank: its chunks, what it holds throughout, and its moments."""

    def __init__(self, blocks: list[BlockBytes], pipe: Pipeline, rank: int, hop_bytes: FloatArray) -> None:
        self.blocks, self.pipe, self.rank, self.hop = blocks, pipe, rank, hop_bytes
        batch, recipe = pipe.batch, pipe.workload.recipe
        self.zero, self.nothing = batch.zero_stage, np.zeros(len(batch))
        self.weight, self.grad = float(recipe.params.num_bytes), float(recipe.grads.num_bytes)
        # what is reduced is cast to the dtype of the parameters
        self.reduced_grad = float(recipe.master.num_bytes) if recipe.master and recipe.has_master else self.grad
        self.casts = recipe.has_master and recipe.grads is not recipe.compute
        self.sharded = (self.zero > 0) | recipe.has_master  # by FSDP2, over one rank at ZeRO 0
        # gradients of a unit are tensors of their own until they are reduced or added to whole ones
        self.unit_grads = self.sharded & ((self.zero >= 2) | self.casts)
        self.splits = pipe.schedule in SPLIT_BACKWARD
        counts = pipe.counts[rank]
        self.lives = [_lifetimes(block) for block in blocks]
        nothing = Numbers.zeros(len(batch))
        self.experts = [block.experts or nothing for block in blocks]  # units of their own
        self.shares_experts = expert_shards(batch) > 1.0
        self.dense = [block.params + experts * -1.0 for block, experts in zip(blocks, self.experts, strict=True)]
        self.chunks = [self._chunk(number, counts[number]) for number in range(len(counts))]
        everything = sum((chunk.outer + chunk.inner for chunk in self.chunks), Numbers.zeros(len(batch)))
        state = state_bytes(everything, pipe.workload, pipe.framework, batch)
        self.params, self.optimizer, self.gathered = state.params, state.optimizer, state.gathered

    def at_the_end(self) -> KindBytes:
        """Gradients of which each rank of tp has a part: side by side, in one flat tensor, and their sum."""
        pipe, shared = self.pipe, self.nothing
        for kind, number in zip(pipe.kinds.kinds, pipe.counts[self.rank].sum(axis=0), strict=True):
            shared = shared + number * shared_grad_bytes(kind, pipe.workload, pipe.batch)
        whole = sum((chunk.outer + chunk.inner for chunk in self.chunks), Numbers.zeros(len(pipe.batch)))
        numbers = np.where(self.zero == 0, whole.whole, whole.owned)
        return KindBytes(
            params=self.params,
            grads=numbers * self.reduced_grad,
            optimizer=self.optimizer,
            activations=self.nothing,
            gathered=self.nothing,
            working=np.where(pipe.batch.tp > 1, 0.0, -np.inf),
            communication=3.0 * shared,
        )

    def _kept_grads(self, unit: Numbers) -> FloatArray:
        return np.where(self.zero <= 1, unit.whole * self.grad, unit.owned * self.reduced_grad)

    def _chunk(self, number: int, counts: FloatArray) -> Chunk:
        outer = inner = experts = Numbers.zeros(len(self.pipe.batch))
        order: list[int] = []
        saved, inputs, outputs, received = (self.nothing,) * 4
        for index in np.flatnonzero(counts):
            times, lives = float(counts[index]), self.lives[index]
            saved = saved + times * lives.saved
            if self.pipe.kinds.kinds[index].kind is BlockKind.DECODER:
                experts = experts + self.experts[index] * times
                inner, order = inner + self.blocks[index].params * times, [*order, int(index)]
                inputs, outputs = inputs + times * lives.inputs, outputs + times * lives.outputs
            else:
                outer = outer + self.blocks[index].params * times
        pipelined = len(self.pipe.counts) > 1
        turns = self.pipe.schedule in V_SHAPED and self.rank == len(self.pipe.counts) - 1
        receives, is_handed = pipelined and not counts[0], turns and number == 1
        if receives:  # what its first block does not save anyway, nor the chunk before that put it out
            received = self.hop * (1.0 - self.lives[order[0]].keeps_input - float(is_handed))
        return Chunk(
            outer=outer,
            inner=inner,
            order=order,
            saved=saved,
            inputs=inputs,
            outputs=outputs,
            received=received,
            experts=experts,
            early_grads=self._kept_grads(outer + experts),
            late_grads=self._kept_grads(inner + experts * -1.0),
            sends=pipelined and not counts[-1],
            receives=receives,
            hands_over=turns and number == 0,
            is_handed=is_handed,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stage: parameters outside its blocks and in them, kinds of blocks in order, bytes of one micro-batch."""

    outer: Numbers
    inner: Numbers
    experts: Numbers  # of ``inner``
    order: list[int]
    saved: FloatArray
    inputs: FloatArray
    outputs: FloatArray
    received: FloatArray
    early_grads: FloatArray  # between micro-batches: of what no split of a backward puts off
    late_grads: FloatArray  # of blocks without experts
    sends: bool
    receives: bool
    hands_over: bool  # to the next stage on the same rank
    is_handed: bool


def _lifetimes(block: BlockBytes) -> Lifetimes:
    assert block.lifetimes is not None
    return block.lifetimes
