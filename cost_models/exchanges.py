"""Seconds of what pipeline stages exchange with each other, and of the small exchanges of a step with all ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.collectives import groups_of, seconds, send_seconds
from meshwright.cost_models.stages import Stages
from meshwright.cost_models.strategy import V_SHAPED, IntArray
from meshwright.cost_models.traffic import COUNT_BYTES, LOSS_BYTES, hop_bytes, shared_grad_bytes, tied_bytes
from meshwright.profiler.layers import NormLayer

FloatArray = NDArray[np.float64]


def transfers(stages: Stages) -> FloatArray:
    """Sends and receives of one micro-batch on each chunk, one way: ``[pp, vpp]``, fewer at the model's ends."""
    pp, vpp = stages.counts.shape[:2]
    number = np.full((pp, vpp), 2.0 if pp > 1 else 0.0)
    number[0, 0] -= pp > 1
    number[-1, -1] -= pp > 1
    return number


def splits_vocabulary(stages: Stages) -> bool:
    """Whether every stage has a part of the head: vocabulary parallelism over the pipeline."""
    return bool(np.count_nonzero(stages.counts[:, :, -1]) > 1)


def vocabulary_exchanges(stages: Stages) -> FloatArray:
    """Seconds that a micro-batch's exchanges among all stages take where each has a part of the vocabulary.

    The last hidden states are sent to all and their gradients summed; embeddings are summed and their gradients
    sent to all (arXiv 2411.05288, sections 4 and 5). Left out: what of it hides behind layers, on streams of its
    own, and sums of a number a token.
    """
    if not splits_vocabulary(stages):
        return np.zeros(len(stages.batch))
    groups = groups_of(stages.batch, stages.cluster, stages.placement, "pp")
    num_bytes = hop_bytes(stages.model, stages.workload, stages.batch)
    return np.asarray(sum(2.0 * seconds(stages.cluster, op, groups, num_bytes) for op in ("broadcast", "all_reduce")))


def held(stages: Stages, hop: FloatArray) -> FloatArray:
    """Seconds for which transfers that block hold a rank around each pass of a chunk: ``[num_configs, pp, vpp]``.

    1F1B exchanges with the next rank after a forward, with the one before after a backward: half of both a pass.
    Interleaved, a forward and a backward share one exchange with both (megatron/schedules.py of 2021).
    """
    pp, vpp = stages.counts.shape[:2]
    none = np.zeros((len(stages.batch), 1))
    before, after = (np.concatenate(ends, axis=1) for ends in ([none, hop], [hop, none]))
    both = np.maximum(before, after) if vpp > 1 else before + after
    return np.asarray(both.reshape(-1, vpp, pp).swapaxes(1, 2) / 2.0)


def hops(stages: Stages) -> FloatArray:
    """Seconds of a transfer between each two stages that follow each other: ``[num_configs, pp * vpp - 1]``.

    Without sequence parallelism all tp peers hold the same tensor: where the target ``splits_hops`` each sends its
    share, and they gather it on the other side (Narayanan et al. 2021, arXiv 2104.04473, section 4.1).

    In a V ranks are passed down and back up, and the two stages in its middle are on one rank.
    """
    pp, vpp = stages.counts.shape[:2]
    stride = pp_stride(stages)
    num_bytes = hop_bytes(stages.model, stages.workload, stages.batch)
    gather = np.zeros(len(stages.batch))
    if stages.framework.splits_hops:
        groups = groups_of(stages.batch, stages.cluster, stages.placement, "tp")
        whole = ~stages.batch.sequence_parallel
        gather = np.where(whole, seconds(stages.cluster, "all_gather", groups, num_bytes), 0.0)
        num_bytes = num_bytes / np.where(whole, stages.batch.tp, 1)
    hops = np.zeros((len(stages.batch), pp))
    for rank in range(pp if vpp > 1 else pp - 1):  # the last rank sends its earlier chunks' outputs to the first
        first, second = rank * stride, (rank + 1) % pp * stride
        ends = (send_seconds(stages.cluster, first + peer, second + peer, num_bytes) for peer in (0, stride - 1))
        hops[:, rank] = np.maximum(*ends) + gather
    if stages.schedule in V_SHAPED:
        down = hops[:, : pp - 1]
        return np.concatenate([down, np.zeros((len(stages.batch), 1)), down[:, ::-1]], axis=1)
    return np.tile(hops, vpp)[:, : pp * vpp - 1]


def pp_stride(stages: Stages) -> IntArray:
    """Devices between a rank and its peer on the next stage."""
    stride = np.ones(len(stages.batch), dtype=np.int64)
    for axis in stages.placement.order[: stages.placement.order.index("pp")]:
        stride = stride * getattr(stages.batch, axis)
    return stride


def tied(stages: Stages) -> FloatArray:
    """First and last stage exchange the gradients of a tied embedding's two copies: ``[num_configs, pp]``.

    In a V both copies are on the first rank, which adds them up where they are.
    """
    pp = stages.counts.shape[0]
    result = np.zeros((len(stages.batch), pp))
    if stages.model.tied and pp > 1 and stages.schedule not in V_SHAPED:
        num_bytes = tied_bytes(stages.model, stages.workload, stages.batch)
        result[:, [0, -1]] = send_seconds(stages.cluster, 0, (pp - 1) * pp_stride(stages), num_bytes)[:, None]
    return result


def shared(stages: Stages) -> FloatArray:
    """Gradients of which each tp rank has a part, added up once a step for each chunk, priced as the largest.

    Where ranks meet before each collective (``HostCost.checked_collective_s``) they do for each norm.
    """
    kinds = block_kinds(stages.model).kinds
    num_bytes = stages.by_chunk([shared_grad_bytes(block, stages.workload, stages.batch) for block in kinds])
    groups = groups_of(stages.batch, stages.cluster, stages.placement, "tp")
    one = seconds(stages.cluster, "all_reduce", groups, num_bytes.max(axis=(1, 2)))
    norms = [sum(isinstance(layer, NormLayer) for layer in kind.layers) for kind in kinds]
    on_rank = float(stages.counts.sum(axis=(0, 1)) @ np.array(norms)) / stages.counts.shape[0]
    meeting = stages.framework.host.checked_collective_s * stages.batch.tp * on_rank
    return np.asarray(one * num_bytes.shape[2] + np.where(num_bytes.max(axis=(1, 2)) > 0, meeting, 0.0))


def world(stages: Stages) -> FloatArray:
    """The count of targets before a step and the loss after it: all_reduces of a few bytes over dp and over all."""
    data = groups_of(stages.batch, stages.cluster, stages.placement, "dp", "cp")
    world = groups_of(stages.batch, stages.cluster, stages.placement, *stages.placement.order)
    batch = stages.batch
    ranks = batch.dp * batch.cp * (1 + batch.tp * batch.pp)
    return (
        seconds(stages.cluster, "all_reduce", data, COUNT_BYTES)
        + seconds(stages.cluster, "all_reduce", world, LOSS_BYTES)
        + stages.framework.host.checked_collective_s * ranks
    )
