"""Feed-forward layers of one block: a dense one, or routed experts with the router and the moves around them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.expert_exchange import places_reached, rows_of
from meshwright.cost_models.expert_traits import Dispatch
from meshwright.cost_models.operators import Operators
from meshwright.profiler.layers import MoeLayer

FloatArray = NDArray[np.float64]


def add_mlp(
    ops: Operators, hidden: int, ffn_size: int, gated: bool, *, bias: bool = False, activation: str = ""
) -> None:
    """Add every operator of a dense feed-forward layer, or of shared experts."""
    width = ffn_size / ops.tp
    if gated and ops.framework.fused_projections:
        ops.matmul(ops.tokens, 2.0 * width, hidden, bias=bias, cut="columns")
    else:
        for place in range(2 if gated else 1):
            ops.matmul(ops.tokens, width, hidden, bias=bias, also=place, cut="columns")
        ops.branch(1 if gated else 0)
    table = ops.framework.pointwise
    simple = table.squared_relu if activation == "relu2" and table.squared_relu else table.activation
    ops.pointwise(table.gated_activation if gated else simple, ops.tokens * width)
    ops.matmul(ops.tokens, hidden, width, bias=bias, cut="rows")


def add_experts(ops: Operators, layer: MoeLayer) -> None:
    """Add router, shared experts, the moves of rows inside the rank, and its routed experts as grouped matmuls.

    The rank with the most rows is the one that counts; its experts share them evenly. Each chunk of tokens is a
    grouped matmul of its own, which reads the experts' weights again.
    """
    table, batch = ops.framework.pointwise, ops.batch
    rows, experts = rows_of(layer, ops.workload, batch), layer.num_experts / batch.ep
    width, chunks = layer.expert_ffn_size / batch.etp, batch.ep_chunks.astype(np.float64)
    ops.matmul(ops.stream_tokens, float(layer.num_experts), layer.hidden, whole=True)
    ops.pointwise(table.router, ops.stream_tokens * layer.num_experts)
    before = ops.marks()
    ops.pointwise(table.routing, _moved(ops, layer, rows.sent, rows.here) * layer.hidden)
    ops.only_experts(before)
    ways_in = 2.0 if layer.gated else 1.0
    before = ops.marks()
    ops.grouped(rows.here, experts, ways_in * width, layer.hidden, chunks, inner="output")
    activation = table.gated_activation if layer.gated else table.activation
    ops.pointwise(activation, rows.here * width * (not ops.framework.experts.fused))
    ops.grouped(rows.here, experts, layer.hidden, width, chunks, inner="input")
    ops.only_experts(before, beside_exchange=True)
    if layer.shared_ffn_size:
        add_mlp(ops, layer.hidden, layer.shared_ffn_size, layer.gated)
    ops.last = np.zeros(len(batch))  # outputs are weighted by the router's gate, so that a recomputed block has them


def _moved(ops: Operators, layer: MoeLayer, sent: FloatArray, here: FloatArray) -> FloatArray:
    """Rows read or written inside a rank between the residual stream and the experts, and back.

    Tokens are copied out, a row for each expert, in the order of experts, and their results added up again: ``2 + 2/k``
    times the rows. Behind an all_to_all what came from each rank is in its own order, and is put in the order of
    experts, and back: 4 times more where a rank has several. What arrived once for each rank is copied out there
    instead.
    """
    batch, k = ops.batch, float(layer.top_k)
    several = (batch.ep > 1) & (layer.num_experts > batch.ep)
    if ops.framework.experts.dispatch is Dispatch.EACH_RANK:
        arrived = places_reached(layer, batch.ep.astype(np.float64)) / k
        moved = 2.0 * here * (1.0 + arrived)
    else:
        moved = sent * (2.0 + 2.0 / k) + 4.0 * several * here
    padded = 4.0 * here if ops.framework.experts.pads_rows and ops.narrow is not None else 0.0
    return np.asarray(moved + padded)
