"""What one micro-batch's forward of a block leaves alive for its backward, counted tensor by tensor.

Activations are the tensors autograd keeps of each layer. They are what Korthikanti et al. 2022 (arXiv 2205.05198,
section 4) count, for flash attention (no scores are kept, only their log-sum-exp: Dao et al. 2022, arXiv 2205.14135)
and without dropout, but where a target's traits say otherwise.

Left out: attention masks and rotary tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.eager import block_lifetimes
from meshwright.cost_models.framework import AttentionKernel, Framework
from meshwright.cost_models.residency import Numbers, block_numbers, expert_numbers, expert_shards
from meshwright.cost_models.strategy import ConfigBatch, Recompute
from meshwright.cost_models.tape import Lifetimes
from meshwright.cost_models.weights import vocab_rows
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    HeadLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.model import Block, BlockKind

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Bytes of one block on one rank, arrays of shape ``[num_configs]``.

    ``params`` are counts, not bytes. ``saved`` is kept for backward of one micro-batch; ``working`` is what exists
    beside it for a moment: a recomputed block's activations, the loss's intermediates. ``waiting`` is kept from the
    gradient of its input to those of its weights, where backward is split: what matrices read, and gradients of what
    they put out. ``lifetimes`` tell more where the target's blocks are followed operator by operator.
    """

    params: Numbers
    saved: FloatArray
    working: FloatArray
    waiting: FloatArray
    lifetimes: Lifetimes | None = None
    experts: Numbers | None = None

    def take(self, rows: NDArray[np.int64]) -> BlockBytes:
        """The configs at these positions."""
        lifetimes = self.lifetimes.take(rows) if self.lifetimes else None
        experts = self.experts.take(rows) if self.experts else None
        return BlockBytes(
            self.params.take(rows), self.saved[rows], self.working[rows], self.waiting[rows], lifetimes, experts
        )


def block_bytes(block: Block, workload: Workload, framework: Framework, batch: ConfigBatch) -> BlockBytes:
    """What a block holds of one micro-batch under each config's recompute choice."""
    if framework.memory.by_operator:
        lifetimes = block_lifetimes(block, workload, batch)
        beside = lifetimes.backward.total - lifetimes.saved
        numbers = block_numbers(block, framework, batch)
        experts = expert_numbers(block, framework, batch)
        if experts is not None and not workload.recipe.has_master:  # nobody else's: left to no FSDP2
            alone = (expert_shards(batch) == 1.0) & (batch.zero_stage > 0)
            numbers = replace(numbers, gathered=numbers.gathered - np.where(alone, experts.gathered, 0.0))
            experts = replace(experts, gathered=np.where(alone, 0.0, experts.gathered))
        return BlockBytes(numbers, lifetimes.saved, beside, np.zeros(len(batch)), lifetimes, experts)
    few, inverse = batch.distinct(
        "tp", "cp", "pp", "micro_batch_size", "sequence_parallel", "recompute", "vocab_parallel", "ep", "etp"
    )
    saver = _Saved(workload, framework, few)
    everything = sum((saver.layer(layer) for layer in block.layers), np.zeros(len(few)))
    if block.kind is BlockKind.DECODER:
        block_input = saver.stream(block.layers[0].hidden)
        if framework.selective.rest:
            kept = block_input + sum((saver.products(layer) for layer in block.layers), np.zeros(len(few)))
        else:  # attention's core alone is worked out again
            kept = everything - sum((saver.core(layer) for layer in block.layers), np.zeros(len(few)))
        full, selective = few.is_recompute(Recompute.FULL), few.is_recompute(Recompute.SELECTIVE)
        saved = np.where(full, block_input, np.where(selective, np.minimum(kept, everything), everything))
        working = np.where(full | selective, everything - saved, 0.0)
    else:
        saved = everything
        working = sum((saver.loss_working(layer) for layer in block.layers), np.zeros(len(few)))
    waiting = sum((saver.waiting(layer) for layer in block.layers), np.zeros(len(few)))
    if framework.torch_schedules:  # torch's own split of backward lets go of nothing before
        waiting = waiting + saved
    saved, working, waiting = (np.broadcast_to(array, (len(few),))[inverse] for array in (saved, working, waiting))
    return BlockBytes(block_numbers(block, framework, batch), saved, working, waiting)


class _Saved:
    """Bytes autograd keeps of each layer, for one micro-batch."""

    def __init__(self, workload: Workload, framework: Framework, batch: ConfigBatch) -> None:
        self.framework, self.batch, self.traits = framework, batch, framework.memory
        self.size = float(workload.recipe.compute.num_bytes)
        # bytes of a number of what a projection reads, as it is kept
        narrow = workload.recipe.matmul if self.traits.float8_inputs else None
        self.input_size = float(narrow.num_bytes) if narrow else self.size
        self.wide = max(self.size, 4.0)  # norms and losses work in float32 at least
        self.tp = batch.tp.astype(np.float64)
        self.seq_len = float(workload.seq_len)
        self.tokens = batch.micro_batch_size * (workload.seq_len / batch.cp)
        self.cut_tokens = np.where(batch.sequence_parallel, self.tokens / self.tp, self.tokens)

    def stream(self, hidden: int) -> FloatArray:
        """The residual stream (cut by tp with sequence parallelism)."""
        return np.asarray(self.cut_tokens * hidden * self.size)

    def layer(self, layer: LayerSpec) -> FloatArray:
        """Everything kept without recompute."""
        if isinstance(layer, NormLayer):
            return self._norm(layer)
        if isinstance(layer, AttentionLayer):
            kept = self._projected_input(layer.hidden) + self._attention(layer)
            return kept + self.scores(layer) + self._mask(layer.hidden)
        if isinstance(layer, MlpLayer):
            return (
                self._projected_input(layer.hidden) + self._ffn(layer.ffn_size, layer.gated) + self._mask(layer.hidden)
            )
        if isinstance(layer, MoeLayer):
            return self.stream_input(layer.hidden, self.size) + self._moe(layer)  # routed in the compute dtype
        if isinstance(layer, HeadLayer):
            logits = self.tokens * vocab_rows(layer.vocab_size, self.batch)
            own = self.batch.vocab_parallel | self.framework.fused_loss
            kept = self._of_logits("kept", np.where(own, self.size, self.wide))  # the logits, or their log-softmax
            return self.stream_input(layer.hidden, self.size) + logits * kept
        return np.zeros(len(self.batch))  # a lookup keeps the token ids only

    def products(self, layer: LayerSpec) -> FloatArray:
        """Outputs of projections and fused attention: what selective recompute keeps (``executors/recompute.py``).

        A target may drop a share of the projections' outputs (``Selective.outputs``); one that gathers inputs of
        sequence parallelism again keeps what it has scattered, a shard.
        """
        share, shards = 1.0 - self.framework.selective.outputs, self.framework.selective.gathers
        out_tokens = self.cut_tokens if shards else self.tokens
        if isinstance(layer, AttentionLayer):
            core = self.tokens * layer.num_heads / self.tp * (layer.value_head_dim * self.size + 4.0)
            out = out_tokens * layer.hidden * self.size
            return np.asarray(core + share * (self._attention(layer) - core + out) + self._gathered(layer.hidden))
        if isinstance(layer, MlpLayer):
            ways_in = 2.0 if layer.gated else 1.0
            inner = self.tokens * ways_in * layer.ffn_size / self.tp
            return np.asarray(share * (inner + out_tokens * layer.hidden) * self.size + self._gathered(layer.hidden))
        if isinstance(layer, MoeLayer):
            rows = self.tokens * layer.top_k
            ways_in = 2.0 if layer.gated else 1.0
            inner = rows * (ways_in * layer.expert_ffn_size + layer.hidden)
            shared = self.tokens * ways_in * layer.shared_ffn_size / self.tp
            return (inner + shared + self.tokens * layer.hidden) * self.size
        return np.zeros(len(self.batch))

    def waiting(self, layer: LayerSpec) -> FloatArray:
        """Inputs of projections, and gradients of their outputs."""
        if isinstance(layer, AttentionLayer):
            heads, kv_heads = layer.num_heads / self.tp, np.maximum(layer.num_kv_heads / self.tp, 1.0)
            read = heads * layer.value_head_dim * self.input_size
            made = heads * layer.head_dim + kv_heads * (layer.head_dim + layer.value_head_dim)
            inner = self.tokens * (read + made * self.size)
        elif isinstance(layer, MlpLayer):
            inner = self.tokens * layer.ffn_size / self.tp * (self.input_size + (1.0 + layer.gated) * self.size)
        elif isinstance(layer, MoeLayer):
            rows = self.tokens * layer.top_k / self.tp
            inner = rows * layer.expert_ffn_size * (self.input_size + (1.0 + layer.gated) * self.size)
            return np.asarray(inner + rows * layer.hidden * self.batch.etp * (self.input_size + self.size))
        elif isinstance(layer, HeadLayer):
            inner = self.tokens * vocab_rows(layer.vocab_size, self.batch) * self.size
            return np.asarray(inner + self.stream_input(layer.hidden, self.size))
        else:
            return np.zeros(len(self.batch))
        return np.asarray(inner + self._projected_input(layer.hidden) + self.stream(layer.hidden))

    def loss_working(self, layer: LayerSpec) -> FloatArray:
        """The loss beside what it keeps: two float32 copies of the logits and their gradient in the compute dtype.

        A fused loss has the gradient alone.
        """
        if not isinstance(layer, HeadLayer):
            return np.zeros(len(self.batch))
        logits = self.tokens * vocab_rows(layer.vocab_size, self.batch)
        copies = 0.0 if self.framework.fused_loss else 2.0 * self.wide
        return np.asarray(logits * self._of_logits("beside", np.full(len(self.batch), copies + self.size)))

    def _of_logits(self, when: str, usual: FloatArray) -> FloatArray:
        """Bytes of a logit in all its copies, by the target's traits where it has any: ``[num_configs]``."""
        whole, sharded = (
            usual if loss is None else getattr(loss, when) * self.size + getattr(loss, f"{when}_float32") * 4.0
            for loss in (self.traits.loss, self.traits.sharded_loss or self.traits.loss)
        )
        return np.where(self.batch.vocab_parallel, sharded, whole)

    def core(self, layer: LayerSpec) -> FloatArray:
        """What attention between its projections keeps for itself: scores, and an output that is kept cast besides."""
        if not isinstance(layer, AttentionLayer) or not self._cast_size:
            return self.scores(layer)
        out = self.tokens * layer.num_heads / self.tp * (layer.value_head_dim * self.size + 4.0)
        return np.asarray(self.scores(layer) + out)

    def scores(self, layer: LayerSpec) -> FloatArray:
        """Of attention that is written out: softmax's output, and where it is dropped out of a mask and the rest.

        ``5 a s^2 b`` bytes in half precision (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1).
        """
        if not isinstance(layer, AttentionLayer) or self.framework.attention is not AttentionKernel.WRITTEN_OUT:
            return np.zeros(len(self.batch))
        pairs = self.tokens * self.seq_len * layer.num_heads / self.tp
        return np.asarray(pairs * (self.size + self._drops * (self.size + 1.0)))

    @property
    def _drops(self) -> bool:
        return self.framework.pointwise.dropout.forward_kernels > 0

    def _mask(self, hidden: int) -> FloatArray:
        """Where a layer's output is dropped out of: a byte a number."""
        return np.asarray(self.cut_tokens * hidden * float(self._drops or self.traits.masks_always))

    def _norm(self, layer: NormLayer) -> FloatArray:
        """A fused norm keeps its input; the RMSNorm of Hugging Face a float32 copy and the normalised tensor."""
        eager = layer.norm_kind is NormKind.RMS and self.framework.eager_rms_norm
        return np.asarray(self.cut_tokens * layer.hidden * ((self.wide + self.size) if eager else self.size))

    def stream_input(self, hidden: int, size: float) -> FloatArray:
        """The input of a column split: whole on each rank, unless the target gathers it again in backward."""
        tokens = self.cut_tokens if self.framework.regathers_sequence else self.tokens
        return np.asarray(tokens * hidden * size)

    def _projected_input(self, hidden: int) -> FloatArray:
        return self.stream_input(hidden, self.input_size)

    def _gathered(self, hidden: int) -> Any:
        """With sequence parallelism the gathered input, a collective's output, is kept under selective recompute."""
        again = self.framework.regathers_sequence or self.framework.selective.gathers
        kept = self.batch.sequence_parallel & (not again)
        return np.where(kept, self.tokens * hidden * self.size, 0.0)

    def _attention(self, layer: AttentionLayer) -> FloatArray:
        """Queries, keys, values, the output and its log-sum-exp (float32); the output again where it is cast."""
        heads = layer.num_heads / self.tp
        query_dim, value_dim = layer.head_dim + layer.rope_head_dim, layer.value_head_dim
        kv_heads, latent = np.maximum(layer.num_kv_heads / self.tp, 1.0), 0.0
        if layer.attention_kind is AttentionKind.MLA:
            kv_heads = heads
            latent = 2.0 * (layer.q_lora_rank + layer.kv_lora_rank)  # before and after their norms
        width = heads * (query_dim + value_dim) + kv_heads * (query_dim + value_dim) + latent
        cast = heads * value_dim * self._cast_size
        return np.asarray(self.tokens * (width * self.size + cast + heads * 4.0))

    @property
    def _cast_size(self) -> float:
        """Bytes of a copy for the matmul, of what is kept uncast too."""
        return 0.0 if self.input_size == self.size else self.input_size

    def _inner(self, gated: bool) -> float:
        """Bytes of a number of a feed-forward's width: all that the activation keeps, and the second matmul's input."""
        return ((self.traits.gated_tensors if gated else 2.0) - 1.0) * self.size + self.input_size

    def _ffn(self, ffn_size: int, gated: bool) -> FloatArray:
        """Gated: gate, up, the activated gate and the product; else the activation's input and output."""
        return np.asarray(self.tokens * self._inner(gated) * ffn_size / self.tp)

    def _moe(self, layer: MoeLayer) -> FloatArray:
        """Every token's row for each expert it takes, permuted, through the expert and back; the router's logits."""
        rows = self.tokens * layer.top_k / self.tp  # of them every rank of etp has all, and its part of their width
        outer = ((self.traits.expert_rows - 1.0) * self.size + self.input_size) * self.batch.etp
        inner = rows * (self._inner(layer.gated) * layer.expert_ffn_size + outer * layer.hidden)
        routing = self.cut_tokens * layer.num_experts * 4.0
        shared = self._ffn(layer.shared_ffn_size, layer.gated) if layer.shared_ffn_size else 0.0
        return np.asarray(inner + routing + shared)
