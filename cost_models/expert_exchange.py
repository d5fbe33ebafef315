"""Tokens on their way to experts and back: how many rows each rank sends and works on, and what an exchange costs.

A rank holds ``T`` tokens of a micro-batch (its part of the sequence under cp and sequence parallelism), each of which
takes ``k`` experts: ``k T`` rows. Experts are spread over ``ep`` ranks, ``E / ep`` on each, so that all but ``1 / ep``
of the rows leave (dispatch) and come back (combine), forward and backward: four all_to_alls of ``k T hidden`` numbers
(GShard, arXiv 2006.16668, section 3; DeepSpeed-MoE, arXiv 2201.05596, section 5). Where experts are cut by etp, and
etp's ranks hold different tokens, what arrived is gathered over them and the results are reduce-scattered (MoE Parallel
Folding, arXiv 2504.14960, section 3.2); where they hold the same tokens, which is etp = tp without sequence
parallelism, each works on its slice of the width and the sum over tp closes the region.

A kernel that sends a token once to each place (``Dispatch.EACH_RANK``) moves fewer bytes: with experts drawn evenly, a
token that takes ``k`` of ``E`` experts reaches

    D(n) = n (1 - C(E - E/n, k) / C(E, k))

of ``n`` places on average (ranks inside a node, nodes over a network), instead of ``k``; ``1 - 1/n`` of that leaves.

In ``c`` chunks (Tutel, arXiv 2206.03382, section 4.3, "pipelining degree"; FSMoE, arXiv 2501.10714, section 4)
exchanges run on a stream of their own, beside the experts of other chunks: see ``exposed``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.collectives import Groups, seconds
from meshwright.cost_models.expert_traits import Dispatch, ExpertTraits
from meshwright.cost_models.links import algorithms
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.layers import MoeLayer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one expert layer on one rank and micro-batch, arrays of shape ``[num_configs]``.

    ``sent`` are those of its own tokens, a row for each expert that a token takes; ``here`` those that its experts
    work on, of the most loaded rank; ``slower`` how many times the even share that is.
    """

    sent: FloatArray
    here: FloatArray
    slower: FloatArray


def gathers(batch: ConfigBatch) -> NDArray[np.bool_]:
    """Whether the ranks that cut experts among them hold different tokens, which they gather: ``[num_configs]``."""
    return np.asarray((batch.etp > 1) & (batch.sequence_parallel | (batch.tp == 1)))


def rows_of(layer: MoeLayer, workload: Workload, batch: ConfigBatch) -> Rows:
    """The rows of an expert layer under each config, of the most loaded rank where routing is uneven.

    Where a capacity bounds what an expert takes, no rank has more than ``capacity_factor`` times its even share. Left
    out: rows that are dropped before that bound is met by all.
    """
    tokens = batch.micro_batch_size * (workload.seq_len / batch.cp)
    sent = np.where(batch.sequence_parallel, tokens / batch.tp, tokens) * layer.top_k
    slower = workload.routing.of(batch.ep) if workload.routing else np.ones(len(batch))
    if layer.capacity_factor:
        slower = np.minimum(slower, max(layer.capacity_factor, 1.0))
    here = sent * np.where(gathers(batch), batch.etp, 1) * slower
    return Rows(sent, np.asarray(here, dtype=np.float64), np.asarray(slower, dtype=np.float64))


def places_reached(layer: MoeLayer, places: FloatArray) -> FloatArray:
    """Of ``places`` that share the experts evenly, how many hold any expert of one token, on average: ``D`` above."""
    missed, of_each = np.ones_like(places), layer.num_experts / places
    for drawn in range(layer.top_k):
        left = layer.num_experts - drawn
        missed = missed * np.clip((left - of_each) / left, 0.0, 1.0)
    return np.asarray(places * (1.0 - missed))


def exchange_seconds(
    cluster: ClusterProfile,
    op: str,
    groups: Groups,
    message_bytes: FloatArray,
    layer: MoeLayer,
    traits: ExpertTraits,
) -> FloatArray:
    """Seconds of one dispatch or combine (all_to_all), or of what etp gathers and scatters around the experts.

    ``EACH_EXPERT`` is the all_to_all of ``collectives`` over a rank's rows. ``EACH_RANK`` sends ``D(n) / k`` of it over
    each tier, with ``n`` the group's lower domains there (ranks inside a node, nodes over the network).
    """
    if op != "all_to_all":
        return seconds(cluster, op, groups, message_bytes)
    if traits.dispatch is Dispatch.EACH_EXPERT or not cluster.tiers:
        return traits.exchange_factor * seconds(cluster, op, groups, message_bytes)
    (direct,) = algorithms(cluster, op, groups.size, groups.inside)
    low, legs = np.ones_like(groups.size), []
    for leg, inside in zip(direct.legs, groups.inside, strict=True):
        legs.append(replace(leg, share=leg.share * places_reached(layer, groups.size / low) / layer.top_k))
        low = inside
    once = replace(direct, legs=tuple(legs)).seconds(message_bytes)
    return np.where((groups.size > 1) & (message_bytes > 0), traits.exchange_factor * once, 0.0)


def exposed(exchange: FloatArray, compute: FloatArray, chunks: FloatArray) -> FloatArray:
    """Seconds of dispatches and combines, ``exchange`` in all, that stay visible beside ``compute`` of the experts.

    In ``c`` chunks each dispatch and each combine takes ``x = exchange / 2c`` on one stream, where they run in the
    order ``d1 d2 r1 d3 r2 ... dc r(c-1) rc``, and each chunk's experts ``y = compute / c`` on another. With ``y >= 2x``
    the experts wait for the first dispatch alone, and the last combine for them: ``2x + cy``. With ``y <= x`` exchanges
    follow each other without a gap: ``2cx``. In between they do but for a gap before the first combine and one before
    the last: ``2(c - 1)x + 2y``. Whichever is longest is the time of all, of which ``compute`` is taken off. One chunk
    hides nothing.
    """
    x, y = exchange / (2.0 * chunks), compute / chunks
    whole = np.maximum(2.0 * x + chunks * y, 2.0 * chunks * x)
    whole = np.where(chunks > 1, np.maximum(whole, 2.0 * (chunks - 1.0) * x + 2.0 * y), whole)
    return np.asarray(whole - compute)
