"""The operators of Hugging Face's decoder blocks as eager torch runs them, with what each saves for backward.

Written off transformers 5.23 (``models/llama``, ``mixtral``, ``qwen3_moe``, ``gpt2``, ``opt``; ``integrations/moe.py``,
``activations.py``) and torch 2.13 (``tools/autograd/derivatives.yaml``), with this package's tensor parallelism
(``executors/tp_modules.py``, ``tp_collectives.py``) and loss (``executors/loss.py``). Attention and experts are in
``eager_attention`` and ``eager_experts``.

Left out: rotary tables, masks, a norm's number a row, indices of routed rows (under 1 % of a block); dropout (a byte
a number where it is on).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.eager_attention import attention
from meshwright.cost_models.eager_experts import experts
from meshwright.cost_models.eager_writer import Writer
from meshwright.cost_models.strategy import RECOMPUTES, ConfigBatch
from meshwright.cost_models.tape import Lifetimes, Tape, play
from meshwright.cost_models.weights import vocab_rows
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import (
    AttentionLayer,
    EmbeddingLayer,
    HeadLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormLayer,
)
from meshwright.profiler.model import Block, BlockKind

FloatArray = NDArray[np.float64]


def block_lifetimes(block: Block, workload: Workload, batch: ConfigBatch) -> Lifetimes:
    """What is alive of a block and when; decoder blocks as each config recomputes them."""
    recompute = batch.recompute * (block.kind is BlockKind.DECODER)
    few = replace(batch, recompute=recompute)
    fields = ["tp", "micro_batch_size", "sequence_parallel", "recompute"]
    attends = any(isinstance(layer, AttentionLayer) for layer in block.layers)
    fields += ["cp_ring", "cp_ulysses"] if attends else ["cp"]
    routes = any(isinstance(layer, MoeLayer) for layer in block.layers)
    fields += ["ep", "etp", "ep_chunks"] if routes else []
    fields += ["vocab_parallel"] if block.kind is not BlockKind.DECODER else []
    few, inverse = few.distinct(*fields)
    # the list of operators is the same for all that are split, shard the sequence and recompute alike
    alike = (few.tp > 1) + 2 * few.sequence_parallel + 4 * (few.cp_ring > 1) + 8 * (few.cp_ulysses > 1)
    alike = alike + 16 * few.recompute
    if routes:
        alike = alike + 64 * (few.ep > 1) + 128 * (few.etp > 1) + 256 * few.ep_chunks
    parts = []
    for which in np.unique(alike):
        rows = np.flatnonzero(alike == which)
        configs = few.take(rows)
        tape = block_tape(block, workload, configs)
        parts.append((rows, play(tape, RECOMPUTES[configs.recompute[0]], len(rows))))
    return Lifetimes.assembled(parts, len(few)).take(inverse)


def block_tape(block: Block, workload: Workload, batch: ConfigBatch) -> Tape:
    """The operators of a block, for configs that are all split over tp or all not, and shard the sequence alike."""
    return _Blocks(workload, batch).block(block)


class _Blocks(Writer):
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
            return attention(self, layer, x)
        if isinstance(layer, MlpLayer):
            return self.leave(self.mlp(layer, self.enter(x, layer.hidden)), bias=layer.bias)
        if isinstance(layer, MoeLayer):
            return experts(self, layer, x)
        return self.embedding(layer) if isinstance(layer, EmbeddingLayer) else self.head(layer, x)  # type: ignore[arg-type]

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
