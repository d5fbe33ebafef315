"""Which blocks each pipeline stage holds, and how many of a layer's parameters one rank has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import ConfigBatch, IntArray, Partition, even_stages
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
from meshwright.profiler.model import Block, ModelSpec

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BlockKinds:
    """The different blocks of a model: the embedding first, each different decoder block, the head last.

    ``of_layer[i]`` is the position in ``kinds`` of decoder layer ``i``.
    """

    kinds: tuple[Block, ...]
    of_layer: IntArray

    def __len__(self) -> int:
        return len(self.kinds)


def block_kinds(model: ModelSpec) -> BlockKinds:
    """Equal decoder blocks are found wherever they stand, folded by ``repeat`` or not."""
    kinds, of_layer = [model.blocks[0]], []
    for block in model.decoder_blocks:
        same = [index for index, kind in enumerate(kinds) if index and kind.layers == block.layers]
        if not same:
            kinds.append(block)
        of_layer += [same[0] if same else len(kinds) - 1] * block.repeat
    return BlockKinds((*kinds, model.blocks[-1]), np.array(of_layer, dtype=np.int64))


def stage_counts(kinds: BlockKinds, pp: int, vpp: int, partition: Partition = Partition.EVEN) -> IntArray:
    """Blocks of each kind on each chunk of each rank under the default partition: shape ``[pp, vpp, num_kinds]``.

    Stage ``s`` is chunk ``s // pp`` of rank ``s % pp``. ``Partition.BY_COST`` is nanotron's: blocks in order, each on
    the stage at hand, which is full once the matmul weights so far pass its share of all (nanotron, ``models/base.py:
    build_model`` and the models' ``get_block_compute_costs``; embedding and norms count nothing).
    """
    costs: tuple[int, ...] = ()
    if partition is Partition.BY_COST:
        weights = [sum(matmul_params(layer) for layer in kind.layers) for kind in kinds.kinds]
        costs = tuple(weights[kind] for kind in [0, *kinds.of_layer, len(kinds) - 1])
    return _stage_counts(tuple(kinds.of_layer.tolist()), len(kinds), pp, vpp, costs)


def matmul_params(layer: LayerSpec) -> int:
    """Weights of a layer that tokens are multiplied with: not the embedding's, not those of norms."""
    if isinstance(layer, AttentionLayer):
        return sum(rows * columns for rows, columns in layer.matmuls)
    if isinstance(layer, MlpLayer):
        return (2 + layer.gated) * layer.hidden * layer.ffn_size
    if isinstance(layer, MoeLayer):
        return layer.expert_params // layer.num_experts * layer.top_k
    return layer.hidden * layer.vocab_size if isinstance(layer, HeadLayer) else 0


@lru_cache(maxsize=256)
def _stage_counts(
    of_layer: tuple[int, ...], num_kinds: int, pp: int, vpp: int, costs: tuple[int, ...] = ()
) -> IntArray:
    counts, first = np.zeros((pp, vpp, num_kinds), dtype=np.int64), 0
    if costs:
        stage, so_far = 0, 0
        for kind, cost in zip((0, *of_layer, num_kinds - 1), costs, strict=True):
            counts[stage % pp, stage // pp, kind] += 1
            so_far += cost
            if so_far * pp * vpp > sum(costs) * (stage + 1) and stage < pp * vpp - 1:
                stage += 1
        return counts
    for stage, size in enumerate(even_stages(len(of_layer), pp * vpp)):
        for kind in of_layer[first : first + size]:
            counts[stage % pp, stage // pp, kind] += 1
        first += size
    counts[0, 0, 0] = counts[-1, -1, -1] = 1
    return counts


def rank_params(block: Block, batch: ConfigBatch) -> FloatArray:
    """Parameters of a block that one tensor-parallel rank holds, before ZeRO; shape ``[num_configs]``.

    tp cuts whole heads (with more ranks than key/value heads each rank keeps a copy of one), feed-forward widths
    and, with ``vocab_parallel``, the vocabulary, padded up to a multiple of tp. Norms, biases of what is summed over
    ranks, and the latent projections of MLA are held whole. A tied head has its own copy only where a pipeline
    parts it from the embedding.
    """
    return np.asarray(sum(_layer_params(layer, batch) for layer in block.layers), dtype=np.float64)


def expert_params(block: Block, batch: ConfigBatch) -> FloatArray:
    """Those of ``rank_params`` that belong to routed experts, which are shared by fewer ranks than the rest."""
    whole = float(sum(layer.expert_params for layer in block.layers if isinstance(layer, MoeLayer)))
    return np.asarray(whole / (batch.ep * batch.etp))


def _layer_params(layer: LayerSpec, batch: ConfigBatch) -> FloatArray:
    tp = batch.tp.astype(np.float64)
    if isinstance(layer, NormLayer):
        return np.full(len(batch), float(layer.params))
    if isinstance(layer, EmbeddingLayer):
        return (vocab_rows(layer.vocab_size, batch) + layer.num_positions) * layer.hidden
    if isinstance(layer, HeadLayer):
        rows = vocab_rows(layer.vocab_size, batch)
        own = np.where(layer.tied & (batch.pp == 1), 0.0, 1.0)
        return np.asarray(rows * (layer.hidden * own + layer.bias))
    if isinstance(layer, MlpLayer):
        whole = float(layer.hidden if layer.bias else 0)
        return (layer.params - whole) / tp + whole
    if isinstance(layer, MoeLayer):
        shared = (3 if layer.gated else 2) * layer.hidden * layer.shared_ffn_size
        rest = layer.params - layer.expert_params - shared
        return np.asarray(layer.expert_params / (batch.ep * batch.etp) + shared / tp + rest)
    return _attention_params(layer, tp)


def _attention_params(layer: AttentionLayer, tp: FloatArray) -> FloatArray:
    whole = (layer.hidden if layer.out_bias else 0) + layer.qk_norm_params + layer.extra_params
    if layer.attention_kind is AttentionKind.MLA:
        latent = layer.hidden * (layer.kv_lora_rank + layer.rope_head_dim + layer.q_lora_rank)
        return np.asarray((layer.params - whole - latent) / tp + latent + whole)
    kv_heads = np.maximum(layer.num_kv_heads / tp, 1.0)
    width = layer.num_heads / tp * layer.head_dim + kv_heads * (layer.head_dim + layer.value_head_dim)
    out = layer.num_heads / tp * layer.value_head_dim * layer.hidden
    return np.asarray(width * (layer.hidden + layer.qkv_bias) + out + whole)


def vocab_rows(vocab_size: int, batch: ConfigBatch, multiple: IntArray | int = 1) -> FloatArray:
    """Rows of the token table or head on one rank, a multiple of ``multiple``."""
    ranks = np.where(batch.vocab_parallel, batch.tp, 1)
    return np.asarray(np.ceil(vocab_size / ranks / multiple) * multiple, dtype=np.float64)


def num_tensors(block: Block) -> int:
    """Parameter tensors of a block (projections apart, as modules hold them): what an eager optimizer loops over."""
    count = 0
    for layer in block.layers:
        if isinstance(layer, NormLayer):
            count += (1 if layer.norm_kind is NormKind.RMS else 2) * layer.affine
        elif isinstance(layer, AttentionLayer):
            mla = layer.attention_kind is AttentionKind.MLA
            count += (len(layer.matmuls) if mla else 4) + 3 * layer.qkv_bias + layer.out_bias
            count += 2 * (layer.qk_norm_params > 0)
        elif isinstance(layer, MlpLayer):
            count += (2 + layer.gated) * (1 + layer.bias)
        elif isinstance(layer, MoeLayer):
            count += 3 + (3 if layer.shared_ffn_size else 0)
        elif isinstance(layer, EmbeddingLayer):
            count += 1 + (layer.num_positions > 0)
        else:
            count += 1 + layer.bias
    return count
