"""Attention as eager torch runs it in Hugging Face's blocks, operator by operator, context parallelism included.

Written off transformers 5.23 (``models/llama``, ``models/deepseek_v3/modeling_deepseek_v3.py``,
``integrations/sdpa_attention.py``), this package's ``executors/ulysses.py`` and ``ring_attention.py``, and CUDA's
kernels: flash attention saves queries, keys, values, its output and a float32 log-sum-exp, and takes for its backward
the gradient of queries in float32, and of keys and values for every query head (FlashAttention-2,
``csrc/flash_attn/flash_api.cpp: mha_bwd``); torch's memory-efficient kernel, which runs where values are not as wide as
keys (latent attention) and for float32, saves the same.

Left out: rotary tables, the numbers of a row (but for the log-sum-exp), attention sinks, and attention where neither
kernel runs (sliding windows without context parallelism, float32 with grouped heads). The ring is that of its last
place, which holds the most: every block that comes is from an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.eager_writer import Writer
from meshwright.cost_models.tape import Bytes
from meshwright.profiler.layers import AttentionKind, AttentionLayer

FloatArray = NDArray[np.float64]

FLASH_ROWS, FLASH_COLUMNS = 128, 32  # what flash attention's backward rounds sequences and heads up to


@dataclass(frozen=True, slots=True)
class Heads:
    """What one rank attends with: heads of queries, and of keys and values, and their widths in numbers."""

    queries: FloatArray
    keys: FloatArray
    width: int
    value_width: int
    causal: bool


def attention(writer: Writer, layer: AttentionLayer, x: int) -> int:
    """From the residual stream's norm to what is added to the stream; returns the tensor's number."""
    entered = writer.enter(x, layer.hidden)
    heads = layer.num_heads / writer.tp
    mixed = _latent(writer, layer, entered) if _is_latent(layer) else _heads(writer, layer, entered)
    width = heads * layer.value_head_dim
    out = writer.linear(mixed, writer.tokens, width, layer.hidden, bias=layer.out_bias, row_split=True)
    return writer.leave(out, bias=layer.out_bias)


def _is_latent(layer: AttentionLayer) -> bool:
    return layer.attention_kind is AttentionKind.MLA


def _heads(writer: Writer, layer: AttentionLayer, x: int) -> int:
    heads, kv_heads = layer.num_heads / writer.tp, np.maximum(layer.num_kv_heads / writer.tp, 1.0)
    widths = (heads * layer.head_dim, kv_heads * layer.head_dim, kv_heads * layer.value_head_dim)
    query, key, value = (writer.linear(x, writer.tokens, layer.hidden, width, bias=layer.qkv_bias) for width in widths)
    if layer.qk_norm_params == 2 * layer.head_dim:
        query, key = writer.rms_norm(query), writer.rms_norm(key)
    if layer.rotary:
        query, key = _rotary(writer, query), _rotary(writer, key)
    return _attend(
        writer,
        (query, key, value),
        Heads(heads, kv_heads, layer.head_dim, layer.value_head_dim, layer.causal),
    )


def _rotary(writer: Writer, x: int) -> int:
    """``x * cos + cat((-x2, x1)) * sin``; the tables are left out."""
    run, size = writer.tape.run, writer.bytes_of(x)
    by_cos = run(x, size)
    first, second = (run(x, size / 2.0, view_of=x) for _ in range(2))  # whole gradients, zeros but for the half
    turned = run(second, size / 2.0)
    rotated = run((turned, first), size, passes=True)
    return run((by_cos, run(rotated, size)), size, passes=True)


def _interleaved_rotary(writer: Writer, x: int, size: Bytes) -> int:
    """``cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`` of every second number; ``x`` is a view of ``size`` bytes."""
    run, half = writer.tape.run, size / 2.0
    first, second = (run(x, half, view_of=x) for _ in range(2))
    turned = run(second, half)
    left = run((run(first, half), run(turned, half)), half, passes=True)
    right = run((run(second, half), run(first, half)), half, passes=True)
    return run((left, right), size, passes=True)


def _latent(writer: Writer, layer: AttentionLayer, x: int) -> int:
    """MLA: queries and latents down and up again, keys put together in place from two parts (``expand_kv``).

    A view that is kept keeps its storage: values are a view of what the latent's product put out.
    """
    run, tokens, size = writer.tape.run, writer.tokens, writer.size
    heads = layer.num_heads / writer.tp
    nope, rope, value_dim = layer.head_dim, layer.rope_head_dim, layer.value_head_dim
    turned_size = tokens * heads * rope * size
    width, source = layer.hidden, x
    if layer.q_lora_rank:
        width = layer.q_lora_rank
        source = writer.rms_norm(writer.linear(x, tokens, layer.hidden, width, bias=layer.qkv_bias))
    query = writer.linear(source, tokens, width, heads * (nope + rope))
    plain_query = run((), tokens * heads * nope * size, view_of=query, passes=True)
    turned_query = run(query, turned_size, view_of=query)
    latent = writer.linear(x, tokens, layer.hidden, layer.kv_lora_rank + rope, bias=layer.qkv_bias)
    turned_key = run((), tokens * rope * size, view_of=latent, passes=True)
    compressed = writer.rms_norm(run(latent, tokens * layer.kv_lora_rank * size, view_of=latent))
    turned_query = _interleaved_rotary(writer, turned_query, turned_size)
    turned_key = _interleaved_rotary(writer, turned_key, tokens * rope * size)
    query = run((plain_query, turned_query), tokens * heads * (nope + rope) * size, passes=True)
    both = writer.linear(compressed, tokens, layer.kv_lora_rank, heads * (nope + value_dim))
    value = run((), tokens * heads * value_dim * size, view_of=both, passes=True)
    plain_key = run(both, tokens * heads * nope * size, view_of=both)
    shared = run(turned_key, turned_size, view_of=turned_key)  # expanded to all heads
    whole = tokens * heads * (nope + rope) * size
    # written into a part of the whole: backward copies the whole gradient, and the part
    key = run(plain_key, whole, backward=whole)
    key = run((key, shared), whole, view_of=key)
    return _attend(writer, (query, key, value), Heads(heads, heads, nope + rope, value_dim, layer.causal))


# -- between the projections ----------------------------------------------------------------------------------------


def _attend(writer: Writer, reads: tuple[int, int, int], heads: Heads) -> int:
    """The kernel, or the ring of them, with Ulysses' exchanges around it."""
    batch = writer.batch
    ring, ulysses = (batch.cp_ring > 1).any(), (batch.cp_ulysses > 1).any()
    if not (ring or ulysses):
        return _kernel(writer, reads, heads)
    if ulysses:
        reads, heads = _exchange_heads(writer, reads, heads)
    out = _ring(writer, reads, heads) if ring else _one_width_kernel(writer, reads, heads)
    if ulysses:
        return _exchange_sequence(writer, out, heads)
    # what was cut out of wider outputs is laid out anew for the product
    return writer.tape.run(out, writer.bytes_of(out)) if heads.width > heads.value_width else out


def _flash_backward(writer: Writer, heads: Heads, rows: Bytes, keys: Bytes, width: int) -> Bytes:
    """What flash attention's backward takes for itself: ``rows`` padded queries of each head, over ``keys``."""
    columns = np.ceil(width / FLASH_COLUMNS) * FLASH_COLUMNS
    repeated = 2.0 * keys * heads.queries * width * writer.size
    taken = rows * heads.queries * (columns + 1.0) * 4.0 + np.where(heads.queries > heads.keys, repeated, 0.0)
    return np.asarray(taken)


def _rows(writer: Writer) -> FloatArray:
    """Queries of each head that one rank's kernel works on, in the whole micro-batch, padded."""
    length = writer.seq_len / writer.batch.cp_ring
    return np.asarray(writer.batch.micro_batch_size * np.ceil(length / FLASH_ROWS) * FLASH_ROWS, dtype=np.float64)


def _kernel(writer: Writer, reads: tuple[int, int, int], heads: Heads) -> int:
    out = writer.tokens * heads.queries * heads.value_width * writer.size
    statistics = writer.tape.run((), writer.tokens * heads.queries * 4.0, kept=True)
    beside: Bytes = 0.0
    if writer.size < 4.0 and heads.width == heads.value_width:
        beside = _flash_backward(writer, heads, _rows(writer), writer.tokens, heads.width)
    return writer.tape.run(reads, out, saves=(*reads, statistics), saves_output=True, backward=beside, kept=True)


def _one_width_kernel(writer: Writer, reads: tuple[int, int, int], heads: Heads) -> int:
    """One call of the kernel over the whole sequence of some heads; narrow values are widened with zeros for it."""
    size, tokens = writer.size, writer.tokens * writer.batch.cp_ulysses
    width = max(heads.width, heads.value_width)
    out = tokens * heads.queries * width * size
    statistics = writer.tape.run((), tokens * heads.queries * 4.0, kept=True)
    padded = tokens * heads.keys * width * size if width > heads.value_width else 0.0
    beside = _flash_backward(writer, heads, _rows(writer), tokens, width) if size < 4.0 else 0.0
    if width > heads.value_width:  # output, its gradient and values in backward; the values' gradient stays so wide
        beside = beside + 2.0 * out + padded
        writer.tape.gradients[reads[2]] = padded
    return writer.tape.run(
        reads, out, saves=(*reads, statistics), saves_output=True, forward=padded, backward=beside, kept=True,
        repeats=False,
    )  # fmt: skip


def _shared_heads(writer: Writer, heads: Heads) -> FloatArray:
    """Heads of keys and values as Ulysses' ranks share them: the least multiple that they divide (``ulysses.py``)."""
    ranks, found = writer.batch.cp_ulysses, heads.keys.copy()
    most = int((heads.queries / heads.keys).max())
    for times in range(most, 0, -1):
        fits = ((heads.queries / heads.keys) % times == 0) & ((heads.keys * times) % ranks == 0)
        found = np.where(fits, heads.keys * times, found)
    return np.asarray(found)


def _exchange_heads(writer: Writer, reads: tuple[int, int, int], heads: Heads) -> tuple[tuple[int, int, int], Heads]:
    """Heads for sequence: repeated where they are fewer than ranks, packed, sent, taken apart again."""
    run, ranks = writer.tape.run, writer.batch.cp_ulysses
    shared = _shared_heads(writer, heads)
    query, key, value = reads
    query_size, key_size, value_size = (
        writer.tokens * of * width * writer.size
        for of, width in ((heads.queries, heads.width), (shared, heads.width), (shared, heads.value_width))
    )
    if (shared > heads.keys).any():
        key, value = run(key, key_size), run(value, value_size)
    everything = query_size + key_size + value_size
    came = run((query, key, value), everything, kept=True, forward=everything, backward=2.0 * everything)
    # taken apart by one operator, whose backward packs what came for all three
    query = run((), query_size, looks=(came,), passes=True)
    key = run((), key_size, looks=(came,), passes=True)
    value = run(came, value_size, forward=everything)
    return (query, key, value), Heads(
        heads.queries / ranks, shared / ranks, heads.width, heads.value_width, heads.causal
    )


def _exchange_sequence(writer: Writer, out: int, heads: Heads) -> int:
    """Sequence for heads, of the output."""
    size = writer.tokens * writer.batch.cp_ulysses * heads.queries * heads.value_width * writer.size
    came = writer.tape.run(out, size, kept=True, forward=size, backward=2.0 * size)
    return writer.tape.run(came, size, forward=size)


def _ring(writer: Writer, reads: tuple[int, int, int], heads: Heads) -> int:
    """All steps as one operator (``ring_attention.py``).

    Forward: the output so far in float32, a part of it, the product that is added, and one or two messages. Backward:
    gradients of queries in float32; those of keys and values at home, and from the third step on a message with them
    that leaves and one that comes; the part at hand and the one before it.
    """
    batch, size, wide = writer.batch, writer.size, writer.wide
    places = batch.cp_ring
    tokens = writer.tokens * batch.cp_ulysses
    out = tokens * heads.queries * heads.value_width * size
    statistics = writer.tape.run((), tokens * heads.queries * 4.0, kept=True)
    queries, message = tokens * heads.queries * heads.width, tokens * heads.keys * (heads.width + heads.value_width)
    width = max(heads.width, heads.value_width)
    widened = width > heads.value_width
    padded = tokens * heads.keys * width * size if widened else 0.0
    forward = 2.0 * out * (wide / size) + np.where(places > 2, 2.0, 1.0) * message * size + padded
    # keys and values of a block from elsewhere that are met, and their gradients as the kernel gives them
    share = 0.5 if heads.causal else 1.0
    given = tokens * heads.keys * 2.0 * width if widened else message
    kernels = [
        _flash_backward(writer, heads, _rows(writer), tokens * part, width) if size < 4.0 else 0.0
        for part in (1.0, share)
    ]
    if widened:
        kernels = [kernel + 2.0 * tokens * heads.queries * width * size + padded for kernel in kernels]
    sums = wide * (queries + message)
    first = sums + 2.0 * message * size + size * (queries + given) + kernels[0]
    second = sums + np.where(places > 2, 2.0, 1.0) * message * size + kernels[1]
    second = second + size * (2.0 * queries + (1.0 + share) * given)
    later = sums + 2.0 * wide * message + np.where(places > 3, 2.0, 1.0) * message * size + kernels[1]
    later = later + size * 2.0 * (queries + share * given)
    # all done, the last messages still there, gradients cast
    last = sums + 2.0 * wide * message + size * (2.0 * (queries + message) + share * given)
    most = np.maximum(np.maximum(first, second), np.maximum(np.where(places > 2, later, 0.0), last))
    return writer.tape.run(
        reads, out, saves=(*reads, statistics), saves_output=True, forward=forward,
        backward=most - size * (queries + message), kept=True, repeats=False,
    )  # fmt: skip
