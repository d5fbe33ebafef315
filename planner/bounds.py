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

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import pipeline
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
from meshwright.cost_models.residency import block_numbers, reserved_bytes, state_bytes
from meshwright.cost_models.saved import BlockBytes, block_bytes
from meshwright.cost_models.schedules import Pass
from meshwright.cost_models.step_states import Pipeline, states
from meshwright.cost_models.strategy import LOOPED, SPLIT_BACKWARD, V_SHAPED, ConfigBatch, Schedule
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import Block, BlockKind, ModelSpec

FloatArray = NDArray[np.float64]

REST = ("tp", "cp_ring", "cp_ulysses", "sequence_parallel", "vocab_parallel", "micro_batch_size", "recompute")
ROUTED = ("tp", "cp", "sequence_parallel", "ep", "etp", "micro_batch_size", "recompute", "ep_chunks")
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
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        found = {name: None if each is None else each[:, rows] for name, each in found.items()}
        return Passes(**found)

    @staticmethod
    def concatenate(parts: Sequence[Passes]) -> Passes:
        """One after another, of a micro-batch alone."""
        forward, backward = ([getattr(part, name) for part in parts] for name in ("forward", "backward"))
        return Passes(np.concatenate(forward, axis=1), np.concatenate(backward, axis=1))


@dataclass(frozen=True, slots=True)
class State:
    """Bytes of each kind of block on a rank, ``[num_kinds, num_configs]``: there at any peak, and gradients."""

    steady: FloatArray
    grads: FloatArray

    def take(self, rows: NDArray[np.int64]) -> State:
        """The configs at these positions."""
        return State(self.steady[:, rows], self.grads[:, rows])


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

    def parts(self, batch: ConfigBatch) -> list[BlockParts]:
        """What every kind of block costs, of configs that are whole but for their schedule."""
        return block_parts(self.kinds, self.model, self.workload, self.cluster, self.framework, batch, Placement())

    def whole_passes(self, parts: list[BlockParts]) -> Passes:
        """``passes`` with data parallelism and the host."""
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
        nothing = np.zeros(len(parts[0].compute_forward))
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
            ends = [
                start + count * (forward + backward) + edges[rank],
                all_forward + count * backward + edges[rank] + (after[rank] @ passes.backward if whole else 0.0),
                start + count * forward + to_end + (all_backward if whole else 0.0) + edges[0],
            ]
            if whole:  # gradients of weights that are put off hold no other rank
                ends.append(start + count * (forward + backward) + before[rank] @ passes.backward + edges[0])
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

    def state(self, batch: ConfigBatch) -> State:
        """Bytes of every kind of block on a rank between micro-batches."""
        keys = ("tp", "cp", "pp", "dp", "ep", "etp", "dp_shard", "zero_stage", "vocab_parallel", "micro_batch_size")
        few, inverse = batch.distinct(*keys)
        steady, grads = np.zeros((len(self.kinds), len(few))), np.zeros((len(self.kinds), len(few)))
        recipe = self.workload.recipe
        reduced = recipe.master.num_bytes / recipe.grads.num_bytes if recipe.master and recipe.has_master else 1.0
        for index, kind in enumerate(self.kinds.kinds):
            numbers = block_numbers(kind, self.framework, few)
            state = state_bytes(numbers, self.workload, self.framework, few)
            steady[index] = state.params + state.optimizer + state.gathered
            grads[index] = state.grads * min(reduced, 1.0)
        if not self.framework.memory.by_operator:  # a buffer for all of them throughout
            steady, grads = steady + grads, np.zeros_like(grads)
        return State(steady[:, inverse], grads[:, inverse])

    def held(self, batch: ConfigBatch) -> list[BlockBytes]:
        """What every kind of block holds of one micro-batch."""
        return [block_bytes(kind, self.workload, self.framework, batch) for kind in self.kinds.kinds]

    def activations(self, held: list[BlockBytes]) -> tuple[FloatArray, FloatArray]:
        """What each kind of block saves of a micro-batch, ``[num_kinds, num_configs]``; what any one works with."""
        saved = np.array([block.saved for block in held])
        beside = np.full(saved.shape[1], np.inf)
        if self.framework.memory.offloads:
            return np.zeros_like(saved), np.zeros_like(beside)
        for kind, block in zip(self.kinds.kinds, held, strict=True):
            if kind.kind is BlockKind.DECODER and block.lifetimes is not None:
                lives = block.lifetimes
                fullest = (lives.backward.total, lives.adding.total, lives.deferring.total)
                beside = np.minimum(beside, np.maximum(np.minimum.reduce(fullest) - lives.saved, 0.0))
        return saved, np.where(np.isfinite(beside), beside, 0.0)

    def mean_state(self, batch: ConfigBatch, state: State) -> FloatArray:
        """Least bytes at the peak: weights and optimizer, the mean of all ranks, and earlier micro-batches' gradients.

        Every rank has these of all its chunks when the last backward of a step starts.
        """
        several = num_microbatches(batch, self.workload) > 1
        return self._mean(batch, state.steady + several * state.grads)

    def mean_peak(self, batch: ConfigBatch, state: State, saved: FloatArray) -> FloatArray:
        """The same with activations of one micro-batch in place of gradients: every rank has one on each chunk once."""
        return np.maximum(self.mean_state(batch, state), self._mean(batch, state.steady + saved))

    def _mean(self, batch: ConfigBatch, held: FloatArray) -> FloatArray:
        return np.asarray(self.numbers @ held / batch.pp * ROUNDING - 1.0)

    def peak(
        self,
        batch: ConfigBatch,
        state: State,
        activations: tuple[FloatArray, FloatArray],
        schedule: Schedule,
        vpp: int,
    ) -> FloatArray:
        """Least bytes at the peak of configs with the same ``pp``, which run that schedule: those of the first rank."""
        counts = self.counts(int(batch.pp[0]), vpp, schedule)
        few, inverse = batch.distinct("dp", "micro_batch_size")
        pipe = Pipeline(
            kinds=self.kinds,
            counts=counts,
            schedule=schedule,
            workload=self.workload,
            framework=self.framework,
            batch=few,
        )
        saved, grads, beside = counts[0] @ activations[0], counts[0] @ state.grads, activations[1]
        most = np.zeros(len(batch))
        for flying, resident in self._backwards(pipe):  # [num_configs, vpp]
            now = np.einsum("nc,cn->n", flying[inverse], saved) + np.einsum("nc,cn->n", resident[inverse], grads)
            most = np.maximum(most, now)
        if not counts[0, :, -1].any():
            most = most + beside
        return np.asarray((counts[0].sum(axis=0) @ state.steady + most) * ROUNDING - 1.0)

    def _backwards(self, pipe: Pipeline) -> list[tuple[FloatArray, FloatArray]]:
        """On the first rank, when some backwards start: micro-batches of each chunk in flight, chunks with gradients.

        Each ``[num_configs, vpp]``.
        """
        if self.framework.memory.by_operator:
            found = []
            for state in states(pipe, 0):
                if state.kind is not Pass.WEIGHT_GRADIENT:
                    resident = (state.resident & state.outer).astype(np.float64)
                    found += list(zip(*np.broadcast_arrays(state.held, resident), strict=True))
            return found
        (pp, vpp), batch = pipe.counts.shape[:2], pipe.batch
        count, per_round = num_microbatches(batch, self.workload), microbatches_per_round(batch, self.workload)
        held = pipeline.held_microbatches(pipe.schedule, pp, vpp, 0, count, per_round)
        return [(held, np.zeros_like(held))]

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
