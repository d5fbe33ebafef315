"""A layer of experts as eager torch runs it, operator by operator.

Written off transformers 5.23 (``models/mixtral``, ``qwen2_moe``, ``deepseek_v3``, ``gpt_oss``) and this package's
``executors/expert_parallel.py``, ``expert_dispatch.py`` and ``expert_compute.py``. Tokens choose experts evenly. Rows
go to those who hold their expert by all_to_all, in ``ep_chunks`` parts of which the next is on its way while one is
worked on; where etp ranks have other tokens they are gathered and reduce-scattered there; rows are put in the experts'
order and back.

Left out: choices and orders of rows (8 bytes a row each), sums of a router's probabilities.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.eager_writer import Writer
from meshwright.cost_models.tape import Bytes
from meshwright.cost_models.weights import has_biases, has_shared_gate
from meshwright.profiler.layers import MlpLayer, MoeLayer

FloatArray = NDArray[np.float64]


def experts(writer: Writer, layer: MoeLayer, x: int) -> int:
    """From the residual stream's norm to what is added to the stream; returns the tensor's number."""
    if has_shared_gate(layer):  # the shared expert runs first
        shared = _shared(writer, layer, x)
        mixed = _routed(writer, layer, x)
        whole = writer.bytes_of(shared)
        return writer.add(mixed, writer.tape.run(shared, whole, saves=(shared,), backward=whole))
    mixed = _routed(writer, layer, x)
    return writer.add(mixed, _shared(writer, layer, x)) if layer.shared_ffn_size else mixed


def _shared(writer: Writer, layer: MoeLayer, x: int) -> int:
    """What every token takes: a feed-forward of its own, split over tp."""
    shared = MlpLayer(
        hidden=layer.hidden, ffn_size=layer.shared_ffn_size, gated=layer.gated, activation=layer.activation
    )
    return writer.leave(writer.mlp(shared, writer.enter(x, layer.hidden)))


def _routed(writer: Writer, layer: MoeLayer, x: int) -> int:
    tokens, run = writer.shard, writer.tape.run
    routed = run(x, tokens * layer.hidden * 4.0) if layer.float32_router and writer.size < 4.0 else x
    size = writer.wide if layer.float32_router else writer.size
    # a router's weight is small
    logits = run(routed, tokens * layer.num_experts * size, saves=(routed,), kept=True)
    if has_biases(layer):  # softmax of the chosen logits alone
        scores = run(logits, tokens * layer.top_k * writer.size, saves_output=True)
    else:
        logits = logits if layer.float32_router else writer.wider(logits)
        scores = run(logits, tokens * layer.num_experts * writer.wide, saves_output=True)
    mixed = _split(writer, layer, x, scores)
    if writer.split and not writer.sequence_parallel:  # each rank has a part of the sum
        mixed = run(mixed, writer.bytes_of(mixed), passes=True, kept=True)
    return mixed


def _weight_size(writer: Writer, layer: MoeLayer) -> float:
    """Bytes of a number of a token's row once it is weighted, over those before."""
    return 1.0 if layer.narrow_weights else writer.wide / writer.size


def _split(writer: Writer, layer: MoeLayer, x: int, scores: int) -> int:
    run, wide, chunks = writer.tape.run, _weight_size(writer, layer), writer.expert_chunks
    if writer.split and not writer.sequence_parallel:
        x = run(x, writer.bytes_of(x), view_of=x)  # its gradient is summed over tp
    chosen = writer.shard * layer.top_k / chunks
    row = chosen * layer.hidden * writer.size
    away = [_send(writer, x, row)]
    back = []
    for number in range(chunks):
        if number + 1 < chunks:
            away.append(_send(writer, x, row))
        back.append(_receive(writer, layer, away[number], chosen))
    summed = []
    # both factors' gradients; that of the rows is cast, when what was worked out again for it is gone
    beside = (2.0 * wide - writer.recomputes) * row if wide > 1.0 else row
    for rows in back:
        choices = run(rows, row)
        weighted = run((choices, scores), row * wide, saves=(choices,), backward=beside)
        summed.append(run(weighted, row * wide / layer.top_k, passes=True))
    whole = writer.shard * layer.hidden * writer.size * wide
    mixed = run(tuple(summed), whole, passes=True) if chunks > 1 else summed[0]
    mixed = writer.narrower(mixed) if wide > 1.0 else mixed
    run((), looks=(*away, *back, *summed))  # the layer's lists hold them until it returns
    return mixed


def _send(writer: Writer, x: int, row: Bytes) -> int:
    """A row for each choice, sorted by expert, on its way; backward puts them in the choices' order first."""
    rows = writer.tape.run(x, row, backward=row)
    return writer.tape.run(rows, row, kept=True) if writer.exchanges else rows


def _receive(writer: Writer, layer: MoeLayer, rows: int, chosen: FloatArray) -> int:
    """Through the experts, and back to where they came from."""
    run, row = writer.tape.run, writer.bytes_of(rows)
    arrived = chosen * writer.batch.etp if writer.gathers_rows else chosen
    whole = arrived * layer.hidden * writer.size
    if writer.gathers_rows:
        rows = run(rows, whole, kept=True)
    if writer.exchanges or writer.gathers_rows:
        out = run(_work(writer, layer, run(rows, whole), arrived), whole)  # in the experts' order and back
    else:
        out = _work(writer, layer, rows, arrived)
    if writer.gathers_rows:
        out = run(out, row, looks=(rows,), kept=True)
    return run(out, row, kept=True) if writer.exchanges else out


def _work(writer: Writer, layer: MoeLayer, rows: int, arrived: FloatArray) -> int:
    """The experts on rows sorted by expert: two grouped products around the activation."""
    ffn = layer.expert_ffn_size / writer.batch.etp
    ways_in = 2.0 if layer.gated else 1.0
    inner = _grouped(writer, layer, rows, arrived, layer.hidden, ways_in * ffn)
    if has_biases(layer):
        inner = _clamped_gate(writer, inner)
    elif layer.gated:
        inner = _gate(writer, inner)
    else:
        inner = writer.activation(layer.activation, inner)
    leaves = writer.exchanges or writer.gathers_rows  # then selective recompute keeps what comes back instead
    return _grouped(writer, layer, inner, arrived, ffn, layer.hidden, kept=not leaves)


def _grouped(
    writer: Writer, layer: MoeLayer, x: int, rows: FloatArray, inputs: Bytes, outputs: Bytes, *, kept: bool = True
) -> int:
    run, size = writer.tape.run, rows * outputs * writer.size
    weights = layer.num_experts / writer.batch.ep * inputs * outputs * writer.size
    product = run(x, size, saves=(x,), weights=weights, kept=kept)
    if not has_biases(layer):
        return product
    biases = run((), size)  # a row for each
    return run((product, biases), size, passes=True)


def _gate(writer: Writer, inner: int) -> int:
    """``act(gate) * up`` of the halves of one tensor, whose gradients are put together."""
    run, half = writer.tape.run, writer.bytes_of(inner) / 2.0
    up = run((), half, view_of=inner, passes=True)
    gate = run(inner, half, view_of=inner)
    active = run(gate, half, saves=(gate,))
    return run((active, up), half, saves=(active, up))


def _clamped_gate(writer: Writer, inner: int) -> int:
    """gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)`` of every second column, each clamped first."""
    run, half = writer.tape.run, writer.bytes_of(inner) / 2.0
    gate, up = (run(inner, half, view_of=inner) for _ in range(2))
    gate, up = (run(one, half, saves=(one,)) for one in (gate, up))
    sigmoid = run(run(gate, half), half, saves_output=True)
    glu = run((gate, sigmoid), half, saves=(gate, sigmoid))
    plus = run(up, half, passes=True)
    return run((plus, glu), half, saves=(plus, glu))
