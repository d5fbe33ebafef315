"""The model and the workload of a published run, from its architecture columns.

Columns give sizes; what they leave open (biases, position tables, tied embeddings) follows from the kind of
architecture and, for embeddings, from the published number of parameters.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from meshwright.cost_models.published_known import known_model
from meshwright.cost_models.published_rows import Row, Skip
from meshwright.cost_models.workload import RECIPES, DType, DTypeRecipe, Workload
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    HeadLayer,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.model import Block, BlockKind, ModelSpec
from meshwright.profiler.record import record

GPT_VOCAB = 50304  # GPT-2's 50,257, padded to a multiple of 128 as Megatron-LM does
SENTENCEPIECE_VOCAB = 32000  # T5's, Llama's and those of many papers' own tokenizers

# frameworks whose measured runs reduce gradients in bf16, beside Composer's FSDP in its mode "pure": InternEvo,
# fms-fsdp, and NVIDIA's performance recipes (NVIDIA/NeMo, nemo/collections/llm/recipes: grad_reduce_in_fp32 = False
# wherever performance optimizations are on; Megatron-Bridge, scripts/performance: the same for every model)
BF16_GRADIENTS = r"internevo|fms-fsdp|\bnemo\b|megatron-bridge"


# the forks of Megatron-LM for zero-bubble schedules and for vocabulary parallelism in pipelines, whose scripts pass
# --fp16 unless told to train in float32 (sail-sg/zero-bubble-pipeline-parallelism, examples/pretrain_zero_bubble.sh;
# sail-sg/VocabularyParallelism, pretrain_gpt.sh)
HALF_FORKS = r"megatron-lm fork"


@record
class Shape:
    """Sizes and habits of an architecture, from which its ``ModelSpec`` is built."""

    name: str
    arch_family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    experts: int
    top_k: int
    moe_ffn: int
    norm: NormKind
    gated: bool
    bias: bool
    activation: str
    tied: bool


def model_of(row: Row) -> tuple[ModelSpec, tuple[str, ...]]:
    """The model of a row, and what had to be assumed. Raises ``Skip`` where the columns do not say enough."""
    name, arch, notes = row.text("model").lower(), row.text("arch_family").lower(), list[str]()
    if _words(name) & {"lora", "qlora"}:
        raise Skip("LoRA trains adapters: not modelled")
    known = known_model(row)
    if known is not None:
        return known
    if arch not in ("gpt", "llama", "moe"):
        raise Skip(f"no model of architecture {row.text('arch_family')!r}: gpt, llama and moe are known")
    hidden, heads = row.integer("hidden"), row.integer("heads")
    modern = arch != "gpt" or "nemotron" in name or "neox" in name
    experts = row.integer("experts", 1) if row.number("experts") else 0
    if experts and any(word in name for word in _LATENT):
        raise Skip(
            "MLA ranks and shared experts have no column, and no preset has this name: see meshwright model presets"
        )
    shape = Shape(
        name=row.text("model"),
        arch_family=arch,
        layers=row.integer("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=row.integer("kv_heads", heads),
        head_dim=hidden // heads,
        ffn=row.integer("ffn", 4 * hidden) if not experts else 0,
        vocab=row.integer("vocab", GPT_VOCAB),
        positions=0 if modern or "bloom" in name or "glm" in name else row.integer("seq_len"),
        experts=experts,
        top_k=row.integer("topk", 1) if experts else 0,
        moe_ffn=row.integer("moe_ffn") if experts else 0,
        norm=NormKind.RMS if arch != "gpt" else NormKind.LAYER,
        gated=arch != "gpt" or "glm" in name,
        bias=arch == "gpt" and "nemotron" not in name,
        activation="silu" if arch != "gpt" else "relu2" if "nemotron" in name else "gelu",
        tied=False,
    )
    if hidden % heads:
        raise Skip(f"heads={heads} does not divide hidden={hidden}")
    if row.number("vocab") is None:
        shape = replace(shape, vocab=_vocab(shape, row.number("params_b")))
        notes.append(f"vocabulary assumed {shape.vocab}")
    tied = _tied(shape, row.number("params_b"), default=not modern and not _redistributes(row))
    return _spec(shape, tied), tuple(notes)


# Tokens of an example of SQuAD with its prompt, about: NVIDIA's fine-tuning runs pack as many as fill a sequence, and
# attention stays inside each (NVIDIA/NeMo, scripts/performance/llm: prepare_squad_dataset_experiment; Megatron-Bridge,
# scripts/performance/configs/llama/llama3_llm_finetune.py: packed_sequence_size)
PACKED_TOKENS = 200


def packed(row: Row, model: ModelSpec) -> tuple[ModelSpec, tuple[str, ...]]:
    """The model as it works on packed examples, where a row is supervised fine-tuning; published FLOPs ignore it.

    Causal attention inside examples of ``n`` tokens meets about as many keys as a window of ``n / 2``.
    """
    if "sft" not in _words(row.text("model").lower()):
        return model, ()
    return _windowed(model, PACKED_TOKENS // 2), (f"examples of {PACKED_TOKENS} tokens packed into a sequence assumed",)


@lru_cache(maxsize=256)
def _windowed(model: ModelSpec, window: int) -> ModelSpec:
    blocks = tuple(
        replace(
            block,
            layers=tuple(
                replace(layer, window=window) if isinstance(layer, AttentionLayer) else layer for layer in block.layers
            ),
        )
        for block in model.blocks
    )
    return replace(model, blocks=blocks)


# families whose attention has ranks that no column tells
_LATENT = ("deepseek", "kimi", "moonlight")


def _words(name: str) -> set[str]:
    return set(name.replace("-", " ").replace("_", " ").split())


def _redistributes(row: Row) -> bool:
    """Vocabulary parallelism's models keep embedding and head apart (arXiv 2411.05288, section 6.1)."""
    schedule = row.text("schedule").lower()
    return "redis" in schedule or "vocab" in schedule


def _vocab(shape: Shape, params_b: float | None) -> int:
    """A vocabulary that is not published: the usual one that explains the parameters, SentencePiece's where both do.

    Parameters are counted with one table, as papers do (arXiv 2104.04473, equation 2), and published in units of 0.1
    billion. Without them GPT-2's, as in Megatron-LM's examples.
    """
    if params_b is None or shape.experts:
        return GPT_VOCAB
    return min(
        (SENTENCEPIECE_VOCAB, GPT_VOCAB),
        key=lambda vocab: max(abs(_spec(replace(shape, vocab=vocab), True).params - params_b * 1e9) - 0.05e9, 0.0),
    )


def _tied(shape: Shape, params_b: float | None, default: bool) -> bool:
    """Whether head and embedding share a weight: what the published number of parameters says, where it tells."""
    if params_b is None or shape.experts:
        return default
    off = [abs(_spec(shape, tied).params / (params_b * 1e9) - 1) for tied in (False, True)]
    if min(off) > 0.01 or min(off) > 0.25 * max(off):
        return default
    return off[1] < off[0]


@lru_cache(maxsize=4096)
def _spec(shape: Shape, tied: bool) -> ModelSpec:
    norm = NormLayer(norm_kind=shape.norm, hidden=shape.hidden)
    attention = AttentionLayer(
        attention_kind=AttentionKind.MHA if shape.kv_heads == shape.heads else AttentionKind.GQA,
        hidden=shape.hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_head_dim=shape.head_dim,
        qkv_bias=shape.bias,
        out_bias=shape.bias,
        rotary=shape.positions == 0,
    )
    feed_forward: MlpLayer | MoeLayer
    if shape.experts:
        feed_forward = MoeLayer(
            hidden=shape.hidden, num_experts=shape.experts, top_k=shape.top_k, expert_ffn_size=shape.moe_ffn
        )
    else:
        feed_forward = MlpLayer(
            hidden=shape.hidden,
            ffn_size=shape.ffn,
            gated=shape.gated,
            bias=shape.bias,
            activation=shape.activation,
        )
    embedding = EmbeddingLayer(vocab_size=shape.vocab, hidden=shape.hidden, num_positions=shape.positions)
    return ModelSpec(
        name=shape.name,
        architecture=shape.arch_family,
        max_seq_len=max(shape.positions, 1),
        blocks=(
            Block(kind=BlockKind.EMBEDDING, layers=(embedding,)),
            Block(kind=BlockKind.DECODER, layers=(norm, attention, norm, feed_forward), repeat=shape.layers),
            Block(
                kind=BlockKind.HEAD,
                layers=(norm, HeadLayer(hidden=shape.hidden, vocab_size=shape.vocab, tied=tied)),
            ),
        ),
    )


def workload_of(row: Row) -> tuple[Workload, tuple[str, ...]]:
    """Sequence length, batch and dtypes of a row, and what had to be assumed. Raises ``Skip``."""
    precision, notes = row.text("precision").lower(), list[str]()
    framework = row.text("framework").lower()
    if "not stated" in precision or not precision:
        precision = "fp16" if re.search(HALF_FORKS, framework) else "bf16"
        notes.append(f"{precision} assumed")
    words = _words(precision)
    names = ("mxfp8", "nvfp4", "fp8", "fp16", "bf16", "fp32")
    found = next((name for name in names if name in words), None)
    if found == "fp8" and "rowwise" in words:
        found = "fp8-rowwise"
    if found is None:
        raise Skip(f"no dtype recipe for precision {row.text('precision')!r}")
    recipe = RECIPES[found]
    pure = "mp mode pure" in row.text("notes").lower() or re.search(BF16_GRADIENTS, framework)
    if pure and recipe.compute is DType.BFLOAT16:
        recipe = replace(recipe, grads=DType.BFLOAT16)
    return _workload(row.integer("seq_len"), row.integer("global_batch"), recipe), tuple(notes)


@lru_cache(maxsize=4096)
def _workload(seq_len: int, batch: int, recipe: DTypeRecipe) -> Workload:
    return Workload(seq_len=seq_len, global_batch_size=batch, recipe=recipe)
