"""Bytes on one device at the peak: what every moment of a step holds, stage by stage, and the largest of them.

A moment's bytes are of kinds: what is resident between micro-batches (``residency``), the activations of the
micro-batches in flight (``saved`` times ``pipeline.held_microbatches``), and what exists for that moment alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import pipeline
from meshwright.cost_models.blocks import BlockKinds
from meshwright.cost_models.estimate import KINDS, MOMENTS, Moment
from meshwright.cost_models.framework import Framework, microbatches_per_round, num_microbatches
from meshwright.cost_models.memory_traits import UpdateTensors
from meshwright.cost_models.residency import Numbers, StateBytes, state_bytes
from meshwright.cost_models.saved import BlockBytes
from meshwright.cost_models.strategy import ConfigBatch, IntArray, Schedule
from meshwright.cost_models.workload import Workload
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


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Configs of one pipeline shape: ``counts`` ``[pp, vpp, num_kinds]`` blocks of ``kinds`` on each chunk."""

    kinds: BlockKinds
    counts: FloatArray
    schedule: Schedule
    workload: Workload
    framework: Framework
    batch: ConfigBatch


def peak(blocks: list[BlockBytes], pipe: Pipeline, hop_bytes: FloatArray) -> dict[str, FloatArray]:
    """The largest moment of the fullest rank: bytes by kind, its ``stage`` and its ``moment`` (of ``MOMENTS``).

    ``unshared_bytes`` is what an allocator holds for other moments at that rank, where these do not share its blocks.
    ``blocks`` are those of ``pipe.kinds``; ``hop_bytes`` is what a stage hands to the next.
    """
    size = len(pipe.batch)
    best = {f"{name}_bytes": np.zeros(size) for name in KINDS}
    best |= {"stage": np.zeros(size), "moment": np.zeros(size), "unshared_bytes": np.zeros(size)}
    largest = np.full(size, -1.0)
    for rank in range(pipe.counts.shape[0]):
        moments = _moments(blocks, pipe, rank, hop_bytes)
        unshared = np.zeros(size) if pipe.framework.memory.reuses_blocks else _unshared(list(moments.values()))
        for moment, held in moments.items():
            total = held.total
            more = total > largest
            largest = np.where(more, total, largest)
            found = {f"{name}_bytes": getattr(held, name) for name in KINDS}
            found |= {"stage": np.full(size, float(rank)), "moment": np.full(size, float(MOMENTS.index(moment)))}
            found["unshared_bytes"] = unshared
            best = {name: np.where(more, found[name], best[name]) for name in best}
    return best


def _numbers(blocks: list[BlockBytes], pipe: Pipeline, rank: int) -> tuple[Numbers, Numbers, Numbers]:
    """Parameters of a pipeline rank: all, those of its largest decoder block, those outside blocks."""
    on_rank = pipe.counts[rank].sum(axis=0)
    everything = largest = outer = Numbers.zeros(len(pipe.batch))
    for number, kind, block in zip(on_rank, pipe.kinds.kinds, blocks, strict=True):
        if not number:
            continue
        everything = everything + block.params * float(number)
        if kind.kind is BlockKind.DECODER:
            largest = largest.larger(block.params)
        else:
            outer = outer + block.params
    return everything, largest, outer


def _moments(blocks: list[BlockBytes], pipe: Pipeline, rank: int, hop_bytes: FloatArray) -> dict[Moment, KindBytes]:
    """What a rank holds at each moment at which it may hold the most.

    ZeRO 3 holds two gathered units (the one in use and the one prefetched) beside the unit outside the blocks; from 1
    on two whole units are being reduced; a recomputed block's activations, or the loss's intermediates, exist beside.
    """
    batch, workload, recipe = pipe.batch, pipe.workload, pipe.workload.recipe
    numbers, largest, outer = _numbers(blocks, pipe, rank)
    zero = batch.zero_stage
    state = state_bytes(numbers, workload, pipe.framework, batch)
    working = np.zeros(len(batch))
    for index, block in enumerate(blocks):
        share = min(float(pipe.counts[rank, :, index].sum()), 1.0)  # of a head split over stages
        working = np.maximum(working, share * block.working)
    weight, grad = float(recipe.params.num_bytes), float(recipe.grads.num_bytes)
    units = outer.gathered + np.minimum(2.0 * largest.gathered, numbers.gathered - outer.gathered)
    unit = np.maximum(largest.gathered, outer.gathered)
    reducing = np.where(zero >= 1, np.minimum(2.0 * unit, numbers.gathered) * grad, 0.0)
    flattened = np.where((zero == 0) & (batch.dp * batch.cp > 1), unit * grad, 0.0)
    if pipe.framework.memory.reduces_in_place:
        reducing, flattened = np.where(zero == 3, reducing, 0.0), np.zeros(len(batch))
    momentary = np.maximum(working + reducing, flattened)
    moments = {
        Moment.BACKWARD: KindBytes(
            params=state.params,
            grads=state.grads,
            optimizer=state.optimizer,
            activations=_activations(blocks, pipe, rank),
            gathered=state.gathered + np.where(zero == 3, units * weight, 0.0),
            working=np.minimum(working, momentary),
            communication=momentary - np.minimum(working, momentary) + _received(pipe, rank, hop_bytes),
        )
    }
    if pipe.framework.memory.update:
        moments[Moment.UPDATE] = _update(pipe.framework.memory.update, state, numbers.owned, workload, zero)
    return moments


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
    """What all moments but the largest hold for themselves: beside what is there in every one."""
    common = [np.minimum.reduce([getattr(held, name) for held in moments]) for name in ("params", "grads", "optimizer")]
    own = np.array([held.total for held in moments]) - sum(common)
    return np.asarray(own.sum(axis=0) - own.max(axis=0))


def _activations(blocks: list[BlockBytes], pipe: Pipeline, rank: int) -> FloatArray:
    """Of all micro-batches in flight on a rank: ``[num_configs]``."""
    pp, vpp = pipe.counts.shape[:2]
    count = num_microbatches(pipe.batch, pipe.workload)
    per_round = microbatches_per_round(pipe.batch, pipe.workload)
    flying = pipeline.held_microbatches(pipe.schedule, pp, vpp, rank, count, per_round)
    if more := pipe.framework.memory.held_more:
        flying = np.minimum(flying + more, count[:, None])
    total = np.zeros(len(pipe.batch))
    for index, block in enumerate(blocks):
        for chunk in np.flatnonzero(pipe.counts[rank, :, index]):
            total = total + pipe.counts[rank, chunk, index] * flying[:, chunk] * block.saved
    return total


def _received(pipe: Pipeline, rank: int, hop_bytes: FloatArray) -> FloatArray:
    """Receive buffers: one for each direction a chunk receives from, or for each micro-batch too."""
    pp, vpp = pipe.counts.shape[:2]
    if pp == 1:
        return np.zeros(len(pipe.batch))
    directions = 2 * vpp - (rank == 0) - (rank == pp - 1)
    count = num_microbatches(pipe.batch, pipe.workload)
    buffers = count if pipe.framework.receives_ahead else np.ones_like(count)
    return np.asarray(directions * buffers * hop_bytes)
