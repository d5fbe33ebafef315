"""The composition: compute, communication, pipeline and memory of a config -> an estimate of its step.

Seconds of every kind of block are worked out once (``parts``), summed over the blocks of each pipeline rank, composed
by the schedule's closed form (``pipeline``), and reported for the rank that finishes last. Memory is summed over the
same blocks and reported for the rank with the largest total.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from meshwright import InputError
from meshwright.cost_models import memory, pipeline
from meshwright.cost_models.blocks import block_kinds, stage_counts
from meshwright.cost_models.collectives import groups_of, seconds, send_seconds
from meshwright.cost_models.constants import as_calibrated
from meshwright.cost_models.estimate import BYTES, KINDS, SECONDS, BatchEstimate, Estimate, FloatArray
from meshwright.cost_models.framework import (
    Framework,
    microbatches_per_round,
    num_microbatches,
    reduce_overlap,
    supported,
)
from meshwright.cost_models.host import launches_ahead
from meshwright.cost_models.parts import BlockParts, block_parts, hide
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.saved import BlockBytes, block_bytes
from meshwright.cost_models.strategy import (
    REASONS,
    SCHEDULES,
    V_SHAPED,
    ConfigBatch,
    IntArray,
    ParallelConfig,
    Schedule,
    legal,
)
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.traffic import COUNT_BYTES, LOSS_BYTES, hop_bytes, shared_grad_bytes, tied_bytes
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile, Provenance
from meshwright.profiler.model import ModelSpec


def estimate(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    config: ParallelConfig,
    framework: str = "meshwright",
) -> Estimate:
    """What one config would cost (seconds of a step) and hold (bytes on the fullest device): a batch of one.

    Raises:
        InputError: the framework is unknown or does not run the config, the config is not legal for this model and
            workload, it needs more devices than the cluster has, or the device has no rate for the compute dtype.
    """
    target = framework_named(framework)
    batch = ConfigBatch.from_configs([config])
    broken = int(legal(batch, model, workload)[0])
    if broken >= 0:
        raise InputError(f"{config.describe()} is not legal for {model.name} and this workload: {REASONS[broken]}")
    if not supported(batch, target, model, workload)[0]:
        raise InputError(f"{framework} does not run {config.describe()} for {model.name} and this workload")
    if config.world_size > cluster.num_devices:
        raise InputError(
            f"{config.describe()} needs {config.world_size} devices, {cluster.name} has {cluster.num_devices}"
        )
    return estimate_batch(model, workload, cluster, target, batch).estimate(0, batch)


def estimate_batch(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
    placement: Placement = Placement(),  # noqa: B008  (a frozen record)
    counts: FloatArray | None = None,
    *,
    tells_waits: bool = True,
) -> BatchEstimate:
    """Cost and memory of every config of ``batch``, which must be legal and supported.

    ``counts`` ``[pp, vpp, num_kinds]`` says how many blocks of each kind (``blocks.block_kinds``) a chunk holds where
    that is not the target's default; a part of a block, as of a head that stages share, is a fraction.
    Without ``tells_waits`` what a pipeline waits for transfers counts as bubble: the step is the same, at half the cost
    of pricing a pipeline, which is played twice to tell them apart.
    Constants that ``meshwright calibrate`` put into the cluster stand in for its own and the target's.
    Raises ``InputError`` when the device has no rate for an operator of the model in the compute dtype.
    """
    cluster, framework = as_calibrated(cluster, framework)
    kinds = block_kinds(model)
    parts = block_parts(kinds, model, workload, cluster, framework, batch, placement)
    held = [block_bytes(block, workload, framework, batch) for block in kinds.kinds]
    columns = {name: np.zeros(len(batch)) for name in (*SECONDS, *BYTES)}
    pipelines = np.stack([batch.pp, batch.vpp, batch.schedule])
    for pp, vpp, schedule in np.unique(pipelines, axis=1).T:
        rows = np.flatnonzero((batch.pp == pp) & (batch.vpp == vpp) & (batch.schedule == schedule))
        blocks = stage_counts(kinds, int(pp), int(vpp), framework.partition) if counts is None else counts
        if SCHEDULES[schedule] in V_SHAPED:  # stages of the second chunk run from the last rank to the first
            blocks = np.array([blocks[:, 0], blocks[::-1, 1]], dtype=np.float64).swapaxes(0, 1)
        group = _Group(
            batch=batch.take(rows),
            counts=blocks,
            schedule=SCHEDULES[schedule],
            model=model,
            workload=workload,
            cluster=cluster,
            placement=placement,
            framework=framework,
            tells_waits=tells_waits,
        )
        taken = [
            BlockParts(**{field.name: getattr(part, field.name)[rows] for field in fields(part)}) for part in parts
        ]
        for name, column in {**group.cost(taken), **group.memory([block.take(rows) for block in held])}.items():
            columns[name][rows] = column
    arrays: dict[str, Any] = {name: columns[name] for name in SECONDS}
    arrays |= {name: np.rint(columns[name]).astype(np.int64) for name in BYTES}
    return BatchEstimate(**arrays)


@dataclass(frozen=True, slots=True)
class _Group:
    """Configs of one pipeline shape and schedule: ``counts`` ``[pp, vpp, num_kinds]`` blocks on each chunk."""

    batch: ConfigBatch
    counts: IntArray | FloatArray
    schedule: Schedule
    model: ModelSpec
    workload: Workload
    cluster: ClusterProfile
    placement: Placement
    framework: Framework
    tells_waits: bool = True

    def _by_chunk(self, values: list[FloatArray]) -> FloatArray:
        """Sum of a per-block quantity over the blocks of each chunk: ``[num_configs, pp, vpp]``."""
        total = np.zeros((len(self.batch), *self.counts.shape[:2]))
        for kind, value in enumerate(values):
            total += value[:, None, None] * self.counts[None, :, :, kind]
        return total

    def _by_rank(self, parts: list[BlockParts], *names: str) -> FloatArray:
        """Sum of parts over the blocks of each rank: ``[num_configs, pp]``."""
        total, on_rank = np.zeros((len(self.batch), self.counts.shape[0])), self.counts.sum(axis=1)
        for kind, part in enumerate(parts):
            total += _sum(part, names)[:, None] * on_rank[None, :, kind]
        return total

    def cost(self, parts: list[BlockParts]) -> dict[str, FloatArray]:
        """The breakdown of the rank that finishes last."""
        count = num_microbatches(self.batch, self.workload).astype(np.float64)[:, None]
        forward = self._by_chunk(
            [_sum(part, ("compute_forward", "host_forward", "tp_forward", "dp_forward")) for part in parts]
        )
        backward = self._by_chunk(
            [
                _sum(part, ("compute_backward", "recompute", "host_backward", "tp_backward", "dp_backward"))
                for part in parts
            ]
        )
        hop = self._hops()
        wait = self.framework.host.microbatch_s
        transfers = self._transfers() * self.framework.host.hop_s
        exchanged = self._vocabulary_exchanges()[:, None]
        forward, backward = (each + exchanged[:, :, None] / 2.0 / each.shape[2] for each in (forward, backward))
        held = np.zeros_like(forward)
        if self.schedule in self.framework.blocking_hops:
            held, hop = self._held(hop), np.zeros_like(hop)
        forward, backward = (
            each + wait / 2.0 / self.counts.shape[1] + transfers + held for each in (forward, backward)
        )
        weights = self._by_chunk([part.compute_weights for part in parts])
        finish = self._finish(forward, backward, weights, hop)
        apart = self.tells_waits and hop.any()
        unhindered = self._finish(forward, backward, weights, np.zeros_like(hop)) if apart else finish
        if self._splits_vocabulary:  # its barriers let one more micro-batch into the pipeline
            finish, unhindered = (
                each + (forward + backward).sum(axis=2).max(axis=1, keepdims=True) for each in (finish, unhindered)
            )
        busy = count * (forward + backward).sum(axis=2)
        idle = np.maximum(finish - busy, 0.0)
        waits = np.clip(finish - unhindered, 0.0, idle)
        first, first_hidden, last, last_hidden, delay = self._edges(parts)
        end, shared = self._by_rank(parts, "dp_end"), self._shared()[:, None]
        optimizer, host = self._by_rank(parts, "optimizer"), self._by_rank(parts, "optimizer_host")
        tied = self._tied()
        total = busy + idle + delay + first + last + end + shared + tied + optimizer + host
        slowest = np.argmax(total, axis=1)
        result = {
            "compute_s": count * self._by_rank(parts, "compute_forward", "compute_backward"),
            "recompute_s": count * self._by_rank(parts, "recompute"),
            "tp_s": count * self._by_rank(parts, "tp_forward", "tp_backward") + shared,
            "pp_s": waits + tied + count * (2.0 * held.sum(axis=2) + exchanged),
            "dp_s": count * self._by_rank(parts, "dp_forward", "dp_backward") + first + last + end,
            "bubble_s": idle - waits + delay,
            "optimizer_s": optimizer,
            "overhead_s": count
            * (self._by_rank(parts, "host_forward", "host_backward") + wait + 2.0 * transfers.sum(axis=1))
            + host
            + self.framework.host.step_s
            + self._world()[:, None],
            "hidden_s": count * self._by_rank(parts, "hidden") + first_hidden + last_hidden,
        }
        rows = np.arange(len(self.batch))
        return {name: value[rows, slowest] for name, value in result.items()}

    def _finish(self, forward: FloatArray, backward: FloatArray, weights: FloatArray, hop: FloatArray) -> FloatArray:
        """Seconds from the start to each rank's last action: ``[num_configs, pp]``; ``weights`` is part of backward."""
        count = num_microbatches(self.batch, self.workload)
        if self.counts.shape[0] == 1:
            return np.asarray(count[:, None] * (forward + backward).sum(axis=2))
        per_round = microbatches_per_round(self.batch, self.workload)
        return pipeline.finish(self.schedule, forward, backward - weights, weights, hop, count, per_round)

    def _transfers(self) -> FloatArray:
        """Sends and receives of one micro-batch on each chunk, one way: ``[pp, vpp]``, fewer at the model's ends."""
        pp, vpp = self.counts.shape[:2]
        number = np.full((pp, vpp), 2.0 if pp > 1 else 0.0)
        number[0, 0] -= pp > 1
        number[-1, -1] -= pp > 1
        return number

    @property
    def _splits_vocabulary(self) -> bool:
        """Whether every stage has a part of the head: vocabulary parallelism over the pipeline."""
        return bool(np.count_nonzero(self.counts[:, :, -1]) > 1)

    def _vocabulary_exchanges(self) -> FloatArray:
        """Seconds that a micro-batch's exchanges among all stages take where each has a part of the vocabulary.

        The last hidden states are sent to all and their gradients summed; embeddings are summed and their gradients
        sent to all (arXiv 2411.05288, sections 4 and 5). Left out: what of it hides behind layers, on streams of its
        own, and sums of a number a token.
        """
        if not self._splits_vocabulary:
            return np.zeros(len(self.batch))
        groups = groups_of(self.batch, self.cluster, self.placement, "pp")
        num_bytes = hop_bytes(self.model, self.workload, self.batch)
        return np.asarray(sum(2.0 * seconds(self.cluster, op, groups, num_bytes) for op in ("broadcast", "all_reduce")))

    def _held(self, hop: FloatArray) -> FloatArray:
        """Seconds for which transfers that block hold a rank around each pass of a chunk: ``[num_configs, pp, vpp]``.

        1F1B exchanges with the next rank after a forward, with the one before after a backward: half of both a pass.
        Interleaved, a forward and a backward share one exchange with both (megatron/schedules.py of 2021).
        """
        pp, vpp = self.counts.shape[:2]
        none = np.zeros((len(self.batch), 1))
        before, after = (np.concatenate(ends, axis=1) for ends in ([none, hop], [hop, none]))
        both = np.maximum(before, after) if vpp > 1 else before + after
        return np.asarray(both.reshape(-1, vpp, pp).swapaxes(1, 2) / 2.0)

    def _hops(self) -> FloatArray:
        """Seconds of a transfer between each two stages that follow each other: ``[num_configs, pp * vpp - 1]``.

        Without sequence parallelism all tp peers hold the same tensor: where the target ``splits_hops`` each sends its
        share, and they gather it on the other side (Narayanan et al. 2021, arXiv 2104.04473, section 4.1).

        In a V ranks are passed down and back up, and the two stages in its middle are on one rank.
        """
        pp, vpp = self.counts.shape[:2]
        stride = self._pp_stride()
        num_bytes = hop_bytes(self.model, self.workload, self.batch)
        gather = np.zeros(len(self.batch))
        if self.framework.splits_hops:
            groups = groups_of(self.batch, self.cluster, self.placement, "tp")
            whole = ~self.batch.sequence_parallel
            gather = np.where(whole, seconds(self.cluster, "all_gather", groups, num_bytes), 0.0)
            num_bytes = num_bytes / np.where(whole, self.batch.tp, 1)
        hops = np.zeros((len(self.batch), pp))
        for rank in range(pp if vpp > 1 else pp - 1):  # the last rank sends its earlier chunks' outputs to the first
            first, second = rank * stride, (rank + 1) % pp * stride
            ends = (send_seconds(self.cluster, first + peer, second + peer, num_bytes) for peer in (0, stride - 1))
            hops[:, rank] = np.maximum(*ends) + gather
        if self.schedule in V_SHAPED:
            down = hops[:, : pp - 1]
            return np.concatenate([down, np.zeros((len(self.batch), 1)), down[:, ::-1]], axis=1)
        return np.tile(hops, vpp)[:, : pp * vpp - 1]

    def _pp_stride(self) -> IntArray:
        """Devices between a rank and its peer on the next stage."""
        stride = np.ones(len(self.batch), dtype=np.int64)
        for axis in self.placement.order[: self.placement.order.index("pp")]:
            stride = stride * getattr(self.batch, axis)
        return stride

    def _edges(self, parts: list[BlockParts]) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """Gathers of the first forward and reductions of the last backward: exposed and hidden, and whom they delay.

        On a device without streams they stand in the way of the first micro-batch down the pipeline and of the last one
        back: a rank waits for the reductions of the ranks after it on the way back, and for all gathers on the way in.
        """
        streams = launches_ahead(self.cluster.device)
        gather = np.array([[self.framework.overlap_dp_gather * streams]])
        reduce = reduce_overlap(self.framework, self.batch)[:, None] * streams
        first, first_hidden = self._beside_chunks(parts, "dp_first", gather, "compute_forward")
        last, last_hidden = self._beside_chunks(parts, "dp_last", reduce, "compute_backward", "recompute")
        delay = np.zeros_like(first)
        if not streams:
            from_later = np.cumsum(last[:, ::-1], axis=1)[:, ::-1] - last
            delay = from_later + first.sum(axis=1, keepdims=True) - first
        return first, first_hidden, last, last_hidden, delay

    def _beside_chunks(
        self, parts: list[BlockParts], name: str, share: FloatArray, *compute: str
    ) -> tuple[FloatArray, FloatArray]:
        """Exposed and hidden seconds of a rank's gathers or reductions, ``[num_configs, pp]``, one chunk after another.

        Chunk ``c`` has its weights gathered before its first forward, and its gradients ready in its last backward.
        Until then (from then on) the rank works on the chunks before it: on a whole round of micro-batches of each
        where the schedule is interleaved, on one of each in a V (Megatron-Core,
        ``pipeline_parallel/schedules.py: forward_backward_pipelining_with_interleaving``, param_sync_func and
        grad_sync_func). With ``C_c`` the ``share`` of its communication and ``W_c`` that work and its own micro-batch,
        ``max_c(C_0 + ... + C_c - W_c)`` seconds are exposed: with one chunk what is longer than its micro-batch.
        Left out: idle time in the warm-up and cool-down, in which more of it may hide.
        """
        wanted, near, work = (
            self._by_chunk([_sum(part, names) for part in parts]) for names in ((name,), (f"{name}_inside",), compute)
        )
        rounds = np.ones(len(self.batch))
        if self.schedule not in V_SHAPED:
            rounds = microbatches_per_round(self.batch, self.workload).astype(np.float64)
        earlier = np.cumsum(work, axis=2) - work
        window = earlier * rounds[:, None, None] + work
        late = np.maximum((np.cumsum(share[:, :, None] * wanted, axis=2) - window).max(axis=2), 0.0)
        total = wanted.sum(axis=2)
        return hide(total, share, share * total - late, self.cluster, near.sum(axis=2))

    def _tied(self) -> FloatArray:
        """First and last stage exchange the gradients of a tied embedding's two copies: ``[num_configs, pp]``."""
        pp = self.counts.shape[0]
        result = np.zeros((len(self.batch), pp))
        if self.model.tied and pp > 1:
            num_bytes = tied_bytes(self.model, self.workload, self.batch)
            result[:, [0, -1]] = send_seconds(self.cluster, 0, (pp - 1) * self._pp_stride(), num_bytes)[:, None]
        return result

    def _shared(self) -> FloatArray:
        """Gradients of which each tp rank has a part, added up once a step for each chunk, priced as the largest."""
        kinds = block_kinds(self.model).kinds
        num_bytes = self._by_chunk([shared_grad_bytes(block, self.workload, self.batch) for block in kinds])
        groups = groups_of(self.batch, self.cluster, self.placement, "tp")
        one = seconds(self.cluster, "all_reduce", groups, num_bytes.max(axis=(1, 2)))
        return np.asarray(one * num_bytes.shape[2])

    def _world(self) -> FloatArray:
        """The count of targets before a step and the loss after it: two all_reduces of a few bytes."""
        data = groups_of(self.batch, self.cluster, self.placement, "dp", "cp")
        world = groups_of(self.batch, self.cluster, self.placement, *self.placement.order)
        return seconds(self.cluster, "all_reduce", data, COUNT_BYTES) + seconds(
            self.cluster, "all_reduce", world, LOSS_BYTES
        )

    def memory(self, blocks: list[BlockBytes]) -> dict[str, FloatArray]:
        """The breakdown of the rank with the largest total."""
        pipe = memory.Pipeline(
            kinds=block_kinds(self.model),
            counts=np.asarray(self.counts, dtype=np.float64),
            schedule=self.schedule,
            workload=self.workload,
            framework=self.framework,
            batch=self.batch,
        )
        device = self.cluster.device
        found = memory.peak(blocks, pipe, hop_bytes(self.model, self.workload, self.batch))
        tensors = np.asarray(sum(found[f"{name}_bytes"] for name in KINDS))
        return found | {
            "fragmentation_bytes": tensors * self.framework.memory.fragmentation,
            "reserved_bytes": np.full(len(self.batch), float(device.reserved_bytes)),
            "capacity_bytes": np.full(len(self.batch), float(device.memory_bytes)),
        }


def _sum(part: BlockParts, names: tuple[str, ...]) -> FloatArray:
    return np.asarray(sum(getattr(part, name) for name in names))


def assumptions(model: ModelSpec, workload: Workload, cluster: ClusterProfile, framework: Framework) -> tuple[str, ...]:
    """What the estimates rest on that was not measured, and what they leave out, in words."""
    device = cluster.device
    said = []
    unmeasured = sorted(
        {
            curve.op
            for curve in device.efficiencies
            if curve.dtype == workload.recipe.compute.value and curve.source.provenance is not Provenance.MEASURED
        }
    )
    if unmeasured:
        said.append(f"rates of {', '.join(unmeasured)} on {device.kind} are not measured")
    links = [tier.name for tier in cluster.tiers if tier.source.provenance is not Provenance.MEASURED]
    if links:
        said.append(f"latency and bandwidth of links ({', '.join(links)}) are not measured")
    if not cluster.collectives:
        said.append("collectives follow from latency and bandwidth, none was measured")
    if model.moe is not None:
        said.append("tokens spread evenly over experts")
    if model.attention.window and not framework.windowed_attention:
        said.append(f"{framework.name} works out what a sliding window masks")
    said.append("no dropout, no padding between sequences, no allocator fragmentation, no input from disk")
    return tuple(said)
