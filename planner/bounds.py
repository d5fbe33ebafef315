"""What configs cost and hold at least, by what few of their fields say: proofs that whole families need no scoring.

**Time.** With ``t`` the seconds of a micro-batch's forward and backward, a step takes a pipeline rank at least
``count * t``, and some rank has at least the mean of all. Of ``t`` only what does not depend on the data ranks is
counted: kernels, and the exposed part of tensor, context and expert parallel exchange as ``parts.block_parts`` prices
them. A block is taken apart into its experts and the rest, each priced for the fields that matter to it. Left out: the
host, data parallelism, the optimizer, transfers, and what is not additive: of exchange that hides behind a whole block
no more than the share is kept that cannot hide at all.

In a pipeline a rank starts after the forwards of the stages before its first, and where backward is whole the first
rank ends after their backwards: ``[first forwards] + count * t + [last backwards]`` for the rank at hand. No backward
starts before a micro-batch has gone through all stages, and all backwards of a rank are still to come then; and after
its last forward a micro-batch has the rest of the way to go, and the whole way back.

**Memory.** The first rank holds its resident bytes (``residency.state_bytes``) and the activations of the micro-batches
in flight (``step_states``, ``pipeline.holdings``), and beside them at least what the block with the least of it works
with. Left out: buffers, what is gathered unit by unit, logits, other ranks.

Every bound is made of the cost models' own functions, so that it moves with them; that none is above the model's
value is a property test.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import pipeline
from meshwright.cost_models.backward_moments import Backward
from meshwright.cost_models.blocks import BlockKinds, block_kinds, stage_counts
from meshwright.cost_models.constants import as_calibrated
from meshwright.cost_models.framework import (
    Framework,
    PointwiseCost,
    microbatches_per_round,
    num_microbatches,
    reduce_overlap,
)
from meshwright.cost_models.host import launches_ahead
from meshwright.cost_models.parts import BlockParts, block_parts
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.rank_bytes import Rank
from meshwright.cost_models.residency import block_numbers, reserved_bytes, state_bytes
from meshwright.cost_models.saved import BlockBytes, block_bytes
from meshwright.cost_models.schedules import Pass
from meshwright.cost_models.step_states import Pipeline, states
from meshwright.cost_models.strategy import LOOPED, SPLIT_BACKWARD, V_SHAPED, ConfigBatch, Schedule
from meshwright.cost_models.traffic import hop_bytes
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import Block, BlockKind, ModelSpec

FloatArray = NDArray[np.float64]

REST = ("tp", "cp_ring", "cp_ulysses", "sequence_parallel", "vocab_parallel", "micro_batch_size", "recompute")
ROUTED = ("tp", "cp", "sequence_parallel", "ep", "etp", "micro_batch_size", "recompute", "ep_chunks")
_ACTIVATIONS = (*REST, "cp", "pp", "ep", "etp", "ep_chunks")
ROUNDING = 1.0 - 1e-9  # sums in another order than the model's
_NOTHING = PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0)


@dataclass(frozen=True, slots=True)
class Passes:
    """Least seconds of each kind of block, arrays ``[num_kinds, num_configs]``: of a micro-batch, and once a step.

    Zero until data parallelism is known: ``first`` and ``last`` communication beside a first forward and a last
    backward, of which what ``forward_window`` and ``backward_window`` compute in a micro-batch may hide; ``end`` the
    rest of the step.
    """

    forward: FloatArray
    backward: FloatArray
    first: FloatArray | None = None
    last: FloatArray | None = None
    forward_window: FloatArray | None = None
    backward_window: FloatArray | None = None
    end: FloatArray | None = None

    def take(self, rows: NDArray[np.int64]) -> Passes:
        """The configs at these positions."""
        found: list[Any] = [getattr(self, field.name) for field in fields(self)]
        return Passes(*(None if each is None else each[:, rows] for each in found))


class Bounds:
    """The bounds for one model, workload, cluster and target."""

    def __init__(self, model: ModelSpec, workload: Workload, cluster: ClusterProfile, framework: Framework) -> None:
        self.model, self.workload = model, workload
        self.cluster, self.framework = as_calibrated(cluster, framework)
        self.kinds = block_kinds(model)
        numbers = np.bincount(self.kinds.of_layer, minlength=len(self.kinds)).astype(np.float64)
        numbers[[0, -1]] = 1.0
        self.numbers = numbers  # blocks of each kind in the model
        split = [_split(block) for block in self.kinds.kinds]
        self._rest = [(kind, rest) for kind, (rest, _) in enumerate(split) if rest is not None]
        self._routed = [(kind, routed) for kind, (_, routed) in enumerate(split) if routed is not None]
        self._tp_share = max(self.framework.overlap_tp, self.framework.overlap_tp_backward)
        self._ep_share = self.framework.experts.overlap
        self._relaxed = replace(
            self.framework,
            overlap_tp=0.0,
            overlap_tp_backward=0.0,
            experts=replace(self.framework.experts, overlap=0.0),
            pointwise=replace(self.framework.pointwise, accumulate=_NOTHING),
        )

    # -- time -------------------------------------------------------------------------------------------------------

    def passes(self, batch: ConfigBatch, *, exchanges: bool = True) -> Passes:
        """Least seconds of every kind of block on each config's ranks, with or without exchange of experts."""
        forward = np.zeros((len(self.kinds), len(batch)))
        backward = np.zeros_like(forward)
        for blocks, names in ((self._rest, REST), (self._routed, ROUTED)):
            if not blocks:
                continue
            few, inverse = batch.distinct(*names)
            for (kind, _), part in zip(blocks, self._parts([block for _, block in blocks], few), strict=True):
                ahead, back = self._least(part, exchanges)
                forward[kind] += ahead[inverse]
                backward[kind] += back[inverse]
        return Passes(forward * ROUNDING, backward * ROUNDING)

    def _parts(self, blocks: list[Block], batch: ConfigBatch) -> list[BlockParts]:
        whole = replace(batch, zero_stage=np.zeros_like(batch.tp), dp_shard=np.ones_like(batch.tp))
        kinds = BlockKinds(tuple(blocks), np.zeros(0, dtype=np.int64))
        return block_parts(kinds, self.model, self.workload, self.cluster, self._relaxed, whole, Placement())

    def _least(self, part: BlockParts, exchanges: bool) -> tuple[FloatArray, FloatArray]:
        tp, ep = 1.0 - self._tp_share, (1.0 - self._ep_share) * exchanges
        forward = part.compute_forward + tp * part.tp_forward + part.cp_forward + ep * part.ep_forward
        backward = part.compute_backward + part.recompute
        return forward, backward + tp * part.tp_backward + part.cp_backward + ep * part.ep_backward

    def mean_step(self, batch: ConfigBatch, passes: Passes) -> FloatArray:
        """Least seconds of a step whatever the schedule and the data ranks: all blocks spread evenly over stages."""
        micro = self.numbers @ (passes.forward + passes.backward)
        ranks = batch.tp * batch.cp * batch.pp * batch.dp
        return np.asarray(
            micro * self.workload.global_batch_size * batch.tp * batch.cp / (ranks * batch.micro_batch_size)
        )

    def whole_passes(self, batch: ConfigBatch) -> Passes:
        """The same with data parallelism and the host, of configs that are whole but for their schedule."""
        parts = block_parts(self.kinds, self.model, self.workload, self.cluster, self.framework, batch, Placement())
        ahead = ("compute_forward", "host_forward", "tp_forward", "cp_forward", "ep_forward", "dp_forward")
        back = (
            "compute_backward",
            "recompute",
            "host_backward",
            "tp_backward",
            "cp_backward",
            "ep_backward",
            "dp_backward",
        )
        first = () if self.framework.broadcasts_weights else ("dp_first",)  # which asks for the schedule's stages
        wanted = (
            ahead,
            back,
            first,
            ("dp_last",),
            ("compute_forward",),
            ("compute_backward", "recompute"),
            ("dp_end", "optimizer", "optimizer_host"),
        )
        nothing = np.zeros(len(batch))
        found: list[Any] = [
            np.array([sum((getattr(part, name) for name in names), nothing) for part in parts]) for names in wanted
        ]
        return Passes(*found)

    def step(self, batch: ConfigBatch, passes: Passes, schedule: Schedule, vpp: int) -> FloatArray:
        """Least seconds of a step of configs with the same ``pp``, which run that schedule."""
        pp = int(batch.pp[0])
        counts = self.counts(pp, vpp, schedule)
        count = num_microbatches(batch, self.workload).astype(np.float64)
        on_rank, whole = counts.sum(axis=1), schedule not in SPLIT_BACKWARD
        before = np.cumsum(counts[:, 0], axis=0) - counts[:, 0]  # of a rank's first chunk, and of its last
        after = np.cumsum(counts[:, -1], axis=0)
        after = after - counts[:, -1] if schedule in V_SHAPED else after[-1] - after
        all_forward, all_backward = self.numbers @ passes.forward, self.numbers @ passes.backward
        edges = [self._edges(batch, passes, schedule, on_rank[0])] * pp
        least = np.zeros(len(batch))
        _, last = np.unique(on_rank[::-1], axis=0, return_index=True)  # of ranks with the same blocks one waits most
        for rank in {0, *(pp - 1 - last).tolist()}:
            edges[rank] = self._edges(batch, passes, schedule, on_rank[rank])
            forward, backward = on_rank[rank] @ passes.forward, on_rank[rank] @ passes.backward
            start = before[rank] @ passes.forward
            to_end = after[rank] @ passes.forward
            back = before[rank] @ passes.backward if whole else 0.0
            ends = (
                start + count * (forward + backward) + edges[rank],
                all_forward + count * backward + edges[rank] + (after[rank] @ passes.backward if whole else 0.0),
                start + count * (forward + backward) + back + edges[0],
                start + count * forward + to_end + (all_backward if whole else 0.0) + edges[0],
            )
            least = np.maximum.reduce([least, *ends])
        return least * ROUNDING

    def _edges(self, batch: ConfigBatch, passes: Passes, schedule: Schedule, blocks: FloatArray) -> FloatArray:
        """Least seconds of a rank's data parallelism at both ends of a step, and of its update."""
        if passes.first is None or passes.last is None or passes.end is None:
            return np.zeros(len(batch))
        assert passes.forward_window is not None and passes.backward_window is not None
        streams = float(launches_ahead(self.cluster.device))
        rounds = microbatches_per_round(batch, self.workload) if schedule in LOOPED else np.ones(len(batch))
        late = schedule in SPLIT_BACKWARD and self.framework.torch_schedules
        shares = (
            np.full(len(batch), self.framework.overlap_dp_gather * streams),
            reduce_overlap(self.framework, batch) * streams * (not late),
        )
        total = blocks @ passes.end
        for share, exchange, window in zip(
            shares, (passes.first, passes.last), (passes.forward_window, passes.backward_window), strict=True
        ):
            seconds = blocks @ exchange
            total = total + seconds - np.minimum(share * seconds, rounds * (blocks @ window))
        return np.asarray(total)

    def counts(self, pp: int, vpp: int, schedule: Schedule) -> FloatArray:
        """Blocks of each kind on each chunk of each rank: ``[pp, vpp, num_kinds]``."""
        blocks = stage_counts(self.kinds, pp, vpp, self.framework.partition).astype(np.float64)
        if schedule in V_SHAPED:
            blocks = np.array([blocks[:, 0], blocks[::-1, 1]]).swapaxes(0, 1)
        return blocks

    # -- memory -----------------------------------------------------------------------------------------------------

    def mean_state(self, batch: ConfigBatch) -> FloatArray:
        """Least bytes at the peak, of weights and optimizer alone: all blocks spread evenly over stages.

        Some rank holds at least the mean.
        """
        keys = ("tp", "cp", "pp", "dp", "ep", "etp", "dp_shard", "zero_stage", "vocab_parallel", "micro_batch_size")
        few, inverse = batch.distinct(*keys)
        total = np.zeros(len(few))
        for number, kind in zip(self.numbers.tolist(), self.kinds.kinds, strict=True):
            numbers = block_numbers(kind, self.framework, few) * number
            state = state_bytes(numbers, self.workload, self.framework, few)
            total = total + state.params + state.optimizer + state.gathered
            total = total + (0.0 if self.framework.memory.by_operator else state.grads)
        return np.asarray((total / few.pp * ROUNDING - 1.0)[inverse])

    def mean_peak(self, batch: ConfigBatch) -> FloatArray:
        """The same with activations of one micro-batch: every rank has at some time one on each of its chunks."""
        saved = np.zeros(len(batch))
        if not self.framework.memory.offloads:
            few, inverse = batch.distinct(*_ACTIVATIONS)
            for number, kind in zip(self.numbers.tolist(), self.kinds.kinds, strict=True):
                saved = saved + number * block_bytes(kind, self.workload, self.framework, few).saved[inverse]
        return np.asarray(self.mean_state(batch) + saved / batch.pp * ROUNDING)

    def peak(self, batch: ConfigBatch) -> FloatArray:
        """Least bytes at the peak of whole configs: those of the first rank of each."""
        held = [block_bytes(kind, self.workload, self.framework, batch) for kind in self.kinds.kinds]
        by_operator, shapes = self.framework.memory.by_operator, batch.distinct("pp", "vpp", "schedule")
        least = np.zeros(len(batch))
        for number, shape in enumerate(shapes[0].configs()):
            rows = np.flatnonzero(shapes[1] == number)
            pipe = Pipeline(
                kinds=self.kinds,
                counts=self.counts(shape.pp, shape.vpp, shape.schedule),
                schedule=shape.schedule,
                workload=self.workload,
                framework=self.framework,
                batch=batch.take(rows),
            )
            blocks = [block.take(rows) for block in held]
            least[rows] = self._eager(pipe, blocks) if by_operator else self._usual(pipe, blocks)
        return least * ROUNDING - 1.0

    def _usual(self, pipe: Pipeline, held: list[BlockBytes]) -> FloatArray:
        counts, (pp, vpp), batch = pipe.counts[0], pipe.counts.shape[:2], pipe.batch
        on_rank, total = counts.sum(axis=0), np.zeros(len(batch))
        for number, block in zip(on_rank.tolist(), held, strict=True):
            if number:
                state = state_bytes(block.params * number, self.workload, self.framework, batch)
                total = total + state.params + state.grads + state.optimizer + state.gathered
        if self.framework.memory.offloads:
            return total
        per_round = microbatches_per_round(batch, self.workload)
        count = num_microbatches(batch, self.workload)
        flying = pipeline.held_microbatches(pipe.schedule, pp, vpp, 0, count, per_round)
        saved = counts @ np.array([block.saved for block in held])
        return np.asarray(total + (flying.T * saved).sum(axis=0))

    def _eager(self, pipe: Pipeline, held: list[BlockBytes]) -> FloatArray:
        """When a backward starts, and in its first block, which works with no less than the block with least work."""
        rank = Rank(held, pipe, 0, hop_bytes(self.model, self.workload, pipe.batch))
        beside = np.full(len(pipe.batch), 0.0 if pipe.counts[0, :, -1].any() else np.inf)
        for kind, lives in zip(self.kinds.kinds, rank.lives, strict=True):
            if kind.kind is BlockKind.DECODER:
                fullest = (lives.backward.total, lives.adding.total, lives.deferring.total)
                beside = np.minimum(beside, np.maximum(np.minimum.reduce(fullest) - lives.saved, 0.0))
        most = np.zeros(len(pipe.batch))
        for state in states(pipe, 0):
            if state.kind is not Pass.WEIGHT_GRADIENT:
                start = Backward(rank, state)
                flying = start.in_flight + start.grads
                most = np.maximum(most, flying.max(axis=0) if flying.ndim == 2 else flying)
        return np.asarray(rank.params + rank.optimizer + rank.gathered + most + beside)

    def usable(self, batch: ConfigBatch) -> FloatArray:
        """What a device offers to each config."""
        return self.cluster.device.memory_bytes - reserved_bytes(self.cluster.device, self.framework, batch)


def _split(block: Block) -> tuple[Block | None, Block | None]:
    """A decoder block without its experts, and its experts."""
    routed = tuple(layer for layer in block.layers if isinstance(layer, MoeLayer))
    rest = tuple(layer for layer in block.layers if not isinstance(layer, MoeLayer))
    return (
        replace(block, layers=rest) if rest else None,
        replace(block, layers=routed) if routed else None,
    )
