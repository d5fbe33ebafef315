"""The composition: compute, communication, pipeline and memory of a config -> an estimate of its step.

Seconds of every kind of block are worked out once (``parts``), summed over the blocks of each pipeline rank, composed
by the schedule's closed form (``pipeline``), and reported for the rank that finishes last. Memory is summed over the
same blocks and reported for the rank with the largest total.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from meshwright import InputError
from meshwright.cost_models import memory
from meshwright.cost_models.blocks import block_kinds, stage_counts
from meshwright.cost_models.constants import as_calibrated
from meshwright.cost_models.estimate import BYTES, KINDS, SECONDS, BatchEstimate, Estimate, FloatArray
from meshwright.cost_models.framework import (
    Framework,
    supported,
)
from meshwright.cost_models.offload import kept_activations
from meshwright.cost_models.parts import BlockParts, block_parts
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.residency import reserved_bytes
from meshwright.cost_models.saved import BlockBytes, block_bytes
from meshwright.cost_models.stage_seconds import cost
from meshwright.cost_models.stages import Stages
from meshwright.cost_models.step_states import Pipeline
from meshwright.cost_models.strategy import (
    REASONS,
    SCHEDULES,
    V_SHAPED,
    ConfigBatch,
    IntArray,
    ParallelConfig,
    legal,
)
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.traffic import hop_bytes
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
    seconds = batch_seconds(model, workload, cluster, framework, batch, placement, counts, tells_waits=tells_waits)
    arrays: dict[str, Any] = {**seconds, **batch_bytes(model, workload, cluster, framework, batch, counts)}
    return BatchEstimate(**arrays)


def batch_seconds(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
    placement: Placement = Placement(),  # noqa: B008  (a frozen record)
    counts: FloatArray | None = None,
    *,
    tells_waits: bool = True,
    parts: list[BlockParts] | None = None,
) -> dict[str, FloatArray]:
    """The seconds of ``estimate_batch`` alone, by the fields of ``CostBreakdown``.

    ``parts`` are those of the configs (``parts.block_parts``), where they are known.
    """
    cluster, framework = as_calibrated(cluster, framework)
    if parts is None:
        parts = block_parts(block_kinds(model), model, workload, cluster, framework, batch, placement)
    columns = {name: np.zeros(len(batch)) for name in SECONDS}
    for rows, stages in _pipelines(model, workload, cluster, framework, batch, placement, counts):
        for name, column in cost(stages, [part.take(rows) for part in parts], tells_waits=tells_waits).items():
            columns[name][rows] = column
    return columns


def batch_bytes(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
    counts: FloatArray | None = None,
    *,
    held: list[BlockBytes] | None = None,
) -> dict[str, IntArray]:
    """The bytes of ``estimate_batch`` alone, by the fields of ``MemoryBreakdown``.

    ``held`` is what the blocks hold (``saved.block_bytes``), where it is known.
    """
    cluster, framework = as_calibrated(cluster, framework)
    if held is None:
        held = [block_bytes(block, workload, framework, batch) for block in block_kinds(model).kinds]
    columns = {name: np.zeros(len(batch)) for name in BYTES}
    for rows, stages in _pipelines(model, workload, cluster, framework, batch, Placement(), counts):
        for name, column in _memory([block.take(rows) for block in held], stages).items():
            columns[name][rows] = column
    return {name: np.rint(columns[name]).astype(np.int64) for name in BYTES}


def _pipelines(
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
    placement: Placement,
    counts: FloatArray | None,
) -> Iterator[tuple[IntArray, Stages]]:
    """The configs of each pipeline shape and schedule: their positions, and their stages."""
    kinds, shape = block_kinds(model), batch.distinct("pp", "vpp", "schedule")
    for number, (pp, vpp, schedule) in enumerate(zip(shape[0].pp, shape[0].vpp, shape[0].schedule, strict=True)):
        rows = np.flatnonzero(shape[1] == number)
        blocks = stage_counts(kinds, int(pp), int(vpp), framework.partition) if counts is None else counts
        if SCHEDULES[schedule] in V_SHAPED:  # stages of the second chunk run from the last rank to the first
            blocks = np.array([blocks[:, 0], blocks[::-1, 1]], dtype=np.float64).swapaxes(0, 1)
        yield (
            rows,
            Stages(
                batch=batch.take(rows),
                counts=blocks,
                schedule=SCHEDULES[schedule],
                model=model,
                workload=workload,
                cluster=cluster,
                placement=placement,
                framework=framework,
            ),
        )


def _memory(blocks: list[BlockBytes], stages: Stages) -> dict[str, FloatArray]:
    """The breakdown of the rank with the largest total."""
    pipe = Pipeline(
        kinds=block_kinds(stages.model),
        counts=np.asarray(stages.counts, dtype=np.float64),
        schedule=stages.schedule,
        workload=stages.workload,
        framework=stages.framework,
        batch=stages.batch,
    )
    device = stages.cluster.device
    found = memory.peak(blocks, pipe, hop_bytes(stages.model, stages.workload, stages.batch))
    tensors = np.asarray(sum(found[f"{name}_bytes"] for name in KINDS))
    traits = stages.framework.memory
    reserved = reserved_bytes(device, stages.framework, stages.batch)
    room = device.memory_bytes - reserved
    if traits.offloads and stages.counts.shape[0] == 1:
        excess = tensors - room / (1.0 + traits.fragmentation) / (1.0 + traits.margin)
        kept = kept_activations(found["activations_bytes"], excess, stages.model.num_layers)
        tensors, found["activations_bytes"] = tensors - found["activations_bytes"] + kept, kept
    fragmentation, unshared = tensors * traits.fragmentation, found.pop("unshared_bytes")
    if not traits.reuses_blocks:  # free blocks are given back before memory runs out: they take what there is, no more
        unshared = np.clip(room / (1.0 + traits.margin) - tensors - fragmentation, 0.0, unshared)
    return found | {
        "fragmentation_bytes": fragmentation + unshared,
        "reserved_bytes": reserved,
        "capacity_bytes": np.full(len(stages.batch), float(device.memory_bytes)),
    }


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
        how = "evenly over experts" if workload.routing is None else "over experts as measured, in order on their ranks"
        said.append(f"tokens spread {how}")
    if model.windows and not framework.windowed_attention:
        said.append(f"{framework.name} works out what a sliding window masks")
    if not framework.memory.fragmentation and framework.memory.blocks is None:
        said.append("no fragmentation in the allocator, beyond the margin")
    said.append("no dropout, no padding between sequences, no input from disk")
    return tuple(said)
