"""Blocks of each pipeline stage of a published run, where its source cut the model in a way of its own."""

from __future__ import annotations

import math

from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.published_rows import Row, Skip
from meshwright.cost_models.strategy import ParallelConfig, Partition, even_stages
from meshwright.profiler.layers import HeadLayer, LayerSpec, MlpLayer
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.prediction import predicted_tokens

# blocks of each kind (blocks.block_kinds) on every chunk of every pipeline rank: [pp][vpp][kind]
Counts = tuple[tuple[tuple[float, ...], ...], ...]


def counts_of(row: Row, model: ModelSpec, config: ParallelConfig, target: Framework, seq_len: int) -> Counts | None:
    """Blocks of each stage where a source cut its model in a way of its own; ``None`` for the target's default.

    Vocabulary parallelism (arXiv 2411.05288, sections 3 and 6) moves decoder layers away from the stage of the head
    ("redistribution"), or splits embedding and head over all stages. Zero-bubble pipelines (arXiv 2401.10241, section
    5.1) leave a layer out of the first and of the last stage, for embedding and head; so does Megatron-Core where it
    counts both as layers, and for other numbers see ``uneven``. Layers that predict one more token stand on the last
    stage. Raises ``Skip`` with fewer layers than chunks.
    """
    said, stages = row.text("schedule").lower(), config.num_stages
    if config.pp == 1 or target.partition is not Partition.EVEN:
        return None
    if "redis" in said and config.vpp == 1:
        return _counts(model, config, redistributed(model, config.pp, seq_len), ends=True)
    if ("vocab" in said or "interlaced" in said) and model.num_layers % stages == 0:
        return _counts(model, config, [model.num_layers // stages] * stages, ends=False)
    predicted = predicted_tokens(model)
    num_layers = model.num_layers - predicted
    if num_layers < stages:
        per_stage, left = divmod(num_layers + 2, stages)
        if left or not per_stage:
            raise Skip(f"{num_layers} layers cannot fill pp*vpp={stages} stages")
        layers = [per_stage - (stage in (0, stages - 1)) for stage in range(stages)]
    elif num_layers % stages and (num_layers + 2) % stages and target.name.startswith(("megatron-bridge", "nemo")):
        layers = uneven(num_layers, stages, target.name)
    elif predicted:
        layers = list(even_stages(num_layers, stages))
    else:
        return None
    return _counts(model, config, [*layers[:-1], layers[-1] + predicted], ends=True)


def uneven(num_layers: int, stages: int, target: str) -> list[int]:
    """Layers of each stage in NVIDIA's recipes where the stages divide them neither with nor without their two ends.

    As many on each stage as it takes, and what is left on the last: 61 layers on 16 stages are 15 times 4, and 1
    (Megatron-Bridge, ``recipes/deepseek/h100/deepseek_v3.py: _get_deepseek_v3_pipeline_layout`` and
    ``recipes/kimi``); where nothing is left for it, the first has what is left ("Et|(tt|)*30mL" of their performance
    recipes: 1, 30 times 2, 0). NeMo until 25.05 left one layer out of the first stage and two out of the last
    (``scripts/performance/llm/pretrain_deepseek_v3.py``).
    """
    each = math.ceil(num_layers / stages)
    if target.startswith("nemo") and (num_layers + 3) % stages == 0:
        return [each - 1, *[each] * (stages - 2), each - 2]
    left = num_layers - each * (stages - 1)
    if left > 0:
        return [*[each] * (stages - 1), left]
    return [max(num_layers - each * (stages - 2), 0), *[each] * (stages - 2), 0]


def redistributed(model: ModelSpec, pp: int, seq_len: int) -> list[int]:
    """Decoder layers of each stage where the head counts as some: the last has what is left of an even share.

    The head is ``h`` layers by FLOPs (a token's attention over all ``seq_len`` others among a layer's); the last
    stage takes ``(layers + h) / pp - h`` layers, rounded up, at least none: so the settings that the authors publish
    (sail-sg/VocabularyParallelism, ``artifact/exp_one_host.csv``, layers_last). The others share the rest, those
    before the last having one more (``transformer_block.py: get_num_layers_to_build`` there).
    """
    attention = model.attention.num_heads * (model.attention.head_dim + model.attention.value_head_dim) * seq_len
    layer = attention + sum(_weights(layer, model) for layer in model.decoder_blocks[0].layers)
    head = _weights(model.head, model) / layer
    last = max(math.ceil((model.num_layers + head) / pp - head), 0)
    base, left = divmod(model.num_layers - last, pp - 1)
    return [base + (stage >= pp - 1 - left) for stage in range(pp - 1)] + [last]


def _weights(layer: LayerSpec, model: ModelSpec) -> int:
    if isinstance(layer, HeadLayer):
        return layer.hidden * layer.vocab_size
    if isinstance(layer, MlpLayer):
        return (2 + layer.gated) * layer.hidden * layer.ffn_size
    return sum(rows * columns for rows, columns in model.attention.matmuls) if layer is model.attention else 0


def _counts(model: ModelSpec, config: ParallelConfig, layers: list[int], *, ends: bool) -> Counts:
    """Chunk ``s // pp`` of rank ``s % pp`` holds the next ``layers[s]`` decoder blocks."""
    kinds = block_kinds(model)
    stages, first = config.num_stages, 0
    table = [[[0.0] * len(kinds) for _ in range(config.vpp)] for _ in range(config.pp)]
    for stage, number in enumerate(layers):
        blocks = table[stage % config.pp][stage // config.pp]
        for kind in kinds.of_layer[first : first + number]:
            blocks[kind] += 1.0
        first += number
        blocks[0] = float(stage == 0) if ends else 1.0 / stages
        blocks[-1] = float(stage == stages - 1) if ends else 1.0 / stages
    return tuple(tuple(tuple(blocks) for blocks in rank) for rank in table)
