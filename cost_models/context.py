"""What context parallelism exchanges around and beside attention: how often, how many bytes, and how long.

Ranks ``cp = cp_ring * cp_ulysses`` (R and U here) each hold ``1 / cp`` of a sequence. Ulysses (arXiv 2309.14509,
section 3.1) trades heads for sequence: before attention an all_to_all leaves a rank ``1 / U`` of its heads over the
tokens of all U, after it one goes back. A ring (arXiv 2310.01889) then passes keys and values of a place on R - 1
times, so that every query meets every key; with both, the exchange is inside (USP, arXiv 2405.07719, section 3).

A message of the ring has ``b * s / R * kv * (d + e)`` numbers: ``b`` sequences of ``s`` tokens, ``kv`` key/value heads
on a rank after tp and Ulysses, of width ``d`` and ``e``. Latent attention sends keys and values of all heads, made from
the latent before attention, as Transformer Engine does (context_parallel.py of its PyTorch attention).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.collectives import Groups, sent_seconds
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.issued import Collective, Phase
from meshwright.cost_models.strategy import ConfigBatch, Recompute
from meshwright.cost_models.workload import Workload
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.layers import AttentionKind, AttentionLayer
from meshwright.profiler.model import Block

FloatArray = NDArray[np.float64]
LSE_BYTES = 4.0  # log-sum-exp of a query and head


def exchanged_kv_heads(layer: AttentionLayer, batch: ConfigBatch, framework: Framework) -> FloatArray:
    """Key/value heads of one rank after tp, as they are exchanged: ``[num_configs]``.

    Where Ulysses' ranks do not divide them they are repeated until they do (``executors/ulysses.py``; so in DeepSpeed
    and Transformer Engine); that number divides the query heads, which both divide.
    """
    if layer.attention_kind is AttentionKind.MLA or framework.context.whole_heads:
        return np.asarray(layer.num_heads / batch.tp, dtype=np.float64)
    return np.lcm(np.maximum(layer.num_kv_heads // batch.tp, 1), batch.cp_ulysses).astype(np.float64)


def context_traffic(block: Block, workload: Workload, batch: ConfigBatch, framework: Framework) -> list[Collective]:
    """What the attentions of ``block`` issue over ``cp_ulysses`` and ``cp_ring`` for a micro-batch on one rank.

    Ours: the table of ``executors/context_parallel.py``. Of each ring R - 1 messages of keys and values forward, as
    many backward, and R - 1 of their gradients; a target that gathers them does so both ways, and scatters gradients.
    Full recompute repeats the forward's; selective recompute where attention or the gathers of sequence parallelism
    are.
    """
    entries: list[Collective] = []
    if not (batch.cp > 1).any():
        return entries
    for layer in block.layers:
        if isinstance(layer, AttentionLayer):
            entries += _of_attention(layer, workload, batch, framework)
    return entries


def _of_attention(
    layer: AttentionLayer, workload: Workload, batch: ConfigBatch, framework: Framework
) -> list[Collective]:
    traits, size = framework.context, float(workload.recipe.compute.num_bytes)
    tokens = batch.micro_batch_size * (workload.seq_len / batch.cp)
    heads, kv_heads = layer.num_heads / batch.tp, exchanged_kv_heads(layer, batch, framework)
    query, value = layer.head_dim + layer.rope_head_dim, layer.value_head_dim
    queries, output = size * tokens * heads * query, size * tokens * heads * value
    # of a place: Ulysses makes tokens U times as many and heads U times fewer
    keys = size * tokens * kv_heads * (query + value)
    gradients = keys * _width(workload, framework)
    handed_on = keys
    if traits.bidirectional:  # the larger of what goes one way and what comes back
        handed_on = np.maximum(queries, output + LSE_BYTES * tokens * heads)
    again = batch.is_recompute(Recompute.FULL)
    if framework.selective.core or framework.selective.gathers:
        again = again | batch.is_recompute(Recompute.SELECTIVE)
    ring, hops = batch.cp_ring > 1, np.asarray(batch.cp_ring - 1.0, dtype=np.float64)
    parts = 1.0 if traits.exchanges_together else 3.0
    entries = []
    often: dict[Phase, FloatArray] = {"forward": np.ones(len(batch)), "recompute": np.where(again, 1.0, 0.0)}
    often["backward"] = often["forward"]
    for phase, on in often.items():
        exchanged = np.where(batch.cp_ulysses > 1, on, 0.0)
        entries += [
            Collective("cp_ulysses", "all_to_all", phase, parts * exchanged, (queries + keys) / parts),
            Collective("cp_ulysses", "all_to_all", phase, exchanged, output),
        ]
        if traits.gathers:
            entries.append(Collective("cp_ring", "all_gather", phase, np.where(ring, on, 0.0), batch.cp_ring * keys))
        else:
            sent = keys if phase == "backward" else handed_on
            entries.append(Collective("cp_ring", "send", phase, np.where(ring, hops * on, 0.0), sent))
    if traits.gathers:
        scattered = np.asarray(batch.cp_ring * gradients, dtype=np.float64)
        entries.append(Collective("cp_ring", "reduce_scatter", "backward", np.where(ring, 1.0, 0.0), scattered))
    else:
        entries.append(Collective("cp_ring", "send", "backward", hops, gradients))
    return entries


def _width(workload: Workload, framework: Framework) -> float:
    """Bytes of a gradient of a key on its way over those of the key."""
    size = workload.recipe.compute.num_bytes
    return max(size, 4) / size if framework.context.float32_grads else 1.0


def hideable(workload: Workload, batch: ConfigBatch, framework: Framework) -> FloatArray:
    """Share of a ring's messages backward that have a kernel beside them: ``[num_configs]``.

    All, or all but one of R - 1 messages of gradients, each ``w`` times as long as one of keys and values, of which
    there are as many: ``1 - w / ((1 + w) (R - 1))``.
    """
    if not framework.context.last_waits:
        return np.ones(len(batch))
    width = _width(workload, framework)
    return np.asarray(1.0 - width / ((1.0 + width) * np.maximum(batch.cp_ring - 1.0, 1.0)), dtype=np.float64)


def hop_seconds(cluster: ClusterProfile, groups: Groups, num_bytes: Any) -> FloatArray:
    """Seconds in which every rank of a ring has handed its message to the next one: the slowest link's.

    Where a ring crosses nodes each message crosses to the next node with one rank, while the other rings of these
    nodes do the same: a ring with ``m`` ranks in a node has ``m`` devices' shares of the ports.
    """
    num_bytes = np.broadcast_to(np.asarray(num_bytes, dtype=np.float64), groups.size.shape)
    result = np.zeros(groups.size.shape)
    below = np.vstack([np.ones_like(groups.inside[:1]), groups.inside[:-1]])
    for tier, low, high in zip(cluster.tiers, below, groups.inside, strict=True):
        result = np.where(high > low, np.maximum(result, sent_seconds(tier, low, num_bytes)), result)
    return np.where((groups.size > 1) & (num_bytes > 0), result, 0.0)


def beside(core: FloatArray, batch: ConfigBatch) -> FloatArray:
    """Seconds of attention's kernels beside which messages of a ring may travel: all steps but the last."""
    return np.asarray(core * (1.0 - 1.0 / batch.cp_ring))
