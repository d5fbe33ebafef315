"""Which blocks each pipeline stage holds, and how many of a block's parameters one rank has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import ConfigBatch, IntArray, Partition, even_stages
from meshwright.cost_models.weights import Weight, layer_weights, local_shape
from meshwright.profiler.layers import AttentionLayer, HeadLayer, LayerSpec, MlpLayer, MoeLayer
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
    build_model`` and the models' ``get_block_compute_costs``; embedding and norms count nothing). ``Partition.LATER``
    is InternEvo's (``internlm/solver/pipeline_utils.py: partition_uniform``).
    """
    costs: tuple[int, ...] = ()
    if partition is Partition.BY_COST:
        weights = [sum(matmul_params(layer) for layer in kind.layers) for kind in kinds.kinds]
        costs = tuple(weights[kind] for kind in [0, *kinds.of_layer, len(kinds) - 1])
    return _stage_counts(tuple(kinds.of_layer.tolist()), len(kinds), pp, vpp, partition is Partition.LATER, costs)


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
    of_layer: tuple[int, ...], num_kinds: int, pp: int, vpp: int, later: bool, costs: tuple[int, ...] = ()
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
    sizes = even_stages(len(of_layer), pp * vpp)
    for stage, size in enumerate(sorted(sizes) if later else sizes):
        for kind in of_layer[first : first + size]:
            counts[stage % pp, stage // pp, kind] += 1
        first += size
    counts[0, 0, 0] = counts[-1, -1, -1] = 1
    return counts


def block_weights(block: Block) -> tuple[Weight, ...]:
    """Every weight tensor of a block, layer by layer."""
    return tuple(weight for layer in block.layers for weight in layer_weights(layer))


def rank_params(block: Block, batch: ConfigBatch) -> FloatArray:
    """Parameters of a block that one tensor-parallel rank holds, before ZeRO; shape ``[num_configs]``.

    tp cuts whole heads (with more ranks than key/value heads each rank keeps a copy of one), feed-forward widths
    and, with ``vocab_parallel``, the vocabulary, padded up to a multiple of tp; ep and etp cut routed experts. Norms,
    biases of what is summed over ranks, routers, and the latent projections of MLA with their biases are held whole. A
    tied head has its own copy only where a pipeline parts it from the embedding.
    """
    total = np.zeros(len(batch))
    for weight in block_weights(block):
        experts, rows, columns = local_shape(weight, batch)
        total = total + weight.copies * experts * rows * columns
    return total


def routed_params(block: Block, batch: ConfigBatch) -> FloatArray:
    """Those of ``rank_params`` that are routed experts, which other ranks hold alike (``edp``): ``[num_configs]``."""
    total = np.zeros(len(batch))
    for weight in block_weights(block):
        if weight.experts:
            experts, rows, columns = local_shape(weight, batch)
            total = total + weight.copies * experts * rows * columns
    return total


def num_tensors(block: Block) -> int:
    """Parameter tensors of a block (projections apart, as modules hold them): what an eager optimizer loops over."""
    return sum(weight.copies for weight in block_weights(block))
