"""Well-known models among published runs: what has no column (latent attention, shared experts, windows) by name."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from meshwright.cost_models.published_rows import Row
from meshwright.profiler.hf_config import spec_from_config
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MoeLayer
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.model_presets import ModelPreset, model_presets
from meshwright.profiler.prediction import with_prediction

# columns and the fields of a config that hold the same, the first that a preset has
_FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("layers", ("num_hidden_layers",)),
    ("hidden", ("hidden_size",)),
    ("heads", ("num_attention_heads",)),
    ("kv_heads", ("num_key_value_heads",)),
    ("vocab", ("vocab_size",)),
    ("experts", ("n_routed_experts", "num_local_experts", "num_experts")),
    ("topk", ("num_experts_per_tok",)),
    ("moe_ffn", ("moe_intermediate_size", "intermediate_size")),
    ("ffn", ("intermediate_size_mlp", "intermediate_size")),
)

SIZES = ("hidden", "heads", "experts", "topk", "moe_ffn")  # columns that tell a model from a sister

# frameworks whose recipes train the layers of multi-token prediction that a config names: DeepSeek's own (arXiv
# 2412.19437), NVIDIA/NeMo (nemo/collections/llm/recipes/deepseek_v3.py: use_mtp), Megatron-Bridge
# (models/deepseek/deepseek_v3_bridge.py: mtp_num_layers) and Megatron-LM (examples/megatron_fsdp/
# sbatch_mfsdp_deepseek_v3.sh: --mtp-num-layers 1); tables say "w/o MTP" where they are off
PREDICTS = re.compile(r"hai-llm|\bnemo\b|megatron-(?:bridge|core|lm)")
WITHOUT_PREDICTION = re.compile(r"w/o mtp|without mtp|no mtp")


def known_model(row: Row) -> tuple[ModelSpec, tuple[str, ...]] | None:
    """The model of a row by its name, where its columns cannot say all of it; ``None`` for any other model.

    A smaller sister under a known name (a DeepSeek-V3 of 16B) is the known model that has its sizes. Sizes are
    those of the columns (``layers`` of a proxy that is cut short among them), and where a column is blank or does not
    exist those of the known model's public config; notes say where the two differ. Parameters that are published are
    not used.
    """
    preset = preset_named(row.text("model"))
    if preset is None or _is_plain(preset.name):
        return None
    preset = _of_its_sizes(row, preset)
    config, notes, changes = preset.config(), list[str](), list[tuple[str, Any]]()
    for column, names in _FIELDS:
        name = next((name for name in names if name in config), None)
        if name is None or row.number(column) is None:
            continue
        value, usual = row.integer(column), config[name]
        if column == "ffn" and _is_experts_width(row, config, name):
            continue
        changes.append((name, value))
        if value == usual:
            continue
        notes.append(
            f"{value} of the {usual} layers of {preset.name}"
            if column == "layers" and value < usual
            else f"{column} {value} as published, {usual} in the config of {preset.name}"
        )
    model = _spec(preset.name, row.text("model"), tuple(changes), _predicts(row, config))
    return model, (f"layers of {preset.name} by its public config", *notes)


@lru_cache(maxsize=1024)
def preset_named(name: str) -> ModelPreset | None:
    """The preset that a name starts with, whatever the case and the separators: the longest, ``None`` without any.

    ``Qwen2-57B-A14B`` and ``DeepSeek_V3 671B`` are found; ``deepseek-v3.2`` is another model than ``deepseek-v3``.
    """
    words = [word for word in re.split(r"[^a-z0-9.]+", name.lower()) if word]
    starts = {"".join(words[:count]) for count in range(1, len(words) + 1)}
    found = [preset for preset in model_presets() if re.sub(r"[^a-z0-9.]", "", preset.name) in starts]
    return max(found, key=lambda preset: len(preset.name), default=None)


def _of_its_sizes(row: Row, named: ModelPreset) -> ModelPreset:
    """The preset whose sizes a row has throughout: the named one or its like, the named one where there is none."""
    others = (preset for preset in model_presets() if preset != named and _kind(preset) == _kind(named))
    return next((preset for preset in (named, *others) if _has_sizes(row, preset)), named)


def _kind(preset: ModelPreset) -> str:
    """The first word of its model type: ``deepseek`` of ``deepseek_v2``."""
    return str(preset.config()["model_type"]).split("_")[0]


def _has_sizes(row: Row, preset: ModelPreset) -> bool:
    config = preset.config()
    told = [(row.number(column), names) for column, names in _FIELDS if column in SIZES]
    return all(
        value is None or value == next((config[name] for name in names if name in config), None)
        for value, names in told
    )


def _is_experts_width(row: Row, config: dict[str, Any], name: str) -> bool:
    """Whether the column of dense layers repeats the width of experts, or the model has no dense layers of its own."""
    repeated = row.number("ffn") == row.number("moe_ffn")
    return repeated or (name == "intermediate_size" and "moe_intermediate_size" not in config)


def _predicts(row: Row, config: dict[str, Any]) -> int:
    depth = int(config.get("num_nextn_predict_layers") or 0)
    off = WITHOUT_PREDICTION.search(f"{row.text('model')} {row.text('notes')}".lower())
    return depth if PREDICTS.search(row.text("framework").lower()) and not off else 0


@lru_cache(maxsize=256)
def _is_plain(preset: str) -> bool:
    """Whether columns say all of a model: no experts, windows or latents, and heads that make up the hidden size."""
    model = _spec(preset, preset, (), 0)
    attention = [layer for layer in model.layers() if isinstance(layer, AttentionLayer)]
    usual = all(
        layer.attention_kind is not AttentionKind.MLA
        and not layer.window
        and layer.num_heads * layer.head_dim == layer.hidden
        for layer in attention
    )
    return usual and not any(isinstance(layer, MoeLayer) for layer in model.layers())


@lru_cache(maxsize=1024)
def _spec(preset: str, name: str, changes: tuple[tuple[str, Any], ...], predicted: int) -> ModelSpec:
    found = next(one for one in model_presets() if one.name == preset)
    model = spec_from_config({**found.config(), **dict(changes)}, name=name, where=f"preset {preset}")
    return with_prediction(model, predicted) if predicted else model
