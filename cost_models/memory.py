"""Bytes on one device at the peak: what every moment of a step holds, stage by stage, and the largest of them.

A moment's bytes are of kinds: what is resident between micro-batches (``residency``), the activations of the
micro-batches in flight (``saved`` times ``pipeline.held_microbatches``), and what exists for that moment alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import pipeline
from meshwright.cost_models.estimate import KINDS, MOMENTS, Moment
from meshwright.cost_models.framework import microbatches_per_round, num_microbatches
from meshwright.cost_models.held_blocks import held_bytes, late_moments
from meshwright.cost_models.memory_traits import HeldBlocks, UpdateTensors
from meshwright.cost_models.moments import fullest
from meshwright.cost_models.rank_bytes import KindBytes
from meshwright.cost_models.residency import Numbers, StateBytes, state_bytes
from meshwright.cost_models.saved import BlockBytes
from meshwright.cost_models.step_states import Pipeline, unlike_ranks
from meshwright.cost_models.strategy import IntArray
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import AttentionLayer, MlpLayer
from meshwright.profiler.model import BlockKind

FloatArray = NDArray[np.float64]

# micro-batches whose logits exist where embedding and head are split over all stages: forward and backward of the loss
# follow each other within two passes (arXiv 2411.05288, section 4)
SPLIT_HEAD = 2


def peak(blocks: list[BlockBytes], pipe: Pipeline, hop_bytes: FloatArray) -> dict[str, FloatArray]:
    """The largest moment of the fullest rank: bytes by kind, its ``stage`` and its ``moment`` (of ``MOMENTS``).

    ``unshared_bytes`` is what an allocator holds for other moments at that rank, where these do not share its blocks.
    ``blocks`` are those of ``pipe.kinds``; ``hop_bytes`` is what a stage hands to the next.
    """
    size = len(pipe.batch)
    best = {f"{name}_bytes": np.zeros(size) for name in KINDS}
    best |= {"stage": np.zeros(size), "moment": np.zeros(size), "unshared_bytes": np.zeros(size)}
    largest = np.full(size, -1.0)
    by_operator = pipe.framework.memory.by_operator
    for rank in unlike_ranks(pipe) if by_operator else range(pipe.counts.shape[0]):
        unshared = np.zeros(size)
        if by_operator:
            top, kinds, which = fullest(blocks, pipe, rank, hop_bytes)
            more = top > largest
            np.copyto(largest, top, where=more)
            for name, num_bytes in kinds.items():
                np.copyto(best[f"{name}_bytes"], num_bytes, where=more)
            np.copyto(best["stage"], float(rank), where=more)
            np.copyto(best["moment"], which, where=more)
            continue
        if pipe.framework.memory.blocks:
            moments, unshared = _late(blocks, pipe, rank, hop_bytes, pipe.framework.memory.blocks)
        else:
            moments = list(_moments(blocks, pipe, rank, hop_bytes).items())
            if not pipe.framework.memory.reuses_blocks:
                unshared = _unshared([held for _, held in moments])
        for moment, held in moments:
            total = held.total
            more = total > largest
            largest = np.where(more, total, largest)
            found = {f"{name}_bytes": getattr(held, name) for name in KINDS}
            found |= {"stage": np.full(size, float(rank)), "moment": np.full(size, float(MOMENTS.index(moment)))}
            found["unshared_bytes"] = unshared
            best = {name: np.where(more, found[name], best[name]) for name in best}
    return best


def _numbers(blocks: list[BlockBytes], pipe: Pipeline, rank: int) -> tuple[Numbers, Numbers, Numbers]:
    """Parameters of a pipeline rank: all, those of its largest decoder block, those of the largest unit outside."""
    on_rank = pipe.counts[rank].sum(axis=0)
    everything = largest = outer = Numbers.zeros(len(pipe.batch))
    for number, kind, block in zip(on_rank, pipe.kinds.kinds, blocks, strict=True):
        if not number:
            continue
        everything = everything + block.params * float(number)
        if kind.kind is BlockKind.DECODER:
            largest = largest.larger(block.params)
        elif pipe.framework.memory.outer_apart:
            outer = outer.larger(block.params)
        else:
            outer = outer + block.params
    return everything, largest, outer


def _moments(blocks: list[BlockBytes], pipe: Pipeline, rank: int, hop_bytes: FloatArray) -> dict[Moment, KindBytes]:
    """What a rank holds at each moment at which it may hold the most.

    ZeRO 3 holds two gathered units (the one in use and the one prefetched) beside the unit outside the blocks. The loss
    works beside the gradient of the head, a block's backward beside what it recomputes and, from ZeRO 1 on, two whole
    units that are being reduced.
    """
    batch, workload, recipe = pipe.batch, pipe.workload, pipe.workload.recipe
    numbers, largest, outer = _numbers(blocks, pipe, rank)
    zero = batch.zero_stage
    state = state_bytes(numbers, workload, pipe.framework, batch)
    loss, working, head = np.zeros(len(batch)), np.zeros(len(batch)), np.zeros(len(batch))
    for index, (kind, block) in enumerate(zip(pipe.kinds.kinds, blocks, strict=True)):
        share = min(float(pipe.counts[rank, :, index].sum()), 1.0)  # of a head split over stages
        if kind.kind is BlockKind.HEAD:
            loss, head = share * block.working, share * block.params.gathered
        else:
            working = np.maximum(working, share * block.working)
    weight, grad = float(recipe.params.num_bytes), float(recipe.grads.num_bytes)
    traits, sharded = pipe.framework.memory, zero >= 1
    units = outer.gathered + np.minimum(traits.units * largest.gathered, numbers.gathered - outer.gathered)
    unit = np.maximum(largest.gathered, outer.gathered)
    reducing = np.where(sharded, traits.units * largest.gathered * grad, 0.0)  # beside a block's backward
    made = np.where(sharded, head * weight, 0.0)  # beside the loss
    flattened = np.where((zero == 0) & (batch.dp * batch.cp > 1), unit * grad, 0.0)
    if traits.outer_apart:
        reducing = made = np.where(sharded, units * grad, 0.0)
    if traits.reduces_in_place:
        reducing, made, flattened = np.where(zero == 3, reducing, 0.0), np.zeros(len(batch)), np.zeros(len(batch))
    if traits.bucket_numbers:
        buckets = np.minimum(2.0 * traits.bucket_numbers, numbers.whole) * grad
        reducing = made = np.where(zero == 3, reducing, buckets)
    momentary = np.maximum(np.maximum(loss + made, working + reducing), flattened)
    working = np.minimum(np.maximum(loss, working), momentary)
    moments = {
        Moment.BACKWARD: KindBytes(
            params=state.params,
            grads=state.grads,
            optimizer=state.optimizer,
            activations=_activations(blocks, pipe, rank),
            gathered=state.gathered + np.where(zero == 3, units * weight, 0.0),
            working=working,
            communication=momentary - working + _received(pipe, rank, hop_bytes),
        )
    }
    if traits.builds_whole:
        nothing = np.zeros(len(batch))
        whole = np.where(zero == 3, numbers.whole * weight, 0.0)
        moments[Moment.BUILD] = KindBytes(whole, nothing, nothing, nothing, nothing, nothing, nothing)
    if traits.update:
        moments[Moment.UPDATE] = _update(traits.update, state, numbers.owned, workload, zero)
    return moments


def _late(
    blocks: list[BlockBytes], pipe: Pipeline, rank: int, hop_bytes: FloatArray, held_blocks: HeldBlocks
) -> tuple[list[tuple[Moment, KindBytes]], FloatArray]:
    """A rank's moments where gradients wait for the end of a backward, and what the allocator holds on top."""
    batch, numbers = pipe.batch, _numbers(blocks, pipe, rank)[0]
    on_rank = pipe.counts[rank].sum(axis=0)
    state = state_bytes(numbers, pipe.workload, pipe.framework, batch)
    activations = _activations(blocks, pipe, rank)
    at_hand, working, outputs = np.zeros(len(batch)), np.zeros(len(batch)), 0.0
    for number, kind, block in zip(on_rank, pipe.kinds.kinds, blocks, strict=True):
        at_hand = at_hand + number * block.saved
        working = np.maximum(working, min(float(number), 1.0) * block.working)
        outputs += float(number) * sum(isinstance(layer, AttentionLayer | MlpLayer) for layer in kind.layers)
    hidden_bytes = hop_bytes * np.where(batch.sequence_parallel, batch.tp, 1)
    loss = KindBytes(
        params=state.params,
        grads=state.grads,
        optimizer=state.optimizer,
        activations=activations,
        gathered=state.gathered,
        working=working,
        communication=_received(pipe, rank, hop_bytes),
    )
    flying = activations / np.maximum(at_hand, 1.0)
    first = Moment.LOSS if on_rank[-1] else Moment.BACKWARD
    moments = late_moments(pipe, first, loss, at_hand, numbers, hidden_bytes)
    at_loss = held_bytes(held_blocks, pipe, activations, numbers, hidden_bytes, outputs, flying)
    largest = np.max([held.total for _, held in moments], axis=0)
    on_top = np.maximum(moments[0][1].total + at_loss - largest, held_blocks.base_bytes)
    return moments, np.asarray(on_top)


def _update(
    tensors: UpdateTensors, state: StateBytes, owned: FloatArray, workload: Workload, zero: IntArray
) -> KindBytes:
    """The optimizer's step over all that a rank updates at once: float32 gradients and temporaries."""
    nothing = np.zeros(len(owned))
    copied = workload.recipe.grads.num_bytes < 4.0
    kept = np.where(tensors.frees_grads & copied & (zero < 3), 0.0, state.grads)
    return KindBytes(
        params=state.params,
        grads=kept,
        optimizer=state.optimizer,
        activations=nothing,
        gathered=state.gathered,
        working=4.0 * (tensors.temporaries + copied) * owned,
        communication=nothing,
    )


def _unshared(moments: list[KindBytes]) -> FloatArray:
    """What all moments but the largest hold for themselves: beside what is there in every one.

    Gradients that an update does without went through a flat tensor: their blocks and its own are there for nobody.
    """
    common = [np.minimum.reduce([getattr(held, name) for held in moments]) for name in ("params", "grads", "optimizer")]
    own = np.array([held.total for held in moments]) - sum(common)
    flat = np.maximum.reduce([held.grads for held in moments]) - common[1]
    return np.asarray(own.sum(axis=0) - own.max(axis=0) + flat)


def _activations(blocks: list[BlockBytes], pipe: Pipeline, rank: int) -> FloatArray:
    """Of all micro-batches in flight on a rank, and of those that wait for weight gradients: ``[num_configs]``."""
    pp, vpp = pipe.counts.shape[:2]
    count = num_microbatches(pipe.batch, pipe.workload)
    per_round = microbatches_per_round(pipe.batch, pipe.workload)
    most = np.zeros(len(pipe.batch))
    for flying, waiting in pipeline.holdings(pipe.schedule, pp, vpp, rank, count, per_round):
        traits = pipe.framework.memory
        flying = np.minimum(np.ceil(flying * traits.held_factor) + traits.held_more, count[:, None])
        total = np.zeros(len(pipe.batch))
        for index, block in enumerate(blocks):
            for chunk in np.flatnonzero(pipe.counts[rank, :, index]):
                share = pipe.counts[rank, chunk, index]
                held = np.minimum(flying[:, chunk], SPLIT_HEAD) if share < 1.0 else flying[:, chunk]
                total = total + share * (held * block.saved + waiting[:, chunk] * block.waiting)
        most = np.maximum(most, total)
    return most


def _received(pipe: Pipeline, rank: int, hop_bytes: FloatArray) -> FloatArray:
    """Receive buffers: one for each direction a chunk receives from, or for each micro-batch too."""
    pp, vpp = pipe.counts.shape[:2]
    if pp == 1:
        return np.zeros(len(pipe.batch))
    directions = 2 * vpp - (rank == 0) - (rank == pp - 1)
    count = num_microbatches(pipe.batch, pipe.workload)
    buffers = count if pipe.framework.receives_ahead else np.ones_like(count)
    return np.asarray(directions * buffers * hop_bytes)
