"""What a rank of our own executors holds at each moment of a step at which it may hold the most, tensor by tensor.

Read off ``executors`` and torch 2.13's FSDP2 (``torch/distributed/fsdp/_fully_shard``) and pipelines
(``torch/distributed/pipelining``). A stage's *units* are its decoder blocks, the experts inside a block apart from it,
and, together, what stands outside the blocks (the *outer* unit: embedding, final norm, head). A unit

* is gathered into one flat buffer, then copied into its tensors; the buffer of the last one gathered is there until the
  next has been copied or the stage's forward is over (``_fsdp_param_group.py: wait_for_unshard``). ZeRO 3 gathers a
  block again for its backward, and by then the one before it into a flat buffer, too;
* has its weights' gradients in the compute dtype while its backward runs. They are then copied into a flat buffer in
  the dtype of the reduction, which is there until the next unit's gradients are (``_fsdp_collectives.py:
  foreach_reduce``): over the next micro-batch's forward too, where more than the last are reduced (ZeRO 2 and 3).
  Replicated over all ranks (ZeRO 0) the reduced ones are another tensor of that size, and their quotient by the divide
  factor a third; with shards they are smaller. Or they are added to whole ones (ZeRO 0 and 1, but for the last
  micro-batch).

A micro-batch in flight keeps, beside what its blocks save, the hidden states it received and those it sent. Every
pipeline but 1f1b keeps what it sent, gradients too, until the step ends: the handles of sends do.

Left out: batches of tokens, a few numbers a token, gradients of norms summed over tp, what rounding to 512 bytes adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.backward_held import NO_NUMBERS, NOTHING, Held
from meshwright.cost_models.estimate import Moment
from meshwright.cost_models.rank_bytes import KindBytes
from meshwright.cost_models.residency import Numbers
from meshwright.cost_models.schedules import Pass
from meshwright.cost_models.tape import Lifetimes

FloatArray = NDArray[np.float64]


class Backward(Held):
    """The backward of one micro-batch on one chunk, from its loss to its last unit's reduction."""

    def moments(self) -> Iterator[tuple[Moment, KindBytes]]:
        """One after the other, of arrays ``[num_configs]`` or, where times differ, ``[num_times, num_configs]``."""
        left = self.in_flight
        if self.state.kind is Pass.WEIGHT_GRADIENT:
            yield self._weight_gradients()
            return
        if (self.zero > 0).any():
            yield self._gather(left)
        if self.head is not None:
            yield self._loss(self.head)
            yield self._loss_backward(self.head)
            left = left - self.head.saved
        yield self._first_block(left)
        if self.num_blocks < 2.0 and (self.zero == 3).any():
            yield self._gather_again(self.first_kind, left, self.carried, self.nothing)
        if not self.split:
            yield from self._reduction(left - self.lives[self.first_kind].saved)
        if self.num_blocks >= 2.0:
            yield self._second_block(left)
            yield from self._last_blocks()
        if self.outer.whole.any():
            yield from self._outer_reduction()

    def _weight_gradients(self) -> tuple[Moment, KindBytes]:
        """All gradients of matrices of a stage at once, before they are added to those of earlier micro-batches."""
        rank, inner = self.rank, self.chunk.inner.whole - self.chunk.experts.whole
        own = np.where(rank.unit_grads, inner * rank.weight, 0.0) - self.chunk.outputs
        grads = np.where(self.resident, 0.0, inner * rank.grad)
        return self._at(Moment.WEIGHTS, self.in_flight - self.chunk.inputs, own, grads=grads)

    def _gather(self, left: FloatArray) -> tuple[Moment, KindBytes]:
        """The last unit's weights are copied out of their flat buffer, that of the unit before still being there.

        That unit is the last block, or its experts.
        """
        rank, lives = self.rank, self.lives[self.first_kind]
        block, experts = self._flat(rank.dense[self.first_kind]), self._expert_flat(self.first_kind)
        before = block if self.num_blocks >= 2.0 else np.where(experts > 0.0, block, self._flat(self.outer))
        unit = np.where(experts > 0.0, experts, block)
        whole = self._whole(self.first_kind)
        gathered = np.where(self.gathers, before + unit + np.where(self.zero == 3, whole, 0.0), 0.0)
        saved = lives.saved + (self.nothing if self.head is None else self.head.saved)
        return self._at(
            Moment.GATHER,
            left - saved,
            np.where(self.state.after_forward & (self.zero > 0), rank.hop, -np.inf),
            gathered=gathered + self.outer_gathered,
            communication=self.carried,
        )

    def _loss(self, head: Lifetimes) -> tuple[Moment, KindBytes]:
        """Logits and their loss, at the end of forward, with the flat buffer of the last unit gathered."""
        gathered = np.where(self.gathers, self._last_gathered(), 0.0) + self.outer_gathered
        return self._at(
            Moment.LOSS,
            self.in_flight,
            np.where(self.state.after_forward, head.forward - head.saved, -np.inf),
            gathered=gathered,
            communication=self.carried,
        )

    def _loss_backward(self, head: Lifetimes) -> tuple[Moment, KindBytes]:
        """The same backward; ZeRO 3 gathers the last block already."""
        activations, grads, working = self._parted(head)
        gathered = np.where(self.zero == 3, self._last_gathered(), 0.0) + self.outer_gathered
        return self._at(
            Moment.LOSS,
            self.in_flight - head.saved + activations,
            working,
            grads=grads,
            gathered=gathered,
            communication=self.carried,
        )

    def _block(
        self,
        index: int,
        left: FloatArray,
        *,
        gathered: FloatArray,
        communication: FloatArray,
        done: FloatArray,
        waiting: tuple[FloatArray, FloatArray] = (NOTHING, NOTHING),
    ) -> tuple[Moment, KindBytes]:
        """A block's backward, its weights gathered.

        ``gathered`` is what is beside them, ``waiting`` what was put off by blocks before it: inputs, gradients of
        outputs.
        """
        lives = self.lives[index]
        activations, grads, working = self._parted(lives)
        stay, under_way = self._head_grads()
        received = self._received()
        return self._at(
            Moment.BACKWARD,
            left - lives.saved + activations + waiting[0],
            working + under_way - received + waiting[1],
            grads=grads + stay + done,
            gathered=np.where(self.zero == 3, self._whole(index), 0.0) + gathered,
            communication=communication + received,
        )

    def _first_block(self, left: FloatArray) -> tuple[Moment, KindBytes]:
        return self._block(
            self.first_kind,
            left,
            gathered=self._gathered_next(2.0) + self.outer_gathered,
            communication=self.carried,
            done=self.nothing,
        )

    def _reduction(self, left: FloatArray) -> Iterator[tuple[Moment, KindBytes]]:
        """The first block's gradients are copied into flat buffers and reduced, its experts' first."""
        rank, unit, experts = self.rank, self.rank.dense[self.first_kind], self.rank.experts[self.first_kind]
        stay, under_way = self._head_grads()
        gathered = self._gathered_next(2.0) + self._freed(unit + experts) + self.outer_gathered
        if experts.whole.any():
            beside = under_way + self._own(unit)
            staying = stay + np.where(rank.unit_grads | self.resident, 0.0, unit.whole * rank.grad)
            yield from self._reduced(experts, left, gathered, staying, beside, early=True)
        done, flat = stay + self._taken_up(NO_NUMBERS, experts), self._reducing(experts)
        yield from self._reduced(unit, left, gathered, done, under_way, flat)

    def _reduced(
        self,
        unit: Numbers,
        activations: FloatArray,
        gathered: FloatArray,
        done: FloatArray,
        under_way: FloatArray,
        reducing: FloatArray | float = 0.0,
        *,
        early: bool = False,
    ) -> Iterator[tuple[Moment, KindBytes]]:
        """A unit's gradients beside their copy in the flat buffer; then that beside what it is reduced into."""
        rank, flat = self.rank, self._reducing(unit)
        resident = self.outer_resident if early else self.resident
        kept = np.where(rank.unit_grads | resident, 0.0, unit.whole * rank.grad)
        yield self._at(
            Moment.REDUCTION,
            activations,
            self._own(unit, early=early) + under_way,
            grads=done + kept,
            gathered=gathered,
            communication=flat + reducing,
        )
        alone = (self.zero == 0) | (unit.owned == unit.gathered)  # divided by a factor, in a tensor of its own
        quotient = np.where(alone & self.reduces, unit.whole * rank.grad, 0.0)
        summed = resident & (self.zero >= 2)  # into shards, in a tensor of its own until then
        quotient = quotient + np.where(summed & self.reduces, unit.owned * rank.grad, 0.0)
        yield self._at(
            Moment.REDUCTION,
            activations,
            under_way,
            grads=done + self._added(unit, resident),
            gathered=gathered,
            communication=flat + quotient + reducing,
        )

    def _second_block(self, left: FloatArray) -> tuple[Moment, KindBytes]:
        """The last one's gradients are being reduced."""
        unit, experts = self.rank.dense[self.first_kind], self.rank.experts[self.first_kind]
        index = self.first_kind if self.counts[self.first_kind] > 1 else self.chunk.order[-2]
        before = self.lives[self.first_kind]
        return self._block(
            index,
            left - before.saved,
            gathered=self._gathered_next(3.0) + self._freed(unit + experts) + self.outer_gathered,
            communication=self._reducing(unit, experts),
            done=self._taken_up(unit, experts),
            waiting=self._put_off(before.inputs, before.outputs),
        )

    def _gather_again(
        self, index: int, left: FloatArray, communication: FloatArray, done: FloatArray
    ) -> tuple[Moment, KindBytes]:
        """ZeRO 3: a block's weights are copied out of their flat buffer for its backward."""
        stay, under_way = self._head_grads()
        block, experts = self._flat(self.rank.dense[index]), self._expert_flat(index)
        units = np.maximum(2.0 * block + experts, self._whole(index) + experts)
        units = np.where(self.zero == 3, units, 0.0)
        return self._at(
            Moment.GATHER,
            left,
            np.where(self.zero == 3, under_way, -np.inf),
            grads=stay + done,
            gathered=units + self.outer_gathered,
            communication=communication + self._received(),
        )

    def _last_blocks(self) -> Iterator[tuple[Moment, KindBytes]]:
        """The last block, and with ZeRO 3 the one ahead of it: the last one that finds another gathered."""
        chunk, last = self.chunk, self.last_kind
        if (self.zero == 3).any():
            if self.num_blocks >= 3.0:
                ahead = last if self.counts[last] > 1 else chunk.order[1]
                moment, held = self._block_from_the_end((ahead, last), gathered=self._gathered_next(3.0))
                yield moment, replace(held, working=np.where(self.zero == 3, held.working, -np.inf))
            left = self.in_flight - chunk.saved + self.lives[last].saved
            flat = self._reducing(self.rank.dense[last], self.rank.experts[last])
            yield self._gather_again(last, left, flat, self._all_taken_up(last))
        yield self._block_from_the_end((last,), gathered=self.nothing)

    def _all_taken_up(self, *but: int) -> FloatArray:
        """What the backward of all blocks but these adds to the gradients that stay."""
        late, early = self.chunk.inner + self.chunk.experts * -1.0, self.chunk.experts
        for index in but:
            late, early = late + self.rank.dense[index] * -1.0, early + self.rank.experts[index] * -1.0
        return self._taken_up(late, early)

    def _block_from_the_end(self, blocks: tuple[int, ...], *, gathered: FloatArray) -> tuple[Moment, KindBytes]:
        """The backward of the first of ``blocks``, with which a chunk's backward ends."""
        rank, chunk = self.rank, self.chunk
        left, inputs, outputs = self.in_flight - chunk.saved, chunk.inputs, chunk.outputs
        others = chunk.inner
        for index in blocks:
            lives = self.lives[index]
            left, inputs, outputs = left + lives.saved, inputs - lives.inputs, outputs - lives.outputs
            others = others + rank.blocks[index].params * -1.0
        return self._block(
            blocks[0],
            left,
            gathered=gathered + self._freed(others) + self.outer_gathered,
            communication=self._reducing(rank.dense[blocks[0]], rank.experts[blocks[0]]),
            done=self._all_taken_up(*blocks),
            waiting=self._put_off(inputs, outputs),
        )

    def _outer_reduction(self) -> Iterator[tuple[Moment, KindBytes]]:
        """What stands outside the blocks comes last."""
        inner, experts = self.chunk.inner, self.chunk.experts
        inputs, outputs = self._put_off(self.chunk.inputs, self.chunk.outputs)
        left, done = self.in_flight - self.chunk.saved + inputs, self._taken_up(inner + experts * -1.0, experts)
        freed = self._freed(inner + self.outer)
        yield from self._reduced(self.outer, left, freed, done, outputs, early=True)
