"""FLOPs and bytes of a block on one rank -> seconds on a device, from efficiency curves at the shapes it really has.

Each operator takes ``max(FLOPs / achievable rate, bytes / memory rate)`` (the roofline of Williams, Waterman and
Patterson 2009, doi:10.1145/1498765.1498785, with a rate that depends on shape). A matmul ``[m, k] x [k, n]`` has
``2 m n k`` FLOPs and reads or writes ``m k + k n + m n`` numbers; its gradients by input and by weight are matmuls
``(m, k, n)`` and ``(k, n, m)`` of the same FLOPs.

Causal attention is charged half of the full FLOPs, ``2 * pairs * (head_dim + value_head_dim)`` over the pairs of query
and key that the mask keeps, as flash kernels skip the rest (Dao 2023, arXiv 2307.08691, section 3.1; the diagonal
tiles, done whole, are left out: tile / seq_len of the total). Backward is 2.5 times forward: five matmuls for two.

Left out: transposes, casts between operators that no layer owns, index arithmetic: a few percent of an eager step.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.blocks import vocab_rows
from meshwright.cost_models.framework import TRITON_SLOWDOWN, AttentionKernel, Framework, PointwiseCost
from meshwright.cost_models.roofline import operator_seconds
from meshwright.cost_models.strategy import ConfigBatch, IntArray, Recompute
from meshwright.cost_models.workload import DType, Workload
from meshwright.profiler.cluster import Device
from meshwright.profiler.efficiency import WIDE_HEAD
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    HeadLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.model import Block, BlockKind

FloatArray = NDArray[np.float64]
HOPPER = ("H100", "H200", "H800")  # kinds of devices
# Seconds of a half-precision matmul over those of an aligned one, where rows of its operands are no multiple of 16
# bytes, so that tensor cores are fed by narrow loads (NVIDIA, Matrix Multiplication Background User's Guide, section
# Tensor Core Requirements). The head of vTrain's runs with tp 1 reaches 80 TFLOP/s over 50,257 words, 210 and more
# where the vocabulary is split and padded; padding made all of nanoGPT a quarter faster (github.com/karpathy/nanoGPT).
UNALIGNED, ALIGNMENT = 2.8, 8

FIELDS = ("tp", "cp", "micro_batch_size", "sequence_parallel", "vocab_parallel", "recompute")


@dataclass(frozen=True, slots=True)
class BlockSeconds:
    """Seconds of one block on one micro-batch of one rank, each of shape ``[num_configs]``.

    Backward is apart by what it is for, the gradient of inputs or of weights. ``*_host`` is what the host spends on
    launching the kernels: see ``host_wait`` for what of it a step waits for.
    """

    forward: FloatArray
    backward_input: FloatArray
    backward_weight: FloatArray
    recompute: FloatArray
    forward_host: FloatArray
    backward_host: FloatArray
    recompute_host: FloatArray


def host_wait(device: Device, framework: Framework, on_device: FloatArray, on_host: FloatArray) -> FloatArray:
    """Seconds that launches add to ``on_device`` seconds of kernels and collectives in their stream.

    ``(device^q + host^q)^(1/q) - device`` with the target's ``HostCost.run_ahead`` for ``q``: nothing while the device
    is far behind, all but the device's own time where the host is the slower. A CPU waits for every call.
    """
    if not launches_ahead(device):
        return on_host
    longest = np.maximum(np.maximum(on_device, on_host), 1e-30)
    power = framework.host.run_ahead
    both = longest * ((on_device / longest) ** power + (on_host / longest) ** power) ** (1.0 / power)
    return np.asarray(both - on_device)


def slowest(device: Device, batch: ConfigBatch) -> FloatArray:
    """Seconds of kernels on the slowest of a config's devices, over those of a usual one; ``[num_configs]``.

    Devices of one kind differ (Sinha et al. 2022, "Not All GPUs Are Created Equal", SC22), and a step waits for the
    slowest: ``1 + variation * E(n)``, with ``E(n)`` the mean of the largest of ``n`` standard normal numbers, about
    ``inverse((n - 0.375) / (n + 0.25))`` (Blom 1958). The mean that the device's rates stand for is a usual node's, so
    that ``E`` counts from 8 devices on.
    """
    ranks, inverse = np.unique(batch.tp * batch.cp * batch.pp * batch.dp, return_inverse=True)
    normal = NormalDist()
    largest = np.array([normal.inv_cdf((n - 0.375) / (n + 0.25)) for n in np.maximum(ranks, 8).tolist()])
    usual = normal.inv_cdf((8 - 0.375) / (8 + 0.25))
    return np.asarray(1.0 + device.variation * (largest - usual)[inverse])


def launches_ahead(device: Device) -> bool:
    """Whether the host runs ahead of the device, so that launches hide behind kernels: true of GPUs.

    On a CPU, and on a virtual device, which is one, the next operator is called when the last has returned.
    """
    return not device.kind.startswith(("cpu", "virtual"))


def block_seconds(
    block: Block, workload: Workload, device: Device, framework: Framework, batch: ConfigBatch
) -> BlockSeconds:
    """Seconds of ``block`` for every config, worked out once for each different (tp, cp, micro batch, sp, recompute).

    Raises ``InputError`` when the device has no rate for an operator of the block in the compute dtype.
    """
    few, inverse = batch.distinct(*FIELDS)
    narrow = workload.recipe.matmul if block.kind is BlockKind.DECODER else None
    clock = _Clock(workload, device, framework, few, narrow)
    for layer in block.layers:
        clock.add(layer)
        if isinstance(layer, AttentionLayer | MlpLayer | MoeLayer):
            clock.pointwise(framework.pointwise.residual, clock.stream)
            clock.pointwise(framework.pointwise.dropout, clock.stream)
    return clock.total(inverse, recomputes=block.kind is BlockKind.DECODER)


def attended_pairs(seq_len: int, window: int, causal: bool, skips: bool) -> float:
    """Pairs of query and key that attention works out for one head of one sequence.

    Causal: ``s (s + 1) / 2``; a window of ``w`` keys keeps ``w s - w (w - 1) / 2`` of them. A target whose kernels
    do not skip the window (``skips`` false) is given it as a mask and works out all ``s * s``.
    """
    s, w = seq_len, window
    if 0 < w < s:
        return w * s - w * (w - 1) / 2 if skips else float(s) * s
    return s * (s + 1) / 2 if causal else float(s) * s


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


class _Clock:
    """Adds up the operators of a block: seconds of kernels and launches, forward and backward."""

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
        self.projections, self.core, self.rest = zero.copy(), zero.copy(), zero.copy()  # what forward is made of
        self.forward_calls, self.backward_calls = zero.copy(), zero.copy()
        self.core_calls, self.rest_calls = zero.copy(), zero.copy()
        self.hidden = 0
        self.last: FloatArray = zero  # the last projection so far
        self.last_rest: FloatArray = zero  # the last memory-bound operator so far

    @property
    def stream(self) -> FloatArray:
        """Numbers in the residual stream on one rank (cut by tp with sequence parallelism)."""
        return np.asarray(self.stream_tokens * self.hidden)

    def add(self, layer: LayerSpec) -> None:
        """Add every operator of a layer."""
        self.hidden = layer.hidden
        if isinstance(layer, NormLayer):
            rms = layer.norm_kind is NormKind.RMS
            self.pointwise(
                self.framework.pointwise.rms_norm if rms else self.framework.pointwise.layer_norm, self.stream
            )
        elif isinstance(layer, AttentionLayer):
            self._attention(layer)
        elif isinstance(layer, MlpLayer):
            self._mlp(layer.hidden, layer.ffn_size, layer.gated, bias=layer.bias, activation=layer.activation)
        elif isinstance(layer, MoeLayer):
            self._moe(layer)
        elif isinstance(layer, EmbeddingLayer):
            self.pointwise(self.framework.pointwise.embedding, self.tokens * layer.hidden)
            rows = vocab_rows(layer.vocab_size, self.batch, vocab_multiple(self.framework, self.batch))
            self.pointwise(self.framework.pointwise.embedding_table, rows * layer.hidden)
        elif isinstance(layer, HeadLayer):
            logits = vocab_rows(layer.vocab_size, self.batch, vocab_multiple(self.framework, self.batch))
            self.matmul(self.tokens, logits, layer.hidden)
            table, split = self.framework.pointwise, self.batch.vocab_parallel
            self.pointwise(table.loss, np.where(split, 0.0, self.tokens * logits))
            self.pointwise(table.sharded_loss, np.where(split, self.tokens * logits, 0.0))

    def matmul(self, m: Any, n: Any, k: Any, *, bias: bool = False, also: int = 0, cut: str = "") -> None:
        """One projection, forward and both gradients; its bias is added in the same kernel, and summed apart.

        In fewer bits, its input and the gradient of its output are cast first: the input of ``also`` more projections
        before it was, and what sequence parallelism gathers in these bits (the input of one ``cut`` by "columns", the
        gradient of one cut by "rows") is cast on its shards.
        """
        slower = unaligned(n, k) if self.size == 2.0 and self.device.num_multiprocessors else 1.0  # on tensor cores
        self.last = slower * self._matmul(m, n, k)
        self.forward, self.projections = self.forward + self.last, self.projections + self.last
        self.by_input = self.by_input + slower * self._matmul(m, k, n)
        self.by_weight = self.by_weight + slower * self._matmul(k, n, m)
        self._launch(1, 2)
        if self.narrow is not None:
            table, shards = self.framework.pointwise.quantize, self._gathered_shards()
            self.pointwise(table.forward_only, 0.0 if also else m * k / (shards if cut == "columns" else 1.0))
            self.pointwise(table.backward_only, m * n / (shards if cut == "rows" else 1.0))
        if bias:
            self.pointwise(self.framework.pointwise.bias, m * n)

    def _gathered_shards(self) -> FloatArray:
        """Shards on which a target casts what is gathered in float8; 1 where it gathers first."""
        first = self.framework.float8_gathers and not self.workload.recipe.row_scaled
        return np.where(self.batch.sequence_parallel & first, self.tp, 1.0)

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

    def _branch(self, times: int) -> None:
        """Gradients of one input that came back from ``times + 1`` projections, added."""
        for _ in range(times):
            self.pointwise(self.framework.pointwise.branch, self.tokens * self.hidden)

    def _launch(self, forward: float, backward: float) -> None:
        if launches_ahead(self.device):  # elsewhere the curve's overhead_s holds the call
            self.forward_calls = self.forward_calls + forward
            self.backward_calls = self.backward_calls + backward

    def _matmul(self, m: Any, n: Any, k: Any) -> FloatArray:
        dtype = self.narrow or self.dtype
        num_bytes = dtype.num_bytes * (m * k + k * n) + self.size * m * n
        recipe, slower = self.workload.recipe, 1.0
        if self.narrow and (recipe.row_scaled or recipe.block_scaled):
            slower = self.framework.row_scaled_factor if recipe.row_scaled else self.framework.block_scaled_factor
        if self.device.kind.startswith(HOPPER):
            slower *= self.framework.hopper_factor
        return slower * self._roofline("matmul", 2.0 * m * n * k, num_bytes, m, n, k, dtype)

    def _roofline(
        self,
        op: str,
        flops: Any,
        num_bytes: Any,
        m: Any,
        n: Any,
        k: Any,
        dtype: DType | None = None,
        head_dim: Any = WIDE_HEAD,
    ) -> FloatArray:
        chosen = (dtype or self.dtype).value
        return operator_seconds(self.device, op, chosen, flops, num_bytes, m, n, k, head_dim)

    def _attention(self, layer: AttentionLayer) -> None:
        heads, kv_heads = layer.num_heads / self.tp, np.maximum(layer.num_kv_heads / self.tp, 1.0)
        query_dim, value_dim = layer.head_dim + layer.rope_head_dim, layer.value_head_dim
        if layer.attention_kind is AttentionKind.MLA:
            self._latent_projections(layer, heads)
            kv_heads = heads
        elif self.framework.fused_projections:
            width = heads * query_dim + kv_heads * (query_dim + value_dim)
            self.matmul(self.tokens, width, layer.hidden, bias=layer.qkv_bias, cut="columns")
            self.pointwise(self.framework.pointwise.split, self.tokens * width)
        else:
            widths = (heads * query_dim, kv_heads * query_dim, kv_heads * value_dim)
            for place, width in enumerate(widths):
                self.matmul(self.tokens, width, layer.hidden, bias=layer.qkv_bias, also=place, cut="columns")
            self._branch(2)
        if layer.rotary:
            rotated = layer.rope_head_dim or query_dim
            rotated_heads = heads + (1.0 if layer.rope_head_dim else kv_heads)
            self.pointwise(self.framework.pointwise.rotary, self.tokens * rotated_heads * rotated)
        self._core(layer, heads, kv_heads, query_dim, value_dim)
        self.matmul(self.tokens, layer.hidden, heads * value_dim, bias=layer.out_bias, cut="rows")

    def _latent_projections(self, layer: AttentionLayer, heads: FloatArray) -> None:
        query_width = heads * (layer.head_dim + layer.rope_head_dim)
        if layer.q_lora_rank:
            self.matmul(self.tokens, layer.q_lora_rank, layer.hidden)
        self.matmul(self.tokens, query_width, layer.q_lora_rank or layer.hidden)
        self.matmul(self.tokens, layer.kv_lora_rank + layer.rope_head_dim, layer.hidden)
        self.matmul(self.tokens, heads * (layer.head_dim + layer.value_head_dim), layer.kv_lora_rank)

    def _core(self, layer: AttentionLayer, heads: Any, kv_heads: Any, query_dim: int, value_dim: int) -> None:
        """Scores, softmax and values, each rank with its share of the sequence's queries."""
        before, calls_before = self.forward, self.forward_calls
        if self.framework.attention is AttentionKernel.WRITTEN_OUT:
            self._written_out(heads, query_dim, value_dim)
        else:
            self._flash(layer, heads, kv_heads, query_dim, value_dim)
        self.core = self.core + (self.forward - before)
        self.core_calls = self.core_calls + (self.forward_calls - calls_before)

    def _flash(self, layer: AttentionLayer, heads: Any, kv_heads: Any, query_dim: int, value_dim: int) -> None:
        """One kernel that never writes the scores."""
        seq_len = self.workload.seq_len
        pairs = attended_pairs(seq_len, layer.window, layer.causal, self.framework.windowed_attention) / self.batch.cp
        sequences = self.batch.micro_batch_size
        flops = 2.0 * sequences * heads * pairs * (query_dim + value_dim)
        num_bytes = self.size * self.tokens * (heads + kv_heads) * (query_dim + value_dim)
        shape = (seq_len / self.batch.cp, heads * sequences, float(seq_len))
        newer = self.framework.attention is AttentionKernel.FLASH3
        forward, backward = (
            name + "_fa3" * (newer and self.device.has_efficiency(name + "_fa3", self.dtype.value))
            for name in ("attention_forward", "attention_backward")
        )
        triton = self.framework.attention is AttentionKernel.TRITON
        width, slower = (query_dim + value_dim) / 2, (1.0, 1.0)
        if triton:
            width, slower = max(width, WIDE_HEAD), TRITON_SLOWDOWN
        first = self._roofline(forward, flops, num_bytes, *shape, head_dim=width)
        second = self._roofline(backward, 2.5 * flops, 2.0 * num_bytes, *shape, head_dim=width)
        self.forward, self.by_input = self.forward + slower[0] * first, self.by_input + slower[1] * second
        self._launch(1, 3)  # backward: the dot product of outputs and their gradients, the kernel, a conversion

    def _written_out(self, heads: Any, query_dim: int, value_dim: int) -> None:
        """Two batched matmuls, one product a head and sequence, over all pairs, with the softmax's passes between.

        Megatron's fused softmax works on blocks of four score matrices: where heads a rank times sequences is no
        multiple of four it is written out as well, in float32 (megatron/fused_kernels, ``get_batch_per_block``;
        ``fused_softmax.py: is_kernel_available``).
        """
        seq_len, table = float(self.workload.seq_len), self.framework.pointwise
        queries, products = seq_len / self.batch.cp, heads * self.batch.micro_batch_size
        for contracted, wide in ((query_dim, seq_len), (value_dim, seq_len)):
            flops = 2.0 * products * queries * wide * contracted
            num_bytes = self.size * products * (queries * wide + (queries + wide) * contracted)
            first = self._roofline("matmul", flops, num_bytes, queries, wide, float(contracted))
            self.forward = self.forward + first
            self.by_input = self.by_input + 2.0 * first
            self._launch(1, 2)
        if table.softmax is not None:
            scores = products * queries * seq_len
            self.pointwise(table.softmax, scores)
            self.pointwise(table.loss, np.where(products % 4 == 0, 0.0, scores))

    def _mlp(self, hidden: int, ffn_size: int, gated: bool, *, bias: bool = False, activation: str = "") -> None:
        width = ffn_size / self.tp
        if gated and self.framework.fused_projections:
            self.matmul(self.tokens, 2.0 * width, hidden, bias=bias, cut="columns")
        else:
            for place in range(2 if gated else 1):
                self.matmul(self.tokens, width, hidden, bias=bias, also=place, cut="columns")
            self._branch(1 if gated else 0)
        table = self.framework.pointwise
        simple = table.squared_relu if activation == "relu2" and table.squared_relu else table.activation
        self.pointwise(table.gated_activation if gated else simple, self.tokens * width)
        self.matmul(self.tokens, hidden, width, bias=bias, cut="rows")

    def _moe(self, layer: MoeLayer) -> None:
        """Router, shared experts and all routed experts as grouped matmuls over evenly spread tokens."""
        table, rows = self.framework.pointwise, self.tokens * layer.top_k
        self.matmul(self.tokens, float(layer.num_experts), layer.hidden)
        self.pointwise(table.routing, rows * layer.hidden)
        ways_in = 2 if layer.gated else 1
        for _ in range(ways_in):
            self._grouped(layer, rows, layer.expert_ffn_size, layer.hidden)
        activation = table.gated_activation if layer.gated else table.activation
        self.pointwise(activation, rows * layer.expert_ffn_size)
        self._grouped(layer, rows, layer.hidden, layer.expert_ffn_size)
        if layer.shared_ffn_size:
            self._mlp(layer.hidden, layer.shared_ffn_size, layer.gated)

    def _grouped(self, layer: MoeLayer, rows: Any, n: float, k: float) -> None:
        busy = np.minimum(rows, layer.num_experts)  # experts that have any token
        m = rows / busy
        num_bytes = self.size * (rows * (n + k) + busy * n * k)
        flops = 2.0 * rows * n * k
        self.last = self._roofline("grouped_matmul", flops, num_bytes, m, n, k)
        self.forward, self.projections = self.forward + self.last, self.projections + self.last
        self.by_input = self.by_input + self._roofline("grouped_matmul", flops, num_bytes, m, k, n)
        self.by_weight = self.by_weight + self._roofline("grouped_matmul", flops, num_bytes, k, n, m)
        self._launch(1, 2)

    def total(self, inverse: NDArray[np.int64], *, recomputes: bool) -> BlockSeconds:
        """The sums, spread to every config; only decoder blocks are recomputed.

        Where the target stops early, a recomputed forward ends at the last tensor that backward needs: the block's last
        projection and the residual addition behind it are not repeated (torch/utils/checkpoint.py, early stop;
        ``executors/recompute.py``).
        """
        full, selective = (
            self.batch.is_recompute(choice) & recomputes for choice in (Recompute.FULL, Recompute.SELECTIVE)
        )
        choice, early = self.framework.selective, self.framework.recompute_stops_early
        again = self.forward - early * (self.last + self.last_rest)
        part = choice.rest * (self.rest - self.last_rest) + choice.core * self.core
        part = part + choice.projections * self.projections
        part_calls = choice.rest * self.rest_calls + choice.core * self.core_calls
        part_calls = part_calls + choice.projections * (self.forward_calls - self.rest_calls - self.core_calls)
        recompute = np.where(full, again, np.where(selective, part, 0.0))
        recompute_calls = np.where(full, self.forward_calls, np.where(selective, part_calls, 0.0))
        launch_s = self.device.launch_s * self.framework.host.launch_factor
        arrays = (
            self.forward,
            self.by_input,
            self.by_weight,
            recompute,
            self.forward_calls * launch_s,
            self.backward_calls * launch_s,
            recompute_calls * launch_s,
        )
        return BlockSeconds(*(np.broadcast_to(array, (len(self.batch),))[inverse] for array in arrays))
