"""A Hugging Face ``config.json`` -> ``ModelSpec``, without transformers.

Each ``model_type`` has one builder. Its defaults for absent fields are those of transformers' own config class, and its
layers hold exactly the parameters of transformers' own module (files ``configuration_*.py`` and ``modeling_*.py`` under
``transformers/models``, version 5.23); a test builds every one of them on the meta device and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from meshwright import InputError
from meshwright.profiler.hf_deepseek import deepseek
from meshwright.profiler.hf_fields import Fields, shorten
from meshwright.profiler.hf_gemma import gemma
from meshwright.profiler.hf_gpt import gpt2, gpt_neox, opt
from meshwright.profiler.hf_gpt_oss import gpt_oss
from meshwright.profiler.hf_llama import llama_like
from meshwright.profiler.hf_llama4 import llama4
from meshwright.profiler.hf_parts import Parts
from meshwright.profiler.hf_phi import phi, phi3, phimoe
from meshwright.profiler.model import Block, BlockKind, ModelSpec

GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# model_type -> its builder, and the other names its fields go by (transformers' attribute_map)
BUILDERS: dict[str, tuple[Callable[[Fields, str], Parts], dict[str, str]]] = {
    "llama": (llama_like, {}),
    "mistral": (llama_like, {}),
    "mixtral": (llama_like, {"num_local_experts": "num_experts"}),
    "qwen2": (llama_like, {}),
    "qwen3": (llama_like, {}),
    "qwen2_moe": (llama_like, {"num_experts": "num_local_experts"}),
    "qwen3_moe": (llama_like, {"num_experts": "num_local_experts"}),
    "deepseek_v2": (deepseek, {"n_routed_experts": "num_experts"}),
    "deepseek_v3": (
        deepseek,
        {"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    ),
    "kimi_k2": (  # DeepSeek-V3's module with a config class of its own on the hub
        deepseek,
        {"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    ),
    "gpt_oss": (gpt_oss, {"num_local_experts": "num_experts"}),
    "gemma": (gemma, {}),
    "gemma2": (gemma, {}),
    "gemma3_text": (gemma, {"sliding_window_pattern": "_sliding_window_pattern"}),
    "phi": (phi, {}),
    "phi3": (phi3, {}),
    "phimoe": (phimoe, {}),
    "llama4_text": (llama4, {}),
    "opt": (opt, {}),
    "gpt_neox": (gpt_neox, {}),
    "gpt2": (gpt2, GPT2_ALIASES),
}


# models of several modalities -> the type of their text part, described by their "text_config"
TEXT_PARTS = {"gemma3": "gemma3_text", "llama4": "llama4_text"}


def spec_from_config(config: Mapping[str, Any], *, name: str, where: str, notes: Sequence[str] = ()) -> ModelSpec:
    """The ``ModelSpec`` of a config's fields; ``where`` names their origin in messages, ``name`` becomes the spec's.

    Fields without influence on sizes (dropout, initialisers, token ids, rope, quantisation) are not looked at. Of a
    model of several modalities (``TEXT_PARTS``) the text part is read, and a note says so.
    Raises ``InputError`` for a ``model_type`` that is missing or not supported, or a field that is missing or wrong.
    """
    if "model_type" not in config:
        raise InputError(f'{where}: model_type: missing; a Hugging Face config names it, for example "llama"')
    model_type = config["model_type"]
    if isinstance(model_type, str) and model_type in TEXT_PARTS:
        text = Fields(config, where=where).part("text_config")
        inner = {"tie_word_embeddings": config.get("tie_word_embeddings", model_type == "gemma3")} | {**text}
        left_out = f"the text part of a {model_type}: what reads images is left out"
        fields = inner | {"model_type": TEXT_PARTS[model_type]}
        return spec_from_config(fields, name=name, where=f"{where}: text_config", notes=(*notes, left_out))
    if not isinstance(model_type, str) or model_type not in BUILDERS:
        known = ", ".join((*BUILDERS, *TEXT_PARTS))
        raise InputError(f"{where}: model_type {shorten(model_type)} is not supported; supported: {known}")
    build, aliases = BUILDERS[model_type]
    parts = build(Fields(config, where=where, aliases=aliases), model_type)
    return assemble(parts, name=name, architecture=model_type, notes=notes)


def assemble(parts: Parts, *, name: str, architecture: str, notes: Sequence[str] = ()) -> ModelSpec:
    """Blocks from parts, equal neighbours folded."""
    decoder = (
        Block(kind=BlockKind.DECODER, layers=layers, repeat=sum(1 for _ in run))
        for layers, run in groupby(parts.layers)
    )
    return ModelSpec(
        name=name,
        architecture=architecture,
        max_seq_len=parts.max_seq_len,
        blocks=(
            Block(kind=BlockKind.EMBEDDING, layers=(parts.embedding, *parts.after_embedding)),
            *decoder,
            Block(kind=BlockKind.HEAD, layers=parts.final),
        ),
        notes=(*notes, *parts.notes),
    )
