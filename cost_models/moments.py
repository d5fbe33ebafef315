"""What a rank of our own executors holds at each moment of a step at which it may hold the most, tensor by tensor.

Read off ``executors`` and torch 2.13's FSDP2 (``torch/distributed/fsdp/_fully_shard``) and pipelines
(``torch/distributed/pipelining``). A stage's *units* are its decoder blocks and, together, what stands outside them
(the *outer* unit: embedding, final norm, head). A unit

* is gathered into one flat buffer, then copied into its tensors; the buffer of the last one gathered is there until the
  next is copied or the stage's forward is over (``_fsdp_param_group.py: wait_for_unshard``). ZeRO 3 gathers a block
  again for its backward, and by then the one before it into a flat buffer, too;
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
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import pipeline
from meshwright.cost_models.blocks import BlockKinds
from meshwright.cost_models.estimate import Moment
from meshwright.cost_models.framework import Framework, microbatches_per_round, num_microbatches
from meshwright.cost_models.residency import Numbers, state_bytes
from meshwright.cost_models.saved import BlockBytes
from meshwright.cost_models.schedules import Pass, rank_actions, stage_indices
from meshwright.cost_models.strategy import SPLIT_BACKWARD, ConfigBatch, IntArray, Schedule
from meshwright.cost_models.tape import Lifetimes
from meshwright.cost_models.workload import Workload
from meshwright.profiler.model import BlockKind

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


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


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Configs of one pipeline shape: ``counts`` ``[pp, vpp, num_kinds]`` blocks of ``kinds`` on each chunk."""

    kinds: BlockKinds
    counts: FloatArray
    schedule: Schedule
    workload: Workload
    framework: Framework
    batch: ConfigBatch


@dataclass(frozen=True, slots=True)
class State:
    """Where in the step a rank is when a chunk's backward starts; arrays ``[num_configs, vpp]`` or ``[num_configs]``.

    ``held`` micro-batches of each chunk are in flight, the one at hand among them; ``waiting`` ones wait for their
    gradients of matrices; ``sent`` have gone through, ``back`` of them backward too; ``resident`` chunks have gradients
    of earlier micro-batches; it is a chunk's ``last`` backward of the step.
    """

    chunk: int
    held: FloatArray
    waiting: FloatArray
    sent: FloatArray
    back: FloatArray
    resident: BoolArray
    last: BoolArray
    only_weights: bool = False  # it is the second half of a split backward


def states(pipe: Pipeline, rank: int) -> list[State]:
    """The states of a rank, none of which may be the fullest for every config."""
    batch, (pp, vpp) = pipe.batch, pipe.counts.shape[:2]
    count = num_microbatches(batch, pipe.workload)
    per_round = microbatches_per_round(batch, pipe.workload)
    whole = np.repeat(count[:, None], vpp, axis=1).astype(np.float64)
    nothing, several = np.zeros_like(whole), (count > 1)[:, None]
    if pipe.schedule in SPLIT_BACKWARD:
        return _split_states(pipe, rank, count)
    if pipe.schedule is Schedule.INTERLEAVED:
        return _interleaved_states(pipe, rank, count, per_round)
    most = pipeline.held_microbatches(pipe.schedule, pp, vpp, rank, count, per_round)
    later = np.clip(np.minimum(most, whole - 1.0), 1.0, None)
    one = np.ones_like(whole)
    first_back = np.minimum(whole - 1.0, 1.0)
    first = State(0, most, nothing, most, nothing, several & False, count == 1)
    last = State(0, one, nothing, whole, whole - 1.0, several, count >= 1)
    if pp == 1:
        return [first, last]
    return [first, State(0, later, nothing, whole, first_back, several, later[:, 0] == 1.0), last]


def _split_states(pipe: Pipeline, rank: int, count: IntArray) -> list[State]:
    """Ahead of the backwards and weight gradients of the lists of actions at which more is there than at others."""
    pp, vpp = pipe.counts.shape[:2]
    few = np.minimum(count, 3 * pp)  # the warm-up is over by then
    counts, group = np.unique(few, return_inverse=True)
    played = [_played(pipe.schedule, pp, vpp, rank, int(number)) for number in counts]
    found = []
    for chunk, only_weights in sorted({key for states_of in played for key in states_of}):
        lists = [states_of.get((chunk, only_weights), ()) for states_of in played]
        for number in range(max(map(len, lists))):
            nothing = ((0.0,) * vpp,) * 5
            chosen = np.array([of[min(number, len(of) - 1)] if of else nothing for of in lists])[group]
            held, waiting, sent, back, resident = chosen.transpose(1, 0, 2)
            rest = np.where(back.sum(axis=1) >= pp, count - few, 0)[:, None]  # of the steady state that was left out
            found.append(
                State(
                    chunk, held, waiting, sent + rest, back + rest, resident > 0, count == 1, only_weights=only_weights
                )
            )
    return found


_Counts = tuple[float, ...]  # of each chunk


@lru_cache(maxsize=1024)
def _played(
    schedule: Schedule, pp: int, vpp: int, rank: int, microbatches: int
) -> dict[tuple[int, bool], tuple[tuple[_Counts, ...], ...]]:
    """(held, waiting, sent, back, resident) ahead of a chunk's backwards, or of its weight gradients alone."""
    chunk_of = {int(stage): chunk for chunk, stage in enumerate(stage_indices(schedule, pp, vpp)[rank])}
    held, waiting, sent, back, resident = ([0.0] * vpp for _ in range(5))
    found: dict[tuple[int, bool], dict[tuple[_Counts, ...], None]] = {}
    for action in rank_actions(schedule, pp, vpp, microbatches)[rank]:
        chunk, kind = chunk_of[action.stage], action.kind
        if kind is Pass.FORWARD:
            held[chunk] += 1.0
            sent[chunk] += 1.0
            continue
        now = tuple(tuple(counts) for counts in (held, waiting, sent, back, resident))
        found.setdefault((chunk, kind is Pass.WEIGHT_GRADIENT), {})[now] = None
        if kind is Pass.WEIGHT_GRADIENT:
            waiting[chunk] -= 1.0
        else:
            held[chunk] -= 1.0
            back[chunk] += 1.0
            waiting[chunk] += float(kind is Pass.INPUT_GRADIENT)
        resident[chunk] = 1.0
    return {key: _largest(tuple(states_of)) for key, states_of in found.items()}


def _largest(unlike: tuple[tuple[_Counts, ...], ...]) -> tuple[tuple[_Counts, ...], ...]:
    """Those states than which no other has more of all."""
    numbers = np.array(unlike).reshape(len(unlike), -1)
    more = (numbers[:, None] >= numbers[None]).all(axis=2)
    np.fill_diagonal(more, False)
    return tuple(one for one, less in zip(unlike, more.any(axis=0), strict=True) if not less)


def _interleaved_states(pipe: Pipeline, rank: int, count: IntArray, per_round: IntArray) -> list[State]:
    """At the first backward; when the last forward has run; at the last backward."""
    pp, vpp = pipe.counts.shape[:2]
    held = pipeline.held_microbatches(pipe.schedule, pp, vpp, rank, count, per_round)
    whole = np.repeat(count[:, None], vpp, axis=1).astype(np.float64)
    nothing = np.zeros_like(whole)
    done = vpp * count - held.sum(axis=1)  # backwards before the last forward
    turns, left = np.divmod(done, vpp * per_round)
    size = np.asarray(per_round, dtype=np.float64)[:, None]
    back = turns[:, None] * size + np.clip(left[:, None] - np.arange(vpp)[::-1] * size, 0.0, size)
    last = np.zeros_like(whole)
    last[:, 0] = 1.0
    few = count == 1
    found = [State(vpp - 1, held, nothing, held, nothing, nothing > 0, few)]
    for chunk in {0, vpp - 1}:
        found.append(State(chunk, np.maximum(whole - back, last), nothing, whole, back, back > 0, few))
    found.append(State(0, last, nothing, whole, whole - last, whole > 1, count >= 1))
    return found


def unlike_ranks(pipe: Pipeline) -> list[int]:
    """Ranks of which one may hold the most.

    Of those with the same blocks it is the first: it has the most micro-batches in flight. Where backward is split
    later ones have more waiting for their weight gradients.
    """
    pp = pipe.counts.shape[0]
    if pipe.schedule in SPLIT_BACKWARD:
        return list(range(pp))
    _, first = np.unique(pipe.counts.reshape(pp, -1), axis=0, return_index=True)
    return sorted(first.tolist())


def rank_moments(
    blocks: list[BlockBytes], pipe: Pipeline, rank: int, hop_bytes: FloatArray
) -> list[tuple[Moment, KindBytes]]:
    """All moments of a rank; ``hop_bytes`` is what a stage hands to the next."""
    held = _Rank(blocks, pipe, rank, hop_bytes)
    return [moment for state in states(pipe, rank) for moment in _Backward(held, state).moments()]


class _Rank:
    """One pipeline rank: its chunks, what it holds throughout, and its moments."""

    def __init__(self, blocks: list[BlockBytes], pipe: Pipeline, rank: int, hop_bytes: FloatArray) -> None:
        self.blocks, self.pipe, self.rank, self.hop = blocks, pipe, rank, hop_bytes
        batch, recipe = pipe.batch, pipe.workload.recipe
        self.zero, self.nothing = batch.zero_stage, np.zeros(len(batch))
        self.weight, self.grad = float(recipe.params.num_bytes), float(recipe.grads.num_bytes)
        self.casts = recipe.has_master and recipe.grads is not recipe.compute
        self.sharded = (self.zero > 0) | recipe.has_master  # by FSDP2, over one rank at ZeRO 0
        # gradients of a unit are tensors of their own until they are reduced or added to whole ones
        self.unit_grads = self.sharded & ((self.zero >= 2) | self.casts)
        counts = pipe.counts[rank]
        self.chunks = [self._numbers(counts[chunk]) for chunk in range(len(counts))]
        everything = sum((outer + inner for outer, inner, _ in self.chunks), Numbers.zeros(len(batch)))
        state = state_bytes(everything, pipe.workload, pipe.framework, batch)
        self.params, self.optimizer, self.gathered = state.params, state.optimizer, state.gathered

    def _numbers(self, counts: FloatArray) -> tuple[Numbers, Numbers, list[int]]:
        """Parameters of a chunk outside its blocks and in them, and the kinds of its blocks in order."""
        zeros = Numbers.zeros(len(self.pipe.batch))
        outer, inner, order = zeros, zeros, []
        for index, kind in enumerate(self.pipe.kinds.kinds):
            if not counts[index]:
                continue
            numbers = self.blocks[index].params * float(counts[index])
            if kind.kind is BlockKind.DECODER:
                inner, order = inner + numbers, [*order, index]
            else:
                outer = outer + numbers
        return outer, inner, order


class _Backward:
    """The backward of one micro-batch on one chunk, from its loss to its last unit's reduction."""

    def __init__(self, rank: _Rank, state: State) -> None:
        self.rank, self.state, self.zero, self.nothing = rank, state, rank.zero, rank.nothing
        counts = rank.pipe.counts[rank.rank]
        self.outer, _, order = rank.chunks[state.chunk]
        self.counts = counts[state.chunk]
        self.lives = [_lifetimes(block) for block in rank.blocks]
        self.head = self.lives[-1] if self.counts[-1] else None
        self.first_kind, self.last_kind = order[-1], order[0]  # in the order of the backward
        self.num_blocks = float(sum(self.counts[index] for index in order))
        self.resident = state.resident[:, state.chunk]
        self.last = np.broadcast_to(np.asarray(state.last), self.nothing.shape)
        self.reduces = rank.sharded & ((self.zero >= 2) | self.last)
        self.splits = rank.pipe.schedule in SPLIT_BACKWARD
        self.in_flight = self._in_flight()
        self.grads = self._resident_grads()
        self.sent_back = self._sent_back()
        carried = self.outer if self.outer.whole.any() else rank.blocks[self.last_kind].params
        self.carried = np.where((self.zero >= 2) & self.resident, carried.gathered * rank.grad, 0.0)

    # -- what is there throughout -----------------------------------------------------------------------------------

    def _in_flight(self) -> FloatArray:
        """Activations of all micro-batches in flight, the one at hand whole."""
        rank, state, total = self.rank, self.state, self.nothing
        counts, one_at_a_time = rank.pipe.counts[rank.rank], rank.pipe.schedule is Schedule.ONE_F_ONE_B
        for chunk in range(len(counts)):
            held = state.held[:, chunk]
            for index in np.flatnonzero(counts[chunk]):
                lives = self.lives[index]
                saved = held * lives.saved + state.waiting[:, chunk] * lives.inputs
                total = total + counts[chunk, index] * saved
            if len(rank.pipe.counts) == 1:
                continue
            if not counts[chunk, 0]:  # what it received, where its first block does not save that anyway
                first = self.lives[rank.chunks[chunk][2][0]]
                total = total + held * rank.hop * (1.0 - first.keeps_input)
            if not counts[chunk, -1]:  # 1f1b keeps the handle of its last send before the first backward
                handle = np.where((state.sent > state.held) & (state.held > 1.0), 1.0, 0.0)[:, chunk]
                total = total + rank.hop * (held + handle if one_at_a_time else state.sent[:, chunk])
        return total

    def _sent_back(self) -> FloatArray:
        """Gradients of hidden states: those sent whose handles are still there; and those that wait."""
        rank, state, total = self.rank, self.state, self.nothing
        counts, one_at_a_time = rank.pipe.counts[rank.rank], rank.pipe.schedule is Schedule.ONE_F_ONE_B
        for chunk in range(len(counts)):
            if not counts[chunk, 0]:
                back = state.back[:, chunk]
                total = total + rank.hop * (np.minimum(back, 1.0) if one_at_a_time else back)
            for index in np.flatnonzero(counts[chunk]):
                total = total + counts[chunk, index] * state.waiting[:, chunk] * self.lives[index].outputs
        return total

    def _resident_grads(self) -> FloatArray:
        total = self.nothing
        for chunk, (outer, inner, _) in enumerate(self.rank.chunks):
            numbers = outer + inner
            held = np.where(self.zero <= 1, numbers.whole, numbers.owned) * self.rank.grad
            total = total + np.where(self.state.resident[:, chunk], held, 0.0)
        return total

    def _taken_up(self, unit: Numbers) -> FloatArray:
        """What a unit's backward adds to the gradients that stay."""
        whole, owned, grad = unit.whole, unit.owned, self.rank.grad
        shrinks = np.where((self.zero == 1) & self.last & self.rank.sharded, owned - whole, 0.0)
        stays = (self.zero == 0) | ((self.zero == 1) & ~self.last)
        return np.asarray(np.where(self.resident, shrinks, np.where(stays, whole, owned)) * grad)

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
            communication=self.nothing + communication,
        )

    # -- moments ----------------------------------------------------------------------------------------------------

    def moments(self) -> Iterator[tuple[Moment, KindBytes]]:
        left = self.in_flight
        if self.state.only_weights:
            yield self._weight_gradients()
            return
        if self.head is not None:
            yield self._loss(self.head)
            yield self._loss_backward(self.head)
            left = left - self.head.saved
        yield self._first_block(left)
        yield from self._reduction(left - self.lives[self.first_kind].saved)
        if self.num_blocks >= 2.0:
            yield self._second_block(left)
            yield self._last_block()
        if self.outer.whole.any():
            yield from self._outer_reduction()

    def _on_chunk(self, name: str) -> FloatArray:
        """Of all blocks of the chunk."""
        present = np.flatnonzero(self.counts)
        return sum((self.counts[index] * getattr(self.lives[index], name) for index in present), self.nothing)

    def _weight_gradients(self) -> tuple[Moment, KindBytes]:
        """All gradients of matrices of a stage at once, before they are added to those of earlier micro-batches."""
        rank, chunk = self.rank, self.state.chunk
        inner = rank.chunks[chunk][1].whole
        own = np.where(rank.unit_grads, inner * rank.weight, 0.0) - self._on_chunk("outputs")
        grads = np.where(self.resident, 0.0, inner * rank.grad)
        return self._at(Moment.WEIGHTS, self.in_flight - self._on_chunk("inputs"), own, grads=grads)

    def _flat(self, unit: Numbers) -> FloatArray:
        return unit.gathered * self.rank.weight

    def _outer_gathered(self) -> FloatArray:
        """ZeRO 3: the outer unit stays from forward to backward."""
        return np.where(self.zero == 3, self._flat(self.outer), 0.0)

    def _loss(self, head: Lifetimes) -> tuple[Moment, KindBytes]:
        """Logits and their loss, at the end of forward, with the flat buffer of the last block gathered."""
        unit = self.rank.blocks[self.first_kind].params
        fresh = (self.zero == 3) | ((self.zero > 0) & ~self.resident)
        gathered = np.where(fresh, self._flat(unit), 0.0) + self._outer_gathered()
        return self._at(
            Moment.LOSS, self.in_flight, head.forward - head.saved, gathered=gathered, communication=self.carried
        )

    def _parted(self, lives: Lifetimes) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Activations, gradients that stay and the rest of a block's fullest moment."""
        backward, adding = (lives.deferring, lives.deferring) if self.splits else (lives.backward, lives.adding)
        kept = self.rank.unit_grads | ~self.resident
        activations = np.where(kept, backward.activations, adding.activations)
        weights = np.where(kept & ~self.rank.unit_grads, backward.weights, 0.0)
        total = np.where(kept, backward.total, adding.total)
        return activations, weights, total - activations - weights

    def _loss_backward(self, head: Lifetimes) -> tuple[Moment, KindBytes]:
        """The same backward; ZeRO 3 gathers the last block already."""
        unit = self.rank.blocks[self.first_kind].params
        activations, grads, working = self._parted(head)
        gathered = np.where(self.zero == 3, self._flat(unit), 0.0) + self._outer_gathered()
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
        stay = np.where(self.rank.unit_grads | self.resident, 0.0, self.head.weights)
        return stay, np.where(self.rank.unit_grads, self.head.weights, 0.0)

    def _block(
        self, index: int, left: FloatArray, *, gathered: FloatArray, communication: FloatArray, done: FloatArray
    ) -> tuple[Moment, KindBytes]:
        lives = self.lives[index]
        activations, grads, working = self._parted(lives)
        stay, under_way = self._head_grads()
        received = self.nothing if self.head is not None else self.rank.hop  # the gradient it starts from
        return self._at(
            Moment.BACKWARD,
            left - lives.saved + activations,
            working + under_way - received,
            grads=grads + stay + done,
            gathered=gathered,
            communication=communication + received,
        )

    def _first_block(self, left: FloatArray) -> tuple[Moment, KindBytes]:
        unit = self.rank.blocks[self.first_kind].params
        units = 2.0 if self.num_blocks >= 2.0 else 1.0  # its own, and the flat buffer of the one before
        gathered = np.where(self.zero == 3, units * self._flat(unit), 0.0) + self._outer_gathered()
        return self._block(self.first_kind, left, gathered=gathered, communication=self.carried, done=self.nothing)

    def _reduction(self, left: FloatArray) -> Iterator[tuple[Moment, KindBytes]]:
        """The first block's gradients are copied into a flat buffer and reduced."""
        rank, unit = self.rank, self.rank.blocks[self.first_kind].params
        stay, under_way = self._head_grads()
        units = 1.0 if self.num_blocks >= 2.0 else 0.0
        freed = np.where(self.last & rank.sharded, -self._flat(unit), 0.0)
        gathered = np.where(self.zero == 3, units * self._flat(unit), freed) + self._outer_gathered()
        yield from self._reduced(unit, left, gathered, stay, under_way)

    def _reduced(
        self, unit: Numbers, activations: FloatArray, gathered: FloatArray, done: FloatArray, under_way: FloatArray
    ) -> Iterator[tuple[Moment, KindBytes]]:
        """A unit's gradients beside their copy in the flat buffer; then that beside what it is reduced into."""
        rank, flat = self.rank, unit.gathered * self.rank.grad
        summed = self.resident & (self.zero <= 1)  # in the whole gradients
        own = np.where(rank.unit_grads & ~summed, unit.whole * rank.weight, 0.0)
        kept = np.where(rank.unit_grads | self.resident, 0.0, unit.whole * rank.grad)
        yield self._at(
            Moment.REDUCTION,
            activations,
            own + under_way,
            grads=done + kept,
            gathered=gathered,
            communication=np.where(self.reduces, flat, 0.0),
        )
        quotient = np.where(self.zero == 0, unit.whole * rank.grad, 0.0)
        yield self._at(
            Moment.REDUCTION,
            activations,
            under_way,
            grads=done + self._taken_up(unit),
            gathered=gathered,
            communication=np.where(self.reduces, flat + quotient, 0.0),
        )

    def _second_block(self, left: FloatArray) -> tuple[Moment, KindBytes]:
        """The last one's gradients are being reduced."""
        unit = self.rank.blocks[self.first_kind].params
        units = 2.0 if self.num_blocks >= 3.0 else 1.0
        freed = np.where(self.last & self.rank.sharded, -self._flat(unit), 0.0)
        gathered = np.where(self.zero == 3, units * self._flat(unit), freed) + self._outer_gathered()
        index = self.first_kind if self.counts[self.first_kind] > 1 else self.rank.chunks[self.state.chunk][2][-2]
        return self._block(
            index,
            left - self.lives[self.first_kind].saved,
            gathered=gathered,
            communication=np.where(self.reduces, unit.gathered * self.rank.grad, 0.0),
            done=self._taken_up(unit),
        )

    def _others(self) -> Numbers:
        """All blocks of the chunk but the one whose backward is last."""
        return self.rank.chunks[self.state.chunk][1] + self.rank.blocks[self.last_kind].params * -1.0

    def _last_block(self) -> tuple[Moment, KindBytes]:
        rank, unit, others = self.rank, self.rank.blocks[self.last_kind].params, self._others()
        freed = np.where(self.last & rank.sharded, -self._flat(others), 0.0)
        gathered = np.where(self.zero == 3, self._flat(unit), freed) + self._outer_gathered()
        return self._block(
            self.last_kind,
            self.in_flight - self._on_chunk("saved") + self.lives[self.last_kind].saved,
            gathered=gathered,
            communication=np.where(self.reduces, unit.gathered * rank.grad, 0.0),
            done=self._taken_up(others),
        )

    def _outer_reduction(self) -> Iterator[tuple[Moment, KindBytes]]:
        """What stands outside the blocks comes last."""
        rank, inner = self.rank, self.rank.chunks[self.state.chunk][1]
        freed = np.where(self.last & rank.sharded & (self.zero < 3), -self._flat(inner + self.outer), 0.0)
        left = self.in_flight - self._on_chunk("saved")
        yield from self._reduced(self.outer, left, freed, self._taken_up(inner), self.nothing)


def _lifetimes(block: BlockBytes) -> Lifetimes:
    assert block.lifetimes is not None
    return block.lifetimes
