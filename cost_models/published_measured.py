"""What a published run took: seconds of a step, bytes at the peak, and the step that a utilisation stands for."""

from __future__ import annotations

import re
from enum import StrEnum

from meshwright import InputError
from meshwright.cost_models.flops import model_flops
from meshwright.cost_models.published_hardware import cluster_named, source_date
from meshwright.cost_models.published_rows import Row
from meshwright.cost_models.strategy import ParallelConfig, Recompute
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import AttentionLayer, HeadLayer
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.record import record
from meshwright.profiler.units import GB, GIB


class PeakKind(StrEnum):
    """What a published peak counts: tensors, the blocks that torch's caching allocator holds, or all of the device."""

    ALLOCATED = "allocated"
    RESERVED = "reserved"
    DEVICE = "device"  # with context and communicators, as the driver shows it
    UNSPECIFIED = "unspecified"


@record
class Measured:
    """``None`` where the source does not have it, or not for a whole configuration.

    ``utilisation_step_s`` is the step that a published utilisation stands for in the source's own FLOP formula: rows
    that do not publish everything a step needs are scored on utilisation, and predicted over measured utilisation is
    this over the predicted step.
    """

    step_s: float | None = None
    utilisation_step_s: float | None = None
    mfu: float | None = None
    peak_bytes: float | None = None
    peak_kind: PeakKind = PeakKind.UNSPECIFIED


def measured_of(row: Row, model: ModelSpec, workload: Workload, config: ParallelConfig, cluster: str) -> Measured:
    """The measured columns of a row; memory is GiB, which allocators print as GB, but for ``DECIMAL``."""
    step = row.number("step_time_s_derived") or row.number("step_time_s")
    if step is None and (tokens_per_s := row.number("tokens_per_s_per_gpu")):
        step = workload.tokens_per_step / (tokens_per_s * config.world_size)
    peak, mfu = row.number("peak_mem_gb"), row.number("mfu_pct")
    usable = {word.strip() for word in row.text("usable_for").split(";")}
    timed = bool(usable & {"time", "time_novocab", ""}) and row.text("oom").lower() != "true"
    utilisation = "util" in usable
    return Measured(
        step_s=step if timed and not utilisation else None,
        utilisation_step_s=(step or _utilisation_step(row, model, workload, config, cluster)) if utilisation else None,
        mfu=mfu / 100 if mfu else None,
        peak_bytes=peak * (GB if DECIMAL.search(_said_of(row)) else GIB) if peak else None,
        peak_kind=_peak_kind(row) if peak else PeakKind.UNSPECIFIED,
    )


# who writes GB for 10^9 bytes: Megatron-Bridge's log (training/utils/train_utils.py: report_memory), the zero-bubble
# fork's schedules (megatron/core/pipeline_parallel/schedules.py). Others that we know divide by 1024
DECIMAL = re.compile(r"zero bubble|megatron-bridge")

# whose logs hold no figure of the allocator's: their tables are what the driver shows (InternEvo v0.2.1dev20231121)
DRIVER = re.compile(r"internevo|internlm")

# whose benchmark writes allocated and reserved bytes of rank 0, where its source shows one of them: allocated bytes are
# counted from the end of the last backward on (nanotron, logging.py: log_memory resets them), and what is shown grows
# with the micro batch
NANOTRON = re.compile(r"nanotron")


def _said_of(row: Row) -> str:
    return f"{row.text('source')} {row.text('framework')}".lower()


def _peak_kind(row: Row) -> PeakKind:
    """As the column says: sums of tensors (parameters, optimizer, activations) are allocated."""
    said = row.text("mem_kind").lower()
    if said.startswith("unspecified"):
        return PeakKind.RESERVED if NANOTRON.search(_said_of(row)) else PeakKind.UNSPECIFIED
    if re.search(r"allocated|params\+optimizer", said):
        return PeakKind.ALLOCATED
    if not said and DRIVER.search(_said_of(row)):
        return PeakKind.DEVICE
    return PeakKind.RESERVED if "reserved" in said else PeakKind.UNSPECIFIED


def _utilisation_step(
    row: Row, model: ModelSpec, workload: Workload, config: ParallelConfig, cluster: str
) -> float | None:
    flops_per_s = (row.number("tflops_per_gpu") or 0.0) * 1e12
    if not flops_per_s and (mfu := row.number("mfu_pct")):
        try:
            peak = cluster_named(cluster).device.efficiency("matmul", workload.recipe.compute.value).peak_flops_per_s
        except InputError:
            return None
        flops = model_flops(model, workload, halves_causal=_halves_causal(row))
        return flops / (peak * mfu / 100 * config.world_size)
    if not flops_per_s:
        return None
    said = f"{row.text('notes')} {row.text('derivation')}".lower()
    hardware = re.search(r"hardware|\bhfu\b|incl[a-z.]* .*recompute", said) is not None
    flops = hardware_flops(model, workload, config.recompute) if hardware else model_flops(model, workload)
    return flops / (flops_per_s * config.world_size)


def _halves_causal(row: Row) -> bool:
    """Whether a utilisation is Megatron-Core's own, of a source since it counts half of causal attention."""
    core = re.match(r"megatron[- ]?core|mcore\b", row.text("framework").lower())
    return core is not None and source_date(row) >= (2025, 3)


def hardware_flops(model: ModelSpec, workload: Workload, recompute: Recompute) -> float:
    """FLOPs of one step with what recompute does again, as hardware utilisation counts them.

    With full recompute every decoder block runs forward twice, the head once: for a GPT this is equation 3 of arXiv
    2104.04473, ``96 B s l h^2 (1 + s / 6h + V / 16lh)``. Selective recompute repeats attention between its
    projections (arXiv 2205.05198, appendix A). Biases, norms and softmax are left out, as in ``model_flops``.
    """
    whole = model_flops(model, workload)
    if recompute is Recompute.NONE:
        return whole
    if recompute is Recompute.FULL:
        head = (
            6.0
            * workload.tokens_per_step
            * sum(layer.hidden * layer.vocab_size for layer in model.layers() if isinstance(layer, HeadLayer))
        )
        return whole + (whole - head) / 3.0
    core = sum(
        block.repeat
        * (2.0 * layer.num_heads * workload.seq_len)
        * (layer.head_dim + layer.rope_head_dim + layer.value_head_dim)
        for block in model.decoder_blocks
        for layer in block.layers
        if isinstance(layer, AttentionLayer)
    )
    return whole + core * workload.tokens_per_step
