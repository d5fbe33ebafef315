"""Operators added up: matmuls and memory-bound passes of one block on one rank, in seconds and in launches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.framework import Framework, PointwiseCost
from meshwright.cost_models.host import launches_ahead
from meshwright.cost_models.roofline import operator_seconds
from meshwright.cost_models.strategy import ConfigBatch, IntArray
from meshwright.cost_models.workload import DType, Workload
from meshwright.profiler.cluster import Device
from meshwright.profiler.efficiency import WIDE_HEAD

FloatArray = NDArray[np.float64]
HOPPER = ("H100", "H200", "H800")  # kinds of devices
# Seconds of a half-precision matmul over those of an aligned one, where rows of its operands are no multiple of 16
# bytes, so that tensor cores are fed by narrow loads (NVIDIA, Matrix Multiplication Background User's Guide, section
# Tensor Core Requirements). The head of vTrain's runs with tp 1 reaches 80 TFLOP/s over 50,257 words, 210 and more
# where the vocabulary is split and padded; padding made all of nanoGPT a quarter faster (github.com/karpathy/nanoGPT).
UNALIGNED, ALIGNMENT = 2.8, 8


class Operators:
    """Adds up the operators of a block: seconds of kernels and launches, forward and backward.

    Everything is an array of shape ``[num_configs]``. ``forward`` is made of ``projections``, ``core`` (attention
    between its projections) and ``rest`` (what is memory-bound); ``*_calls`` count launches.
    """

    def __init__(
        self, workload: Workload, device: Device, framework: Framework, batch: ConfigBatch, narrow: DType | None = None
    ) -> None:
        self.workload, self.device, self.framework, self.batch = workload, device, framework, batch
        self.dtype, self.narrow = workload.recipe.compute, narrow
        self.size = float(self.dtype.num_bytes)
        self.wide = max(self.size, 4.0)  # what works in float32 works in float64 where that is the compute dtype
        self.tp = batch.tp.astype(np.float64)
        self.tokens = batch.micro_batch_size * (workload.seq_len / batch.cp)
        self.stream_tokens = np.where(batch.sequence_parallel, self.tokens / self.tp, self.tokens)
        zero = np.zeros(len(batch))
        self.forward, self.by_input, self.by_weight = zero.copy(), zero.copy(), zero.copy()
        self.experts_weight = zero.copy()  # of by_weight, that of routed experts
        self.projections, self.core, self.rest = zero.copy(), zero.copy(), zero.copy()  # what forward is made of
        self.forward_calls, self.backward_calls = zero.copy(), zero.copy()
        self.core_calls, self.rest_calls = zero.copy(), zero.copy()
        self.core_backward = zero.copy()  # what ``core`` takes backward, part of ``by_input``
        self.experts_forward, self.experts_backward = zero.copy(), zero.copy()  # beside which rows are exchanged
        self.routed_forward_calls, self.routed_backward_calls = zero.copy(), zero.copy()
        self.hidden = 0
        self.last: FloatArray = zero  # the last projection so far
        self.last_rest: FloatArray = zero  # the last memory-bound operator so far

    @property
    def stream(self) -> FloatArray:
        """Numbers in the residual stream on one rank (cut by tp with sequence parallelism)."""
        return np.asarray(self.stream_tokens * self.hidden)

    def matmul(
        self, m: Any, n: Any, k: Any, *, bias: bool = False, also: int = 0, cut: str = "", whole: bool = False
    ) -> None:
        """One projection, forward and both gradients; its bias is added in the same kernel, and summed apart.

        A ``whole`` one stays in the compute dtype.

        In fewer bits, its input and the gradient of its output are cast first: the input of ``also`` more projections
        before it was, and what sequence parallelism gathers in these bits (the input of one ``cut`` by "columns", the
        gradient of one cut by "rows") is cast on its shards.
        """
        slower = unaligned(n, k) if self.size == 2.0 and self.device.num_multiprocessors else 1.0  # on tensor cores
        self.last = slower * self._matmul(m, n, k, whole=whole)
        self.forward, self.projections = self.forward + self.last, self.projections + self.last
        self.by_input = self.by_input + slower * self._matmul(m, k, n, whole=whole)
        self.by_weight = self.by_weight + slower * self._matmul(k, n, m, whole=whole)
        self.launch(1, 2)
        if self.narrow is not None and not whole:
            table, shards = self.framework.pointwise.quantize, self._gathered_shards()
            self.pointwise(table.forward_only, 0.0 if also else m * k / (shards if cut == "columns" else 1.0))
            self.pointwise(table.backward_only, m * n / (shards if cut == "rows" else 1.0))
        if bias:
            self.pointwise(self.framework.pointwise.bias, m * n)

    def grouped(self, rows: Any, experts: Any, n: Any, k: Any, chunks: Any, *, inner: str) -> None:
        """One projection of a rank's ``experts``, ``rows`` spread evenly over them, forward and both gradients.

        In so many ``chunks``, each a grouped matmul of its own. A target may launch a kernel for each expert, and cast
        the operands of each apart; those on the ``inner`` side ("input" or "output") may come cast.
        """
        rows = rows / chunks
        busy = np.minimum(rows, experts)  # experts that have any token
        sizes = (rows / busy, n, k)
        self.last = chunks * self._grouped(rows, busy, *sizes, (0, 1, 2))
        self.forward, self.projections = self.forward + self.last, self.projections + self.last
        self.by_input = self.by_input + chunks * self._grouped(rows, busy, *sizes, (0, 2, 1))
        weights = chunks * self._grouped(rows, busy, *sizes, (2, 1, 0))
        self.by_weight, self.experts_weight = self.by_weight + weights, self.experts_weight + weights
        traits = self.framework.experts
        one = np.maximum(chunks * experts * traits.calls_each_expert, chunks)
        if self.narrow is not None:
            one = one + chunks * experts * traits.casts_each_expert
            table, both = self.framework.pointwise.quantize, not traits.fused
            self.pointwise(table.forward_only, chunks * rows * k * (both or inner == "output"))
            self.pointwise(table.backward_only, chunks * rows * n * (both or inner == "input"))
        self.launch(one, 2.0 * one)

    def marks(self) -> tuple[FloatArray, ...]:
        """What has been added up so far, for ``only_experts``."""
        return self.forward, self.by_input + self.by_weight, self.forward_calls, self.backward_calls

    def only_experts(self, before: tuple[FloatArray, ...], *, beside_exchange: bool = False) -> None:
        """What was added since ``before`` is the routed experts' alone; ``beside_exchange`` of other chunks or not."""
        forward, backward, calls, backward_calls = (now - then for now, then in zip(self.marks(), before, strict=True))
        if beside_exchange:
            self.experts_forward = self.experts_forward + forward
            self.experts_backward = self.experts_backward + backward
        self.routed_forward_calls = self.routed_forward_calls + calls
        self.routed_backward_calls = self.routed_backward_calls + backward_calls

    def pointwise(self, cost: PointwiseCost, elements: Any) -> None:
        """A memory-bound operator over ``elements`` numbers."""
        rate = self.device.memory_bytes_per_s / (self.device.memory_factor * self.framework.pointwise_factor)
        cast = self.size + 4.0 if self.size < 4.0 else 0.0
        forward = cost.forward_passes * self.size + cost.forward_float32_passes * self.wide + cost.forward_casts * cast
        backward = (
            cost.backward_passes * self.size + cost.backward_float32_passes * self.wide + cost.backward_casts * cast
        )
        self.last_rest = np.asarray(elements * forward / rate, dtype=np.float64)
        self.forward, self.rest = self.forward + self.last_rest, self.rest + self.last_rest
        self.by_input = self.by_input + elements * backward / rate
        runs = np.asarray(elements) > 0
        self.forward_calls = self.forward_calls + runs * cost.forward_kernels
        self.backward_calls = self.backward_calls + runs * cost.backward_kernels
        self.rest_calls = self.rest_calls + runs * cost.forward_kernels

    def branch(self, times: int) -> None:
        """Gradients of one input that came back from ``times + 1`` projections, added."""
        for _ in range(times):
            self.pointwise(self.framework.pointwise.branch, self.tokens * self.hidden)

    def launch(self, forward: Any, backward: Any) -> None:
        """Count kernels launched."""
        if launches_ahead(self.device):  # elsewhere the curve's overhead_s holds the call
            self.forward_calls = self.forward_calls + forward
            self.backward_calls = self.backward_calls + backward

    def roofline(
        self,
        op: str,
        flops: Any,
        num_bytes: Any,
        m: Any,
        n: Any,
        k: Any,
        dtype: DType | None = None,
        head_dim: Any = WIDE_HEAD,
        *,
        even_tiles: bool = False,
    ) -> FloatArray:
        """Seconds of one kernel: see ``roofline.operator_seconds``; in the compute dtype unless another is given."""
        chosen = (dtype or self.dtype).value
        return operator_seconds(self.device, op, chosen, flops, num_bytes, m, n, k, head_dim, even_tiles=even_tiles)

    def _matmul(self, m: Any, n: Any, k: Any, *, whole: bool = False) -> FloatArray:
        dtype = self.dtype if whole else self.narrow or self.dtype
        num_bytes = dtype.num_bytes * (m * k + k * n) + self.size * m * n
        return self._slower(narrow=dtype is self.narrow) * self.roofline(
            "matmul", 2.0 * m * n * k, num_bytes, m, n, k, dtype
        )

    def _grouped(self, rows: Any, busy: Any, m: Any, n: Any, k: Any, order: tuple[int, int, int]) -> FloatArray:
        """Seconds of a grouped matmul of sizes ``(m, n, k)`` each, taken in ``order`` for one of its gradients.

        Where each expert has a kernel of its own it is the library's matmul, several at a time on as many streams.
        """
        dtype, sizes = self.narrow or self.dtype, (m, n, k)
        num_bytes = dtype.num_bytes * (rows * k + busy * n * k) + self.size * rows * n
        shape = (sizes[order[0]], sizes[order[1]], sizes[order[2]])
        op = "matmul" if self.framework.experts.calls_each_expert else "grouped_matmul"
        seconds = self.roofline(op, 2.0 * rows * n * k, num_bytes, *shape, dtype)
        return self._slower(narrow=self.narrow is not None) * seconds

    def _slower(self, *, narrow: bool) -> float:
        """Seconds of the target's matmuls over the device's curves."""
        recipe, slower = self.workload.recipe, self.framework.matmul_factor
        if narrow and (recipe.row_scaled or recipe.block_scaled):
            slower *= self.framework.row_scaled_factor if recipe.row_scaled else self.framework.block_scaled_factor
        if self.device.kind.startswith(HOPPER):
            slower *= self.framework.hopper_factor
        return slower

    def _gathered_shards(self) -> FloatArray:
        """Shards on which a target casts what is gathered in float8; 1 where it gathers first."""
        first = self.framework.float8_gathers and not self.workload.recipe.row_scaled
        return np.where(self.batch.sequence_parallel & first, self.tp, 1.0)


def unaligned(n: Any, k: Any) -> FloatArray:
    """``UNALIGNED`` where the width of a projection's output or input is no multiple of ``ALIGNMENT`` numbers, else 1.

    Tokens may be any number: rows of all three matmuls, forward and gradients, are as long as one of the widths.
    """
    ragged = (np.asarray(n) % ALIGNMENT != 0) | (np.asarray(k) % ALIGNMENT != 0)
    return np.where(ragged, UNALIGNED, 1.0)


def vocab_multiple(framework: Framework, batch: ConfigBatch) -> IntArray:
    """What a target pads a rank's share of the vocabulary to a multiple of: ``[num_configs]``."""
    whole = framework.vocab_multiple if framework.pads_whole_vocab else 1
    return np.where(batch.vocab_parallel, framework.vocab_multiple, whole)
