"""Context parallelism: a sequence cut over the ranks of a cp mesh, attention exact all the same.

Each rank of ``cp = cp_ring * cp_ulysses`` computes every layer on its own tokens alone; only attention sees those of
the others. Ulysses ranks (neighbours) exchange heads for sequence around it (``ulysses``), ring places hand keys and
values round (``ring_attention``); with both, the exchange is inside and the ring outside (USP, arXiv 2405.07719).

A sequence is cut in ``2 * cp_ring`` chunks where there is a ring: its place ``r`` has chunks ``r`` and
``2 * cp_ring - 1 - r``, and the Ulysses ranks of a place have equal consecutive pieces of these two side by side.
Without a ring they have equal consecutive pieces of the whole. Models are told where their tokens stand by
``position_ids``.

What one rank issues for each block and micro-batch: ``b`` sequences of ``s`` tokens here (the whole over cp), ``H``
heads and ``K`` key/value heads here (after tp), of width ``d`` (values ``e``), activations of ``a`` bytes a number.
With Ulysses over ``u``, ``K`` is first raised to the least multiple ``R`` that ``u`` divides and that divides ``H``;
without it ``R = K``. A message of the ring, of one place's keys and values, has ``m = b s R (d + e)`` numbers: Ulysses
makes the sequence ``u`` times as long and the heads ``u`` times fewer.

==========  ==========  =====================================  ==================================================
operator    axis        forward                                backward
==========  ==========  =====================================  ==================================================
all_to_all  cp_ulysses  1 of ``a b s (H d + R (d + e))``:      1 of ``a b s H e``,
                        queries, keys and values together;     1 of ``a b s (H d + R (d + e))``
                        1 of ``a b s H e``: the output
send        cp_ring     ``cp_ring - 1`` of ``a m``             ``cp_ring - 1`` of ``a m``: keys and values;
                                                               ``cp_ring - 1`` of ``g m``: their gradients,
                                                               ``g`` is 4, for float64 8
==========  ==========  =====================================  ==================================================

Full recompute issues the forward's once more in backward, all of them. Selective recompute issues none: it keeps what
the all_to_alls return, and output and log-sum-exp of the ring. Attention without a ring is one call of the kernel. On
the ring step 0 attends over a place's own block (causal), each other step over half of what a block and the queries
make together, without a mask (the first half of the keys, or the second half of the queries); without a causal mask
over all of it. A window is worked out chunk by chunk, and chunks beyond it are passed over; the messages stay.

The rest of a step is that of data parallelism over dp and cp together (``data_parallel``): gradients, ZeRO, the number
of targets. Loss and targets are of a rank's own tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshwright import InputError
from meshwright.executors.mesh import CONTEXT_AXES
from meshwright.executors.ring_attention import Attention, ring_attention
from meshwright.executors.ulysses import exchange_heads, exchange_sequence


def own_positions(sequence: int, *, ring: int, ulysses: int, ring_index: int, ulysses_index: int) -> Tensor:
    """Where in the sequence the tokens of one cp rank stand: ``[sequence / (ring * ulysses)]`` int64, ascending.

    ``ring`` and ``ulysses`` are the degrees, the others this rank's place along them.
    Raises ``InputError`` where the sequence cannot be cut so.
    """
    degree = ring * ulysses
    pieces = math.lcm(degree, 2 * ring) if ring > 1 else degree
    if sequence % pieces:
        raise InputError(
            f"cp={degree} (cp_ring={ring}, cp_ulysses={ulysses}) cuts a sequence into multiples of {pieces}, found "
            f"{sequence} tokens: pad or cut the batch to such a length, with targets of -100 where padded"
        )
    places = torch.arange(sequence)
    if ring > 1:
        chunks = places.chunk(2 * ring)
        places = torch.cat((chunks[ring_index], chunks[2 * ring - 1 - ring_index]))
    return places.chunk(ulysses)[ulysses_index]


class ContextParallel:
    """One rank's cp peers, as attention and the cutting of batches use them: ``mesh`` is ``[cp_ring, cp_ulysses]``."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.ring, self.ulysses = (mesh[name].size() for name in CONTEXT_AXES)
        self._indices = [mesh.get_local_rank(name) for name in CONTEXT_AXES]
        self._ring, self._ulysses = (mesh[name].get_group() if mesh[name].size() > 1 else None for name in CONTEXT_AXES)
        self.num_calls = 0  # attentions computed so far
        self.sequence = 0  # tokens of a whole sequence, of which positions were asked for last

    def positions(self, sequence: int, device: torch.device) -> Tensor:
        """``own_positions`` of this rank."""
        self.sequence = sequence
        ring_index, ulysses_index = self._indices
        return own_positions(
            sequence, ring=self.ring, ulysses=self.ulysses, ring_index=ring_index, ulysses_index=ulysses_index
        ).to(device)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of this rank's queries over the whole sequence: ``[batch, heads, own, value_width]``.

        ``q`` is ``[batch, heads, own, width]``, ``k`` and ``v`` have as many heads or fewer. ``scale`` is one over the
        root of ``width`` if not given. Under a ``window`` a query sees so many keys, itself included; 0: all. ``sinks``
        ``[heads]`` are logits that take part in the softmax and add nothing.

        Raises ``InputError`` for a window without a causal mask, or heads that Ulysses cannot share.
        """
        self.num_calls += 1
        if window and not causal:
            raise InputError("context parallelism computes windows of causal attention only")
        whole = q.shape[-2] * self.ring * self.ulysses
        attention = Attention(
            ring=self._ring,
            causal=causal,
            window=window if window < whole else 0,
            scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        )
        if self._ulysses is None:
            return ring_attention(q, k, v, attention, sinks)
        if sinks is not None:
            sinks = sinks.chunk(self.ulysses)[self._ulysses.rank()]
        q, k, v = exchange_heads(q, k, v, self._ulysses)
        return exchange_sequence(ring_attention(q, k, v, attention, sinks), self._ulysses)
