"""Seconds of one operator on a device, from its efficiency curve: the one place where the curve's form is written.

``seconds = overhead + max(FLOPs / (peak * share), bytes / memory rate)`` (the roofline of Williams, Waterman and
Patterson 2009, doi:10.1145/1498765.1498785), with a share of peak that depends on shape.

*Everywhere* ``share = max_share * m/(m + half_m) * n/(n + half_n) * k/(k + half_k)``: half of the limit at a half size.

*Attention on a GPU* gives each multiprocessor tiles of 128 queries of one head. With ``w = m * n / 128 /
multiprocessors`` tiles on each, the share is multiplied by ``w / (w + half_waves)``, for those idle at the end, since
under a causal mask tiles differ in length (without one they are even: ``w / ceil(w)``), and by ``(min(head_dim, 128) /
128) ** head_exponent``, since exponentials are counted by pairs of query and key and not by FLOPs (FlashAttention-3,
arXiv 2407.08608, section 3.1, on the rates of exponentials and of matmuls).

*Matmuls on a GPU* are cut into tiles of ``tile_m x tile_n`` of the output, one multiprocessor each, in whole waves over
all multiprocessors (NVIDIA, Matrix Multiplication Background User's Guide, sections on tile and wave quantization).
``k`` may be split in up to eight parts, to fill the last wave; their partial sums in float32 are then written to memory
and added up, read from the cache. A small tile reads more numbers for each FLOP: with ``r = (1/128 + 1/256) /
(1/tile_m + 1/tile_n)``, its FLOPs for each number over those of the largest, it reaches ``max_share * r **
tile_exponent``. The library is taken to choose the fastest tile and split:

``busy = min over tiles, splits of max(waves * 2 tile_m tile_n (k/split + half_k) / (peak/multiprocessors * share),
bytes / memory rate) + 4 m n split [split > 1] / memory rate``.

Nothing here is fitted but the fields of ``Efficiency``; tiles are those that cuBLAS and CUTLASS ship, multiprocessors
a datasheet's figure. Left out: transposed operands, switches between kernels of one tile, caches, and clocks that fall
under load; they stand in the curve's residual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from meshwright.profiler.cluster import Efficiency

FloatArray = NDArray[np.float64]

TILES = ((256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128), (64, 64))
SPLITS = (1, 2, 3, 4, 5, 6, 8)
PARTIAL_SUM_BYTES = 4.0  # a float32
QUERY_TILE = 128
_BLOCK = 4096  # shapes
WIDE_HEAD = 128


def kernel_seconds(
    curve: Efficiency,
    *,
    num_multiprocessors: int | None,
    memory_bytes_per_s: float,
    flops: Any,
    num_bytes: Any,
    m: Any,
    n: Any,
    k: Any,
    head_dim: Any = WIDE_HEAD,
    even_tiles: bool = False,
) -> FloatArray:
    """Seconds of each operator; ``flops``, ``num_bytes``, sizes and ``head_dim`` broadcast to the result's shape.

    ``even_tiles`` is attention without a mask. Sizes as ``Efficiency`` names them. Of a grouped matmul
    ``flops / (2 m n k)`` groups run at once. A curve with ``tile_exponent`` or ``half_waves`` is read on
    ``num_multiprocessors`` of the device, which must not be None then.
    """
    m, n, k, flops, num_bytes = (np.asarray(value, dtype=np.float64) for value in (m, n, k, flops, num_bytes))
    share = curve.max_share * m / (m + curve.half_m) * n / (n + curve.half_n)
    moved = num_bytes / memory_bytes_per_s
    if curve.tile_exponent is not None:
        assert num_multiprocessors, f"{curve.op} is tiled, so that its device must say how many multiprocessors it has"
        splits = SPLITS if curve.op == "matmul" else (1,)
        groups = flops / np.maximum(2.0 * m * n * k, 1.0)
        rate = curve.peak_flops_per_s * share
        work = _tiled(
            (curve.tile_exponent, curve.half_k, num_multiprocessors, memory_bytes_per_s),
            splits,
            rate,
            groups,
            num_bytes,
            (m, n, k),
        )
        return np.asarray(curve.overhead_s + work)
    share = share * k / (k + curve.half_k)
    if curve.half_waves or curve.head_exponent:
        assert num_multiprocessors, f"{curve.op} runs in waves, so that its device must say how many multiprocessors"
        waves = m * n / QUERY_TILE / num_multiprocessors
        narrow = np.minimum(np.asarray(head_dim, dtype=np.float64), WIDE_HEAD) / WIDE_HEAD
        idle = np.ceil(waves) - waves if even_tiles and curve.half_waves else curve.half_waves
        share = share * waves / (waves + idle) * narrow**curve.head_exponent
    return np.asarray(curve.overhead_s + np.maximum(flops / (share * curve.peak_flops_per_s), moved))


def _tiled(
    figures: tuple[float, float, int, float],
    splits: tuple[int, ...],
    rate: FloatArray,
    groups: FloatArray,
    num_bytes: FloatArray,
    shape: tuple[FloatArray, FloatArray, FloatArray],
) -> FloatArray:
    """The fastest tile and split for each shape: tiles are a first axis, reduced at the end; splits are tried in turn.

    Shapes are worked on in blocks whose numbers stay in the processor's cache.
    """
    everything = np.broadcast_arrays(rate, groups, num_bytes, *shape)
    flat = [each.reshape(-1) for each in everything]
    found = np.empty(flat[0].shape)
    for start in range(0, len(found), _BLOCK):
        some = slice(start, start + _BLOCK)
        found[some] = _tiled_block(figures, splits, *(each[some] for each in flat))
    return found.reshape(everything[0].shape)


def _tiled_block(
    figures: tuple[float, float, int, float],
    splits: tuple[int, ...],
    rate: FloatArray,
    groups: FloatArray,
    num_bytes: FloatArray,
    m: FloatArray,
    n: FloatArray,
    k: FloatArray,
) -> FloatArray:
    """The same of a block: arrays of one axis."""
    tile_exponent, half_k, num_multiprocessors, memory_bytes_per_s = figures
    tile_m, tile_n = np.array(TILES, dtype=np.float64).T[:, :, None]
    tiles = groups * np.ceil(m / tile_m) * np.ceil(n / tile_n)
    reading = (1 / 128 + 1 / 256) / (1 / tile_m + 1 / tile_n)
    tile_rate = rate / num_multiprocessors * reading**tile_exponent
    size, moved, outputs = 2.0 * tile_m * tile_n, num_bytes / memory_bytes_per_s, groups * m * n
    best = np.full(tiles.shape, np.inf)
    for split in splits:
        seconds = tiles * split
        seconds /= num_multiprocessors
        np.ceil(seconds, out=seconds)  # waves
        seconds *= size
        seconds *= k / split + half_k
        seconds /= tile_rate
        np.maximum(seconds, moved, out=seconds)
        if split > 1:
            seconds += PARTIAL_SUM_BYTES * split * outputs / memory_bytes_per_s
        np.minimum(best, seconds, out=best)
    return np.asarray(best.min(axis=0))
