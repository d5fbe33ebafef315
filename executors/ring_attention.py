"""Exact attention over a sequence cut over the ranks of a ring, keys and values travelling (arXiv 2310.01889).

With ``n`` ranks the sequence has ``2 n`` chunks and place ``r`` holds chunks ``r`` and ``2 n - 1 - r``, so that under a
causal mask all places have equal work (the zigzag of the public ring-flash-attention, and of Llama 3, arXiv 2407.21783
section 3.3.2). Every step a rank hands its block of keys and values on to the next while it attends over it; after
``n - 1`` steps it has seen all. What the mask hides is not computed: of an earlier place's block all queries see the
first half of the keys, of a later place's block the second half of the queries sees all keys.

Backward, the blocks go round again, and gradients of keys and values go round behind them, in float32 for half types:
each rank adds its part, the last hands the sum home.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.executors.attention_kernels import Band, attend, attend_backward, merge
from meshwright.executors.recompute import kept_outputs
from meshwright.profiler.record import record

_KEYS, _GRADIENTS = 0, 1  # tags: both travel at a time
_Part = tuple[slice, slice, Band | None]


@record
class Attention:
    """What an attention computes, and the ring it runs on (None: keys are all here).

    ``window`` is the number of keys that a query sees, itself included; 0 without one.
    """

    ring: dist.ProcessGroup | None
    causal: bool
    window: int
    scale: float


def ring_attention(q: Tensor, k: Tensor, v: Tensor, attention: Attention, sinks: Tensor | None = None) -> Tensor:
    """``[batch, heads, own, value_width]`` from this rank's queries, keys and values, of ``own`` tokens each.

    ``sinks`` ``[heads]`` are logits of one more key for each head, whose value is zero (gpt-oss).
    """
    out: Tensor = _RingAttention.apply(q, k, v, sinks, attention)
    return out


def parts(rank: int, source: int, places: int, length: int, *, causal: bool, window: int) -> list[_Part]:
    """Which queries of place ``rank`` see which keys of place ``source``, how: ``(queries, keys, band)`` each.

    ``length`` tokens are at each place: two chunks, or the whole sequence where there is one place.
    """
    everything = slice(0, length)
    if not causal:
        return [(everything, everything, None)]
    if places == 1 or (source == rank and not window):
        return [(everything, everything, Band(window=window))]
    half = length // 2
    if not window:
        return [(everything, slice(0, half), None) if source < rank else (slice(half, length), everything, None)]
    found: list[_Part] = []
    for first_query, query_chunk in ((0, rank), (half, 2 * places - 1 - rank)):
        for first_key, key_chunk in ((0, source), (half, 2 * places - 1 - source)):
            offset = (query_chunk - key_chunk) * half
            if offset < 0 or offset - (half - 1) >= window:
                continue
            # rows without a key would divide by zero: far queries and far keys stay out
            queries = min(half, window + half - 1 - offset)
            unseen = max(0, offset - window + 1)
            found.append(
                (
                    slice(first_query, first_query + queries),
                    slice(first_key + unseen, first_key + half),
                    Band(offset=offset - unseen, window=window),
                )
            )
    return found


class _Hop:
    """A message on its way to the next rank of the ring, and the one from the previous rank that comes instead."""

    def __init__(self, sent: Tensor, ring: dist.ProcessGroup, tag: int) -> None:
        self._sent, self._received = sent, torch.empty_like(sent)
        rank, size = ring.rank(), ring.size()
        ends = [
            dist.P2POp(dist.isend, sent, group=ring, tag=tag, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, self._received, group=ring, tag=tag, group_peer=(rank - 1) % size),
        ]
        self._works = dist.batch_isend_irecv(ends)

    def arrived(self) -> Tensor:
        """Wait for both ends; what came."""
        for work in self._works:
            work.wait()
        return self._received


class _Block:
    """Keys and values of one place in one message."""

    def __init__(self, k: Tensor, v: Tensor, flat: Tensor | None = None) -> None:
        self._shapes = k.shape, v.shape
        self.k, self.v = k, v
        self.flat = flat

    def packed(self) -> Tensor:
        """The message."""
        if self.flat is None:
            self.flat = torch.cat((self.k.reshape(-1), self.v.reshape(-1)))
        return self.flat

    def of(self, flat: Tensor) -> _Block:
        """Another place's block, or the gradients of one, as they came."""
        k_shape, v_shape = self._shapes
        k, v = flat.split((k_shape.numel(), v_shape.numel()))
        return _Block(k.view(k_shape), v.view(v_shape), flat)


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attention: Attention) -> tuple[Tensor, Tensor]:
    """The whole's output in the type of ``q``, and its lse."""
    ring, length = attention.ring, q.shape[-2]
    rank, places = (ring.rank(), ring.size()) if ring else (0, 1)
    block = _Block(k, v)
    out: Tensor | None = None
    lse: Tensor | None = None
    for step in range(places):
        hop = _Hop(block.packed(), ring, _KEYS) if ring and step < places - 1 else None
        source = (rank - step) % places
        for queries, keys, band in parts(
            rank, source, places, length, causal=attention.causal, window=attention.window
        ):
            part_out, part_lse = attend(
                q[:, :, queries], block.k[:, :, keys], block.v[:, :, keys], band, attention.scale
            )
            if out is None and part_lse.shape[-1] == length:
                out, lse = part_out.to(part_lse.dtype) if places > 1 else part_out, part_lse
                continue
            if out is None or lse is None:
                out = part_out.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=part_lse.dtype)
                lse = part_lse.new_full(q.shape[:-1], -torch.inf)
            merge(out[:, :, queries], lse[:, :, queries], part_out, part_lse)
        if hop is not None:
            block = block.of(hop.arrived())
    assert out is not None and lse is not None
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out, lse = out * (lse - whole).exp_()[..., None], whole
    return out.to(q.dtype), lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attention: Attention
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values of this rank."""
    ring, length = attention.ring, q.shape[-2]
    rank, places = (ring.rank(), ring.size()) if ring else (0, 1)
    block = _Block(k, v)
    if ring is None:
        ((_, _, band),) = parts(0, 0, 1, length, causal=attention.causal, window=attention.window)
        return attend_backward(grad, q, k, v, out, lse, band, attention.scale)
    to_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    home = sums = block.of(torch.zeros(k.numel() + v.numel(), dtype=lse.dtype, device=k.device))
    gradients: _Hop | None = None
    for step in range(places):
        hop = _Hop(block.packed(), ring, _KEYS) if step < places - 1 else None
        source = (rank - step) % places
        found = []
        for queries, keys, band in parts(
            rank, source, places, length, causal=attention.causal, window=attention.window
        ):
            here = attend_backward(
                grad[:, :, queries], q[:, :, queries], block.k[:, :, keys], block.v[:, :, keys],
                out[:, :, queries], lse[:, :, queries], band, attention.scale,
            )  # fmt: skip
            to_q[:, :, queries].add_(here[0])
            found.append((keys, here[1], here[2]))
        if gradients is not None:
            sums = block.of(gradients.arrived())
        elif step == 1:
            sums = block.of(torch.zeros_like(home.packed()))
        for keys, to_k, to_v in found:
            sums.k[:, :, keys].add_(to_k)
            sums.v[:, :, keys].add_(to_v)
        if step > 0:
            gradients = _Hop(sums.packed(), ring, _GRADIENTS)
        if hop is not None:
            block = block.of(hop.arrived())
    if gradients is not None:
        home.packed().add_(gradients.arrived())
    return to_q.to(q.dtype), home.k.to(k.dtype), home.v.to(v.dtype)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attention: Attention) -> Tensor:
        def blank() -> tuple[Tensor, Tensor]:
            wide = torch.float64 if q.dtype is torch.float64 else torch.float32
            return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=wide)

        out, lse = kept_outputs(lambda: _forward(q, k, v, sinks, attention), blank)
        ctx.attention = attention
        ctx.save_for_backward(q, k, v, out, lse, *(() if sinks is None else (sinks,)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *sinks = ctx.saved_tensors
        to_q, to_k, to_v = _backward(grads[0], q, k, v, out, lse, ctx.attention)
        to_sinks = None
        if sinks:  # a key whose value is zero: its probability times (0 - grad . out)
            share = (sinks[0].to(lse.dtype)[:, None] - lse).exp_()
            to_sinks = -(share * (grads[0] * out).sum(-1, dtype=lse.dtype)).sum((0, 2)).to(sinks[0].dtype)
        return to_q, to_k, to_v, to_sinks, None
