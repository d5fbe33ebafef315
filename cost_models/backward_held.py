"""What a pipeline rank of our own executors holds around one backward: the parts of ``backward_moments``.

Gradients are *early* where no split of a backward puts them off: those outside the blocks and of experts.
"""

from __future__ import annotations

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


class Held:
    """Around the backward of one micro-batch on one chunk, from its loss to its last unit's reduction."""

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

    def _flat(self, unit: Numbers) -> FloatArray:
        return unit.gathered * self.rank.weight

    def _outer_gathered(self) -> FloatArray:
        """ZeRO 3: the outer unit stays from forward to backward, on every chunk with micro-batches in flight."""
        total = self.nothing
        for number, chunk in enumerate(self.rank.chunks):
            there = (self.zero == 3) & (self.state.held[..., number] > 0)
            total = total + np.where(there, self._flat(chunk.outer), 0.0)
        return total

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

    def _gathered_next(self, least: float) -> FloatArray:
        """ZeRO 3: flat buffers of the block before the one at hand, if the chunk has ``least`` blocks."""
        return np.where((self.zero == 3) & (self.num_blocks >= least), self._flats(self.first_kind), 0.0)

    def _head_grads(self) -> tuple[FloatArray, FloatArray]:
        """Gradients of the head's weights that stay, and those on their way."""
        if self.head is None:
            return self.nothing, self.nothing
        stay = np.where(self.rank.unit_grads | self.outer_resident, 0.0, self.head.weights)
        return stay, np.where(self.rank.unit_grads, self.head.weights, 0.0)

    def _received(self) -> FloatArray:
        """The gradient that a backward starts from, where it came from another rank."""
        return self.rank.hop if self.chunk.sends and not self.chunk.hands_over else self.nothing

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

    def _put_off(self, inputs: FloatArray, outputs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What waits of blocks whose backward is over, if it is the first half of a split one."""
        return (inputs, outputs) if self.split else (NOTHING, NOTHING)

    def _parted(self, lives: Lifetimes) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Activations, gradients that stay and the rest of a block's fullest moment."""
        backward, adding = (lives.deferring, lives.deferring) if self.split else (lives.backward, lives.adding)
        early = lives is self.head or self.split
        kept = self.rank.unit_grads | ~(self.outer_resident if early else self.resident)
        activations = np.where(kept, backward.activations, adding.activations)
        weights = np.where(kept & ~self.rank.unit_grads, backward.weights, 0.0)
        total = np.where(kept, backward.total, adding.total)
        return activations, weights, total - activations - weights
