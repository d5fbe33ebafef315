"""The operators of Hugging Face's decoder blocks as eager torch runs them, with what each saves for backward.

Written off transformers 5.23 (``models/llama``, ``mixtral``, ``qwen3_moe``, ``gpt2``, ``opt``; ``integrations/moe.py``,
``integrations/sdpa_attention.py``, ``activations.py``) and torch 2.13 (``tools/autograd/derivatives.yaml``), with this
package's tensor parallelism (``executors/tp_modules.py``, ``tp_collectives.py``) and loss (``executors/loss.py``).
Attention is CUDA's flash kernel, which saves queries, keys, values, its output and a float32 log-sum-exp, and takes for
its backward the gradient of queries in float32, and of keys and values for every query head (FlashAttention-2,
``csrc/flash_attn/flash_api.cpp: mha_bwd``).

Left out: rotary tables, masks, a norm's number a row, indices of routed rows (under 1 % of a block); dropout (a byte
a number where it is on); attention where flash attention does not run (sliding windows, float32 with grouped heads).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import RECOMPUTES, ConfigBatch
from meshwright.cost_models.tape import Bytes, Lifetimes, Tape, play
from meshwright.cost_models.weights import vocab_rows
from meshwright.cost_models.workload import Workload
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

FLASH_ROWS, FLASH_COLUMNS = 128, 32  # what flash attention's backward rounds sequences and heads up to


def block_lifetimes(block: Block, workload: Workload, batch: ConfigBatch) -> Lifetimes:
    """What is alive of a block and when; decoder blocks as each config recomputes them."""
    recompute = batch.recompute * (block.kind is BlockKind.DECODER)
    few = replace(batch, recompute=recompute)
    few, inverse = few.distinct("tp", "cp", "micro_batch_size", "sequence_parallel", "recompute", "vocab_parallel")
    # the list of operators is the same for all that are split, shard the sequence and recompute alike
    alike = (few.tp > 1) + 2 * few.sequence_parallel + 4 * few.recompute
    parts = []
    for which in np.unique(alike):
        rows = np.flatnonzero(alike == which)
        configs = few.take(rows)
        tape = block_tape(block, workload, configs)
        parts.append((rows, play(tape, RECOMPUTES[configs.recompute[0]], len(rows))))
    return Lifetimes.assembled(parts, len(few)).take(inverse)


def block_tape(block: Block, workload: Workload, batch: ConfigBatch) -> Tape:
    """The operators of a block, for configs that are all split over tp or all not, and shard the sequence alike."""
    return _Writer(workload, batch).block(block)


class _Writer:
    def __init__(self, workload: Workload, batch: ConfigBatch) -> None:
        self.batch = batch
        self.size = float(workload.recipe.compute.num_bytes)
        self.wide = max(self.size, 4.0)
        self.seq_len = workload.seq_len
        self.split = bool((batch.tp > 1).any())
        self.sequence_parallel = bool(batch.sequence_parallel.any())
        self.tp = batch.tp.astype(np.float64)
        self.tokens = batch.micro_batch_size * (workload.seq_len / batch.cp)
        self.shard = self.tokens / self.tp if self.sequence_parallel else self.tokens
        self.several = batch.micro_batch_size > 1
        self.in_decoder = False
        self.tape = Tape(0.0)

    def block(self, block: Block) -> Tape:
        hidden = block.layers[0].hidden
        self.in_decoder = block.kind is BlockKind.DECODER
        self.tape = Tape(self.shard * hidden * self.size)
        stream = normed = 0
        for layer in block.layers:
            if isinstance(layer, NormLayer):
                normed = self.norm(layer, normed)
                continue
            made = self.layer(layer, normed)
            adds = isinstance(layer, AttentionLayer | MlpLayer | MoeLayer)
            stream = normed = self.add(stream, made) if adds else made
        return self.tape

    def layer(self, layer: LayerSpec, x: int) -> int:
        if isinstance(layer, AttentionLayer):
            return self.attention(layer, x)
        if isinstance(layer, MlpLayer):
            return self.leave(self.mlp(layer, self.enter(x, layer.hidden)), bias=layer.bias)
        if isinstance(layer, MoeLayer):
            return self.experts(layer, x)
        return self.embedding(layer) if isinstance(layer, EmbeddingLayer) else self.head(layer, x)  # type: ignore[arg-type]

    # -- small ones -----------------------------------------------------------------------------------------------

    def add(self, left: int, right: int) -> int:
        return self.tape.run((left, right), self.bytes_of(left), passes=True)

    def bytes_of(self, tensor: int) -> Bytes:
        return self.tape.sizes[self.tape.storage[tensor]]

    def wider(self, x: int) -> int:
        """``x.float()``: itself where it is no half type."""
        if self.wide == self.size:
            return x
        return self.tape.run(x, self.bytes_of(x) * (self.wide / self.size))

    def narrower(self, x: int) -> int:
        if self.wide == self.size:
            return x
        return self.tape.run(x, self.bytes_of(x) * (self.size / self.wide))

    def norm(self, layer: NormLayer, x: int) -> int:
        return self.layer_norm(x) if layer.norm_kind is NormKind.LAYER else self.rms_norm(x)

    def layer_norm(self, x: int) -> int:
        return self.tape.run(x, self.bytes_of(x), saves=(x,), weights=0.0)

    def rms_norm(self, x: int) -> int:
        """``weight * (x32 * rsqrt(x32.pow(2).mean() + eps)).to(x.dtype)``; a number a row is left out.

        In backward the weight's gradient is a whole tensor before it is summed.
        """
        run = self.tape.run
        wide = self.wider(x)
        size = self.bytes_of(wide)
        squares = run(wide, size, saves=(wide,), backward=2.0 * size)  # 2 * x.pow(1), times the gradient
        mean = run(squares, 0.0)
        normed = run((wide, mean), size, saves=(wide,), backward=size)  # a row's gradient before it is summed
        narrow = self.narrower(normed)
        return run(narrow, self.bytes_of(narrow), saves=(narrow,), weights=0.0, backward=self.bytes_of(narrow))

    def linear(
        self, x: int, rows: Bytes, inputs: Bytes, outputs: Bytes, *, bias: bool = False, row_split: bool = False
    ) -> int:
        """A projection of ``rows`` tokens; its weight's gradient is made beside its input's."""
        weights = (inputs * outputs + (outputs if bias else 0.0)) * self.size
        kept = not (row_split and self.split)  # of a product split by rows the sum over tp is kept
        return self.tape.run(
            x, rows * outputs * self.size, saves=(x,), weights=weights, kept=kept, puts_off=self.in_decoder
        )

    # -- ends of a region under tensor parallelism ----------------------------------------------------------------

    def enter(self, x: int, hidden: int) -> int:
        """Into a column split: itself, its gradient summed over tp; with sequence parallelism gathered."""
        if not self.split:
            return x
        whole = self.tokens * hidden * self.size
        if not self.sequence_parallel:
            return self.tape.run(x, whole, view_of=x)
        copied = np.where(self.several, whole, 0.0)  # shards side by side, then laid out by sequence
        return self.tape.run(x, whole, kept=True, forward=copied, backward=copied)

    def leave(self, x: int, *, bias: bool = False) -> int:
        """Out of a row split: summed over tp, with sequence parallelism scattered; then the bias is added."""
        if not self.split:
            return x
        whole = self.bytes_of(x)
        if not self.sequence_parallel:
            x = self.tape.run(x, whole, passes=True, kept=True)
        else:
            copied = np.where(self.several, whole, 0.0)
            x = self.tape.run(x, whole / self.tp, kept=True, forward=copied, backward=copied)
        return self.tape.run(x, self.bytes_of(x), passes=True) if bias else x

    # -- attention --------------------------------------------------------------------------------------------------

    def attention(self, layer: AttentionLayer, x: int) -> int:
        entered = self.enter(x, layer.hidden)
        heads = layer.num_heads / self.tp
        mixed = self.latent(layer, entered) if layer.attention_kind is AttentionKind.MLA else self.heads(layer, entered)
        width = heads * layer.value_head_dim
        out = self.linear(mixed, self.tokens, width, layer.hidden, bias=layer.out_bias, row_split=True)
        return self.leave(out, bias=layer.out_bias)

    def heads(self, layer: AttentionLayer, x: int) -> int:
        heads, kv_heads = layer.num_heads / self.tp, np.maximum(layer.num_kv_heads / self.tp, 1.0)
        widths = (heads * layer.head_dim, kv_heads * layer.head_dim, kv_heads * layer.value_head_dim)
        query, key, value = (self.linear(x, self.tokens, layer.hidden, width, bias=layer.qkv_bias) for width in widths)
        if layer.qk_norm_params == 2 * layer.head_dim:
            query, key = self.rms_norm(query), self.rms_norm(key)
        if layer.rotary:
            query, key = self.rotary(query), self.rotary(key)
        return self.flash(layer, (query, key, value), heads, kv_heads)

    def rotary(self, x: int) -> int:
        """``x * cos + cat((-x2, x1)) * sin``; the tables are left out."""
        run, size = self.tape.run, self.bytes_of(x)
        by_cos = run(x, size)
        first, second = (run(x, size / 2.0, view_of=x) for _ in range(2))  # whole gradients, zeros but for the half
        turned = run(second, size / 2.0)
        rotated = run((turned, first), size, passes=True)
        return run((by_cos, run(rotated, size)), size, passes=True)

    def flash(self, layer: AttentionLayer, reads: tuple[int, int, int], heads: FloatArray, kv_heads: FloatArray) -> int:
        out = self.tokens * heads * layer.value_head_dim * self.size
        statistics = self.tape.run((), self.tokens * heads * 4.0, kept=True)
        beside: Bytes = 0.0
        if self.size < 4.0:
            rows = self.batch.micro_batch_size * np.ceil(self.seq_len / self.batch.cp / FLASH_ROWS) * FLASH_ROWS * heads
            width = np.ceil(layer.head_dim / FLASH_COLUMNS) * FLASH_COLUMNS
            repeated = 2.0 * self.tokens * heads * layer.head_dim * self.size
            beside = rows * (width + 1.0) * 4.0 + np.where(heads > kv_heads, repeated, 0.0)
        return self.tape.run(reads, out, saves=(*reads, statistics), saves_output=True, backward=beside, kept=True)

    def latent(self, layer: AttentionLayer, x: int) -> int:
        """MLA as one operator: latents before and after their norms, queries, keys and values of every head."""
        heads = layer.num_heads / self.tp
        inside_params = layer.params - layer.num_heads * layer.value_head_dim * layer.hidden
        query_dim, value_dim = layer.head_dim + layer.rope_head_dim, layer.value_head_dim
        latents = 2.0 * (layer.q_lora_rank + layer.kv_lora_rank)
        width = heads * (2.0 * query_dim + value_dim) + latents
        inside = self.tape.run(
            x, self.tokens * width * self.size, saves=(x,), weights=inside_params * self.size / self.tp
        )
        statistics = self.tape.run((), self.tokens * heads * 4.0, kept=True)
        out = self.tokens * heads * value_dim * self.size
        return self.tape.run(inside, out, saves=(inside, statistics), saves_output=True, kept=True)

    # -- feed-forward -----------------------------------------------------------------------------------------------

    def mlp(self, layer: MlpLayer, x: int) -> int:
        run, ffn = self.tape.run, layer.ffn_size / self.tp
        if layer.gated:
            gate = self.linear(x, self.tokens, layer.hidden, ffn, bias=layer.bias)
            active = self.activation(layer.activation, gate)
            up = self.linear(x, self.tokens, layer.hidden, ffn, bias=layer.bias)
            inner = run((active, up), self.bytes_of(up), saves=(active, up))
        else:
            inner = self.activation(layer.activation, self.linear(x, self.tokens, layer.hidden, ffn, bias=layer.bias))
        return self.linear(inner, self.tokens, ffn, layer.hidden, bias=layer.bias, row_split=True)

    def activation(self, name: str, x: int) -> int:
        run, size = self.tape.run, self.bytes_of(x)
        if name == "relu":
            return run(x, size, saves_output=True)
        if name != "gelu_new":
            return run(x, size, saves=(x,))
        # 0.5 * x * (1 + tanh(c * (x + 0.044715 * x.pow(3)))): transformers' NewGELUActivation, operator by operator
        half = run(x, size)
        cube = run(x, size, saves=(x,), backward=2.0 * size)
        inside = run((x, run(cube, size)), size, passes=True)
        tanh = run(run(inside, size), size, saves_output=True)
        plus = run(tanh, size, passes=True)
        return run((half, plus), size, saves=(half, plus))

    def experts(self, layer: MoeLayer, x: int) -> int:
        """``integrations/moe.py: grouped_mm_experts_forward`` behind a router; scores in float32, as Mixtral's.

        Rows of tokens are sorted by expert, go through grouped matmuls, are weighted, sorted back and summed.
        """
        run, wide = self.tape.run, self.wide / self.size
        chosen = self.tokens * layer.top_k
        row = chosen * layer.hidden * self.size
        logits = self.tape.run(
            x, self.tokens * layer.num_experts * self.size, saves=(x,), kept=True
        )  # its weight is small
        scores = run(self.wider(logits), self.tokens * layer.num_experts * self.wide, saves_output=True)
        taken = run(x, row)
        ways_in = 2.0 if layer.gated else 1.0
        inner = self.grouped(taken, layer, chosen, layer.hidden, ways_in * layer.expert_ffn_size)
        if layer.gated:  # halves of one tensor, whose gradients are put together
            half = self.bytes_of(inner) / 2.0
            up = run((), half, view_of=inner, passes=True)
            gate = run(inner, half, view_of=inner)
            active = run(gate, half, saves=(gate,))
            inner = run((active, up), half, saves=(active, up))
        else:
            inner = self.activation(layer.activation, inner)
        out = self.grouped(inner, layer, chosen, layer.expert_ffn_size, layer.hidden)
        # two products in float32, one of which is cast, the other summed
        weighted = run((out, scores), row * wide, saves=(out,), backward=2.0 * row * wide - row)
        sorted_back = run(weighted, row * wide)
        mixed = self.narrower(run(sorted_back, self.tokens * layer.hidden * self.wide, passes=True))
        if not layer.shared_ffn_size:
            return mixed
        shared = MlpLayer(
            hidden=layer.hidden, ffn_size=layer.shared_ffn_size, gated=layer.gated, activation=layer.activation
        )
        return self.add(mixed, self.mlp(shared, x))

    def grouped(self, x: int, layer: MoeLayer, rows: FloatArray, inputs: float, outputs: float) -> int:
        weights = layer.num_experts * inputs * outputs * self.size
        return self.tape.run(x, rows * outputs * self.size, saves=(x,), weights=weights, kept=True)

    # -- ends of the model ------------------------------------------------------------------------------------------

    def embedding(self, layer: EmbeddingLayer) -> int:
        rows = vocab_rows(layer.vocab_size, self.batch) * layer.hidden * self.size
        found = self.tape.run((), self.tokens * layer.hidden * self.size, weights=rows)
        if self.split:  # rows of other ranks are masked out, then all are summed
            found = self.leave(self.tape.run(found, self.bytes_of(found)))
        if layer.num_positions:
            positions = self.tape.run((), 0.0, weights=layer.num_positions * layer.hidden * self.size)
            found = self.tape.run((found, positions), self.bytes_of(found), passes=True)
        return found

    def head(self, layer: HeadLayer, x: int) -> int:
        """The logits and their loss, whole (``cross_entropy``) or split by vocabulary (``_ShardedCrossEntropy``)."""
        run, wide = self.tape.run, self.wide / self.size
        entered = self.enter(x, layer.hidden)
        columns = vocab_rows(layer.vocab_size, self.batch)
        logits = self.linear(entered, self.tokens, layer.hidden, columns, bias=layer.bias)
        size = self.bytes_of(logits)
        if not self.split:
            raised = self.wider(logits)
            chances = run(raised, size * wide, saves_output=True)
            # a model's output is there until its loss is, and is raised to float32 in one go
            return run(chances, 0.0, saves=(chances,), looks=(logits, raised))
        raised_size = size * wide if wide > 1.0 else 0.0
        return run(
            logits, 0.0, saves=(logits,), forward=raised_size + size * wide, backward=raised_size + size * wide - size
        )
