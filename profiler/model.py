"""What a model is: its layers with their sizes, from which parameters follow exactly.

A ``ModelSpec`` is a run of blocks: one embedding block, decoder blocks (equal neighbours folded by ``repeat``), one
head block. A block is what a pipeline can cut between; the layers in it are what tensor parallelism cuts through.
Everything here is a count or a size: FLOPs, seconds and saved bytes are predictions and live in ``cost_models``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from meshwright import InputError
from meshwright.profiler import artifact
from meshwright.profiler.layers import (
    MAX_SIZE,
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
from meshwright.profiler.record import record

__all__ = [
    "MAX_SIZE",
    "MODEL_SCHEMA_VERSION",
    "AttentionKind",
    "AttentionLayer",
    "Block",
    "BlockKind",
    "EmbeddingLayer",
    "HeadLayer",
    "LayerSpec",
    "MlpLayer",
    "ModelSpec",
    "MoeLayer",
    "NormKind",
    "NormLayer",
    "load_model",
    "save_model",
]

MODEL_SCHEMA_VERSION = 1

MAX_LAYERS = 10_000  # far above any model; a file with a slip in it should not start an endless search


class BlockKind(StrEnum):
    """Where a block stands: before, among or after the decoder layers."""

    EMBEDDING = "embedding"
    DECODER = "decoder"
    HEAD = "head"


@record
class Block:
    """Layers that stay together on one pipeline stage, ``repeat`` times in a row."""

    kind: BlockKind
    layers: tuple[LayerSpec, ...]
    repeat: int = 1

    @property
    def params(self) -> int:
        """Parameters of one repetition."""
        return sum(layer.params for layer in self.layers)


@record
class ModelSpec:
    """A whole model: blocks from embedding to head, with convenience views of the sizes that rules ask for.

    Raises ``InputError`` when the blocks are not one embedding, decoder blocks, one head.
    """

    artifact: Literal["model"] = "model"
    schema_version: int = MODEL_SCHEMA_VERSION
    name: str
    architecture: str  # the Hugging Face model_type, or the module's class name
    max_seq_len: int
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()  # what a reader must know: parts left out, departures from a paper

    def __post_init__(self) -> None:
        kinds = [block.kind for block in self.blocks]
        middle = kinds[1:-1]
        ends_right = len(kinds) >= 3 and kinds[0] is BlockKind.EMBEDDING and kinds[-1] is BlockKind.HEAD
        if not ends_right or any(kind is not BlockKind.DECODER for kind in middle):
            raise InputError("blocks must be one embedding block, decoder blocks, then one head block")
        if any(block.repeat < 1 for block in self.blocks) or self.blocks[0].repeat * self.blocks[-1].repeat != 1:
            raise InputError("repeat must be at least 1, and 1 for the embedding and the head block")
        if self.num_layers > MAX_LAYERS:
            raise InputError(f"{self.num_layers} decoder layers: at most {MAX_LAYERS} are supported")
        self._check_layers()

    def _check_layers(self) -> None:
        layers = tuple(self.layers())
        for part, count in ((EmbeddingLayer, 1), (HeadLayer, 1), (AttentionLayer, 0)):
            alike = [layer for layer in layers if isinstance(layer, part)]
            # a head that runs again on the same weight, as for multi-token prediction, is no other head
            found = len(alike) - sum(isinstance(layer, HeadLayer) and layer.tied for layer in alike[1:])
            if found < 1 or (count and found != count):
                raise InputError(f"a model needs {'one' if count else 'at least one'} {part.__name__}, found {found}")
        widths = sorted({layer.hidden for layer in layers})
        if len(widths) > 1:
            raise InputError(
                f"layers differ in hidden ({', '.join(map(str, widths))}): one residual width is supported"
            )
        if self.embedding.vocab_size != self.head.vocab_size and self.tied:
            raise InputError(
                f"tied, but the embedding has {self.embedding.vocab_size} rows and the head {self.head.vocab_size}"
            )
        if self.max_seq_len < 1:
            raise InputError(f"max_seq_len must be at least 1, found {self.max_seq_len}")

    @property
    def params(self) -> int:
        """Parameters of the whole model; a tied embedding counts once."""
        return sum(block.params * block.repeat for block in self.blocks)

    @property
    def active_params(self) -> int:
        """Parameters that one token meets: all but the routed experts it is not sent to."""
        idle = 0
        for block in self.blocks:
            for layer in block.layers:
                if isinstance(layer, MoeLayer):
                    idle += block.repeat * layer.expert_params // layer.num_experts * (layer.num_experts - layer.top_k)
        return self.params - idle

    def params_by_kind(self) -> dict[str, int]:
        """Parameters of each kind of layer that the model has, in order of appearance; they sum to ``params``."""
        counts: dict[str, int] = {}
        for block in self.blocks:
            for layer in block.layers:
                counts[layer.kind] = counts.get(layer.kind, 0) + block.repeat * layer.params
        return counts

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are, each counted as often as it is repeated."""
        return sum(block.repeat for block in self.blocks[1:-1])

    @property
    def decoder_blocks(self) -> tuple[Block, ...]:
        """Decoder blocks, equal neighbours still folded."""
        return self.blocks[1:-1]

    def layers(self) -> Iterator[LayerSpec]:
        """Every layer of one repetition of each block, in order."""
        return (layer for block in self.blocks for layer in block.layers)

    @property
    def embedding(self) -> EmbeddingLayer:
        """The token table."""
        return next(layer for layer in self.layers() if isinstance(layer, EmbeddingLayer))

    @property
    def head(self) -> HeadLayer:
        """The projection to the vocabulary."""
        return next(layer for layer in self.layers() if isinstance(layer, HeadLayer))

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.head.hidden

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.head.vocab_size

    @property
    def tied(self) -> bool:
        """Whether head and embedding share one weight."""
        return self.head.tied

    @property
    def attention(self) -> AttentionLayer:
        """The first attention layer; for rules about all of them see ``head_counts`` and ``windows``."""
        return next(layer for layer in self.layers() if isinstance(layer, AttentionLayer))

    @property
    def head_counts(self) -> tuple[tuple[int, int], ...]:
        """``(heads, key/value heads)`` of its attention layers, each pair once; a latent makes keys for every head."""
        found = {
            (layer.num_heads, layer.num_heads if layer.attention_kind is AttentionKind.MLA else layer.num_kv_heads)
            for layer in self.layers()
            if isinstance(layer, AttentionLayer)
        }
        return tuple(sorted(found))

    @property
    def windows(self) -> tuple[int, ...]:
        """The sizes of its sliding windows, in tokens, each once; empty where all attention reaches to the start."""
        return tuple(sorted({layer.window for layer in self.layers() if isinstance(layer, AttentionLayer)} - {0}))

    @property
    def moe(self) -> MoeLayer | None:
        """The first layer of experts, if there is one."""
        return next((layer for layer in self.layers() if isinstance(layer, MoeLayer)), None)

    @property
    def ffn_size(self) -> int:
        """The width that tp must divide: greatest common divisor of all dense and shared widths; 0 without any."""
        widths = [layer.ffn_size for layer in self.layers() if isinstance(layer, MlpLayer)]
        widths += [layer.shared_ffn_size for layer in self.layers() if isinstance(layer, MoeLayer)]
        return math.gcd(*widths)

    @property
    def digest(self) -> str:
        """Fingerprint of the structure; name and notes do not belong to it."""
        return artifact.digest(self, without=("name", "notes"))


def load_model(source: str | Path | Any) -> ModelSpec:
    """A ``ModelSpec`` from a preset name, a Hugging Face config, or a saved spec.

    ``source`` is one of: a preset's name (``llama3-8b``) or hub name (``Qwen/Qwen3-8B``); a path to a ``config.json``,
    to a folder that holds one, or to a saved spec (``"artifact": "model"``); a dict of a config's fields, or a config
    object (anything with ``to_dict``). A preset's name comes before a folder of that name: write ``./llama3-8b`` for
    the folder. Neither torch nor transformers is imported.

    Raises ``InputError`` for an unknown name (with the nearest ones), an architecture that is not supported (with
    those that are), or a field that is missing or wrong (with what was expected).
    """
    model: ModelSpec = import_module("meshwright.profiler.model_source").read_model(source)  # it imports this module
    return model


def save_model(model: ModelSpec, path: str | Path) -> None:
    """Write a spec as JSON for ``load_model``; raises ``InputError`` when it cannot be written."""
    artifact.save(model, path)
