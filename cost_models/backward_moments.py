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

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.estimate import Moment
from meshwright.cost_models.framework import num_microbatches
from meshwright.cost_models.rank_bytes import KindBytes, Rank
from meshwright.cost_models.residency import Numbers
from meshwright.cost_models.schedules import Pass
from meshwright.cost_models.step_states import State
from meshwright.cost_models.strategy import Schedule
from meshwright.cost_models.tape import Lifetimes

FloatArray = NDArray[np.float64]

BoolArray = NDArray[np.bool_]

NOTHING = np.zeros(1)
NO_NUMBERS = Numbers.zeros(1)


class Backward:
    """The backward of one micro-batch on one chunk, from its loss to its last unit's reduction."""

    def __init__(self, rank: Rank, state: State) -> None:
        self.rank, self.state, self.zero, self.nothing = rank, state, rank.zero, rank.nothing
        counts = rank.pipe.counts[rank.rank]
        self.chunk = rank.chunks[state.chunk]
        self.outer, order = self.chunk.outer, self.chunk.order
        self.counts = counts[state.chunk]
        self.lives = rank.lives
        self.head = self.lives[-1] if self.counts[-1] else None
        self.first_kind, self.last_kind = order[-1], order[0]  # in the order of the backward
        self.num_blocks = float(sum(self.counts[index] for index in order))
        self.resident, self.outer_resident = state.resident[..., state.chunk], state.outer[..., state.chunk]
        self.last = state.last
        self.split = state.kind is Pass.INPUT_GRADIENT  # gradients of blocks' matrices are put off
        self.reduces = rank.sharded & ((self.zero >= 2) | self.last)
        first = ~self.outer_resident & (state.held[..., state.chunk] == 1.0)
        self.gathers = (self.zero == 3) | ((self.zero > 0) & first)  # in the forward of the micro-batch at hand
        self.in_flight, self.outer_gathered = self._in_flight(), self._outer_gathered()
        self.grads = self._resident_grads()
        self.sent_back = self._sent_back()
        self.carried = self._carried(state.chunk)
        others = (number for number in range(len(rank.chunks)) if number != state.chunk)
        self.elsewhere = sum((self._carried(number) for number in others), self.nothing)

    def _carried(self, number: int) -> FloatArray:
        """ZeRO 2 and 3: flat buffers of the gradients that a chunk's backward reduced last, there until its next."""
        rank, chunk = self.rank, self.rank.chunks[number]
        unit = chunk.outer if chunk.outer.whole.any() else rank.blocks[chunk.order[0]].params
        back, count = self.state.back[..., number], num_microbatches(rank.pipe.batch, rank.pipe.workload)
        return np.where((self.zero >= 2) & (back > 0) & (back < count), unit.gathered * rank.grad, 0.0)

    # -- what is there throughout -----------------------------------------------------------------------------------

    def _in_flight(self) -> FloatArray:
        """Activations of all micro-batches in flight, the one at hand whole."""
        rank, state, total = self.rank, self.state, self.nothing
        one_at_a_time = rank.pipe.schedule is Schedule.ONE_F_ONE_B
        for number, chunk in enumerate(rank.chunks):
            held, sent = state.held[..., number], state.sent[..., number]
            total = total + held * (chunk.saved + chunk.received)
            if rank.splits:
                total = total + state.waiting[..., number] * chunk.inputs
            if chunk.hands_over:
                total = total + rank.hop * held
            elif chunk.sends:  # 1f1b keeps the handle of its last send before the first backward
                handle = (sent > held) & (held > 1.0)
                total = total + rank.hop * (held + handle if one_at_a_time else sent)
        return total

    def _sent_back(self) -> FloatArray:
        """Gradients of hidden states: those sent whose handles are still there; and those that wait."""
        rank, state, total = self.rank, self.state, self.nothing
        one_at_a_time = rank.pipe.schedule is Schedule.ONE_F_ONE_B
        for number, chunk in enumerate(rank.chunks):
            back = state.back[..., number]
            if chunk.is_handed:  # the chunk before has not taken all of them up; that of its own backward is counted
                own = float(state.chunk == number - 1)
                total = total + rank.hop * np.maximum(back - state.back[..., number - 1] - own, 0.0)
            elif chunk.receives:
                total = total + rank.hop * (np.minimum(back, 1.0) if one_at_a_time else back)
            if rank.splits:
                total = total + state.waiting[..., number] * chunk.outputs
        return total

    def _resident_grads(self) -> FloatArray:
        total = self.nothing
        for number, chunk in enumerate(self.rank.chunks):
            total = total + np.where(self.state.resident[..., number], chunk.late_grads, 0.0)
            total = total + np.where(self.state.outer[..., number], chunk.early_grads, 0.0)
        return total

    def _taken_up(self, late: Numbers, early: Numbers) -> FloatArray:
        """What the backward of units adds to the gradients that stay; ``late`` are those that a split one puts off."""
        found = self._added(early, self.outer_resident)
        return found if self.split else found + self._added(late, self.resident)

    def _added(self, unit: Numbers, resident: BoolArray) -> FloatArray:
        rank = self.rank
        whole, owned = unit.whole * rank.grad, unit.owned * rank.reduced_grad
        reduced = np.where(self.zero == 0, unit.whole * rank.reduced_grad, owned)
        ends = self.last & rank.sharded & (self.zero <= 1)
        waits = (self.zero <= 1) & ~ends
        return np.asarray(np.where(resident, np.where(ends, reduced - whole, 0.0), np.where(waits, whole, reduced)))

    def _at(
        self,
        moment: Moment,
        activations: FloatArray,
        working: FloatArray,
        *,
        grads: FloatArray | float = 0.0,
        gathered: FloatArray | float = 0.0,
        communication: FloatArray | float = 0.0,
    ) -> tuple[Moment, KindBytes]:
        rank = self.rank
        return moment, KindBytes(
            params=rank.params,
            grads=self.grads + grads,
            optimizer=rank.optimizer,
            activations=activations,
            gathered=rank.gathered + gathered,
            working=working + self.sent_back,
            communication=self.elsewhere + communication,
        )

    # -- moments ----------------------------------------------------------------------------------------------------

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
            yield from self._last_block()
        if self.outer.whole.any():
            yield from self._outer_reduction()

    def _weight_gradients(self) -> tuple[Moment, KindBytes]:
        """All gradients of matrices of a stage at once, before they are added to those of earlier micro-batches."""
        rank, inner = self.rank, self.chunk.inner.whole - self.chunk.experts.whole
        own = np.where(rank.unit_grads, inner * rank.weight, 0.0) - self.chunk.outputs
        grads = np.where(self.resident, 0.0, inner * rank.grad)
        return self._at(Moment.WEIGHTS, self.in_flight - self.chunk.inputs, own, grads=grads)

    def _flat(self, unit: Numbers) -> FloatArray:
        return unit.gathered * self.rank.weight

    def _outer_gathered(self) -> FloatArray:
        """ZeRO 3: the outer unit stays from forward to backward, on every chunk with micro-batches in flight."""
        total = self.nothing
        for number, chunk in enumerate(self.rank.chunks):
            there = (self.zero == 3) & (self.state.held[..., number] > 0)
            total = total + np.where(there, self._flat(chunk.outer), 0.0)
        return total

    def _gather(self, left: FloatArray) -> tuple[Moment, KindBytes]:
        """The last unit's weights are copied out of their flat buffer, that of the unit before still being there.

        That unit is the last block, or its experts.
        """
        rank, lives = self.rank, self.lives[self.first_kind]
        block, experts = self._flat(rank.dense[self.first_kind]), self._expert_flat(self.first_kind)
        before = self._flat(self.outer) if self.num_blocks < 2.0 and not experts.any() else block
        unit = np.where(experts > 0.0, experts, block)
        whole = self._whole(self.first_kind)
        gathered = np.where(self.gathers, before + unit + np.where(self.zero == 3, whole, 0.0), 0.0)
        saved = lives.saved + (self.nothing if self.head is None else self.head.saved)
        return self._at(
            Moment.GATHER,
            left - saved,
            np.where(self.state.after_forward, rank.hop, -np.inf),
            gathered=gathered + self.outer_gathered,
            communication=self.carried,
        )

    def _flats(self, index: int) -> FloatArray:
        """Flat buffers of a block's units."""
        return self._flat(self.rank.dense[index]) + self._expert_flat(index)

    def _expert_flat(self, index: int) -> FloatArray:
        """That of a block's experts; one rank alone gathers nothing."""
        return np.where(self.rank.shares_experts, self._flat(self.rank.experts[index]), 0.0)

    def _whole(self, index: int) -> FloatArray:
        """Weights of a block, gathered and copied."""
        return self._flat(self.rank.dense[index]) + self.rank.experts[index].whole * self.rank.weight

    def _last_gathered(self) -> FloatArray:
        """The flat buffer of the last unit gathered, there until the forward is over."""
        experts = self._expert_flat(self.first_kind)
        return np.where(experts > 0.0, experts, self._flat(self.rank.dense[self.first_kind]))

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

    def _parted(self, lives: Lifetimes) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Activations, gradients that stay and the rest of a block's fullest moment."""
        backward, adding = (lives.deferring, lives.deferring) if self.split else (lives.backward, lives.adding)
        early = lives is self.head or self.split
        kept = self.rank.unit_grads | ~(self.outer_resident if early else self.resident)
        activations = np.where(kept, backward.activations, adding.activations)
        weights = np.where(kept & ~self.rank.unit_grads, backward.weights, 0.0)
        total = np.where(kept, backward.total, adding.total)
        return activations, weights, total - activations - weights

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

    def _head_grads(self) -> tuple[FloatArray, FloatArray]:
        """Gradients of the head's weights that stay, and those on their way."""
        if self.head is None:
            return self.nothing, self.nothing
        stay = np.where(self.rank.unit_grads | self.outer_resident, 0.0, self.head.weights)
        return stay, np.where(self.rank.unit_grads, self.head.weights, 0.0)

    def _received(self) -> FloatArray:
        """The gradient that a backward starts from, where it came from another rank."""
        return self.rank.hop if self.chunk.sends and not self.chunk.hands_over else self.nothing

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

    def _gathered_next(self, least: float) -> FloatArray:
        """ZeRO 3: flat buffers of the block before the one at hand, if the chunk has ``least`` blocks."""
        return np.where((self.zero == 3) & (self.num_blocks >= least), self._flats(self.first_kind), 0.0)

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

    def _freed(self, units: Numbers) -> FloatArray:
        """Whole weights that are gone after the last backward (negative), where they stay until then."""
        gone = self.last & self.rank.sharded & (self.zero < 3)
        return np.where(gone, -units.gathered * self.rank.weight, 0.0)

    def _reducing(self, *units: Numbers) -> FloatArray:
        """Flat buffers of gradients, there until the next unit's."""
        numbers = sum((unit.gathered for unit in units), self.nothing)
        return np.where(self.reduces, numbers * self.rank.grad, 0.0)

    def _own(self, unit: Numbers, *, early: bool = False) -> FloatArray:
        """A unit's gradients in the compute dtype, until they are reduced or in whole ones."""
        summed = (self.outer_resident if early else self.resident) & (self.zero <= 1)
        return np.where(self.rank.unit_grads & ~summed, unit.whole * self.rank.weight, 0.0)

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

    def _put_off(self, inputs: FloatArray, outputs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What waits of blocks whose backward is over, if it is the first half of a split one."""
        return (inputs, outputs) if self.split else (NOTHING, NOTHING)

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
            under_way,
            grads=stay + done,
            gathered=units + self.outer_gathered,
            communication=communication + self._received(),
        )

    def _last_block(self) -> Iterator[tuple[Moment, KindBytes]]:
        rank, chunk, own = self.rank, self.chunk, self.lives[self.last_kind]
        unit, its_experts = rank.dense[self.last_kind], rank.experts[self.last_kind]
        experts = chunk.experts + its_experts * -1.0  # of the others
        others = chunk.inner + (chunk.experts + unit) * -1.0
        left = self.in_flight - chunk.saved + own.saved
        done, flat = self._taken_up(others, experts), self._reducing(unit, its_experts)
        waiting = self._put_off(chunk.inputs - own.inputs, chunk.outputs - own.outputs)
        gathered = self._freed(others + experts) + self.outer_gathered
        yield self._block(self.last_kind, left, gathered=gathered, communication=flat, done=done, waiting=waiting)
        if (self.zero == 3).any():
            yield self._gather_again(self.last_kind, left, flat, done)

    def _outer_reduction(self) -> Iterator[tuple[Moment, KindBytes]]:
        """What stands outside the blocks comes last."""
        inner, experts = self.chunk.inner, self.chunk.experts
        inputs, outputs = self._put_off(self.chunk.inputs, self.chunk.outputs)
        left, done = self.in_flight - self.chunk.saved + inputs, self._taken_up(inner + experts * -1.0, experts)
        freed = self._freed(inner + self.outer)
        yield from self._reduced(self.outer, left, freed, done, outputs, early=True)
