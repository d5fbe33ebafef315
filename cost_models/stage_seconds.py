"""Seconds of a step for configs of one pipeline shape: stages played by their schedule, the slowest rank told apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import exchanges, pipeline
from meshwright.cost_models.framework import microbatches_per_round, num_microbatches, reduce_overlap
from meshwright.cost_models.host import launches_ahead
from meshwright.cost_models.parts import BlockParts, hide
from meshwright.cost_models.stages import Stages, sum_of
from meshwright.cost_models.strategy import SPLIT_BACKWARD, V_SHAPED

FloatArray = NDArray[np.float64]
_EXPOSED = ("host", "tp", "cp", "ep", "dp")  # parts of a forward and of a backward beside their compute


def cost(stages: Stages, parts: list[BlockParts], *, tells_waits: bool) -> dict[str, FloatArray]:
    """The breakdown of the rank that finishes last."""
    count = num_microbatches(stages.batch, stages.workload).astype(np.float64)[:, None]
    forward = stages.by_chunk(
        [sum_of(part, ("compute_forward", *(f"{name}_forward" for name in _EXPOSED))) for part in parts]
    )
    backward = stages.by_chunk(
        [sum_of(part, ("compute_backward", "recompute", *(f"{name}_backward" for name in _EXPOSED))) for part in parts]
    )
    hop = exchanges.hops(stages)
    wait = stages.framework.host.microbatch_s
    transfers = exchanges.transfers(stages) * stages.framework.host.hop_s
    exchanged = exchanges.vocabulary_exchanges(stages)[:, None]
    forward, backward = (each + exchanged[:, :, None] / 2.0 / each.shape[2] for each in (forward, backward))
    held = np.zeros_like(forward)
    if stages.schedule in stages.framework.blocking_hops:
        held, hop = exchanges.held(stages, hop), np.zeros_like(hop)
    forward, backward = (each + wait / 2.0 / stages.counts.shape[1] + transfers + held for each in (forward, backward))
    weights = stages.by_chunk([part.compute_weights for part in parts])
    finish, met = _finish(stages, forward, backward, weights, hop), _met(stages)
    apart = tells_waits and hop.any()
    unhindered = _finish(stages, forward, backward, weights, np.zeros_like(hop)) if apart else finish
    finish, unhindered = finish - met, unhindered - met
    if exchanges.splits_vocabulary(stages):  # its barriers let one more micro-batch into the pipeline
        finish, unhindered = (
            each + (forward + backward).sum(axis=2).max(axis=1, keepdims=True) for each in (finish, unhindered)
        )
    busy = count * (forward + backward).sum(axis=2)
    idle = np.maximum(finish - busy, 0.0)
    waits = np.clip(finish - unhindered, 0.0, idle)
    first, first_hidden, last, last_hidden, delay = edges(stages, parts)
    end, shared = stages.by_rank(parts, "dp_end"), exchanges.shared(stages)[:, None]
    optimizer, host = stages.by_rank(parts, "optimizer"), stages.by_rank(parts, "optimizer_host")
    tied = exchanges.tied(stages)
    total = busy + idle + delay + first + last + end + shared + tied + optimizer + host
    slowest = np.argmax(total, axis=1)
    result = {
        "compute_s": count * stages.by_rank(parts, "compute_forward", "compute_backward"),
        "recompute_s": count * stages.by_rank(parts, "recompute"),
        "tp_s": count * stages.by_rank(parts, "tp_forward", "tp_backward") + shared,
        "cp_s": count * stages.by_rank(parts, "cp_forward", "cp_backward"),
        "ep_s": count * stages.by_rank(parts, "ep_forward", "ep_backward"),
        "pp_s": waits + tied + count * (2.0 * held.sum(axis=2) + exchanged),
        "dp_s": count * stages.by_rank(parts, "dp_forward", "dp_backward") + first + last + end,
        "bubble_s": idle - waits + delay,
        "optimizer_s": optimizer,
        "overhead_s": count
        * (stages.by_rank(parts, "host_forward", "host_backward") + wait + 2.0 * transfers.sum(axis=1))
        + host
        + stages.framework.host.step_s
        + exchanges.world(stages)[:, None],
        "hidden_s": count * stages.by_rank(parts, "hidden") + first_hidden + last_hidden,
    }
    rows = np.arange(len(stages.batch))
    return {name: value[rows, slowest] for name, value in result.items()}


def _finish(
    stages: Stages, forward: FloatArray, backward: FloatArray, weights: FloatArray, hop: FloatArray
) -> FloatArray:
    """Seconds from the start to each rank's last action: ``[num_configs, pp]``; ``weights`` is part of backward."""
    count = num_microbatches(stages.batch, stages.workload)
    if stages.counts.shape[0] == 1:
        return np.asarray(count[:, None] * (forward + backward).sum(axis=2))
    per_round = microbatches_per_round(stages.batch, stages.workload)
    return pipeline.finish(stages.schedule, forward, backward - weights, weights, hop, count, per_round)


def _met(stages: Stages) -> FloatArray:
    """Seconds that the way of a micro-batch down the pipeline and back counts twice: ``[pp]``.

    What a send costs its host and what the receive costs the other one (``HostCost.hop_s``) pass at the same time where
    ranks wait for each other, as they do in the warm-up and the cool-down; in between both are work of either rank.
    """
    pp, vpp = stages.counts.shape[:2]
    down = 0.0 if vpp > 1 else pp - 1.0
    up = np.zeros(pp) if vpp > 1 else pp - 1.0 - np.arange(pp)
    return np.asarray(stages.framework.host.hop_s * (down + up))


def edges(stages: Stages, parts: list[BlockParts]) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Gathers of the first forward and reductions of the last backward: exposed and hidden, and whom they delay.

    On a device without streams they stand in the way of the first micro-batch down the pipeline and of the last one
    back: a rank waits for the reductions of the ranks after it on the way back, and for all gathers on the way in.
    """
    streams = launches_ahead(stages.cluster.device)
    gather = np.array([[stages.framework.overlap_dp_gather * streams]])
    reduce = reduce_overlap(stages.framework, stages.batch)[:, None] * streams
    if stages.schedule in SPLIT_BACKWARD and stages.framework.torch_schedules:
        reduce = np.zeros_like(reduce)  # reduced after all of a stage's (``DataParallel.after_weight_gradients``)
    first, first_hidden = _beside_chunks(stages, parts, "dp_first", gather, "compute_forward")
    last, last_hidden = _beside_chunks(stages, parts, "dp_last", reduce, "compute_backward", "recompute")
    delay = np.zeros_like(first)
    if not streams:
        from_later = np.cumsum(last[:, ::-1], axis=1)[:, ::-1] - last
        delay = from_later + first.sum(axis=1, keepdims=True) - first
    return first, first_hidden, last, last_hidden, delay


def _beside_chunks(
    stages: Stages, parts: list[BlockParts], name: str, share: FloatArray, *compute: str
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
        stages.by_chunk([sum_of(part, names) for part in parts]) for names in ((name,), (f"{name}_inside",), compute)
    )
    rounds = np.ones(len(stages.batch))
    if stages.schedule not in V_SHAPED:
        rounds = microbatches_per_round(stages.batch, stages.workload).astype(np.float64)
    earlier = np.cumsum(work, axis=2) - work
    window = earlier * rounds[:, None, None] + work
    late = np.maximum((np.cumsum(share[:, :, None] * wanted, axis=2) - window).max(axis=2), 0.0)
    total = wanted.sum(axis=2)
    return hide(total, share, share * total - late, stages.cluster, near.sum(axis=2))
