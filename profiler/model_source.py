"""Where a model comes from: a name, a file, a folder, a dict or a config object -> ``ModelSpec``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright import InputError
from meshwright.profiler import artifact
from meshwright.profiler.hf_config import spec_from_config
from meshwright.profiler.model import MODEL_SCHEMA_VERSION, ModelSpec
from meshwright.profiler.model_presets import find_preset, nearest_presets


def read_model(source: str | Path | Any) -> ModelSpec:
    """What ``model.load_model`` says."""
    if isinstance(source, ModelSpec):
        return source
    if isinstance(source, Path):
        return _read_path(source)
    if isinstance(source, str):
        return _read_name(source)
    if isinstance(source, Mapping):
        return _read_fields(source, name="", where="config")
    to_dict = getattr(source, "to_dict", None)
    if callable(to_dict) and not isinstance(source, type):
        fields: Any = to_dict()
        if isinstance(fields, Mapping):
            return _read_fields(fields, name="", where=type(source).__name__)
    raise InputError(
        f"cannot read a model from {type(source).__name__}: expected a preset's name, a path, a config or its fields"
    )


def _read_name(name: str) -> ModelSpec:
    preset = find_preset(name)
    if preset is not None:
        return spec_from_config(preset.config(), name=preset.name, where=f"preset {preset.name}", notes=preset.notes)
    path = Path(name)
    try:
        is_there = name != "" and path.exists()
    except (OSError, ValueError):  # a name too long or with a null byte is no file
        is_there = False
    if is_there:
        return _read_path(path)
    nearest = nearest_presets(name)
    hint = f"the nearest presets are {', '.join(nearest)}" if nearest else "no preset has a name like it"
    raise InputError(
        f"unknown model {_short(name)}: no preset and no file of that name; {hint} (all: meshwright model presets)"
    )


def _read_path(path: Path) -> ModelSpec:
    file = path / "config.json" if path.is_dir() else path
    try:
        text = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:  # a name that no file can have
        raise InputError(f"cannot read {str(file)!r}: {error}") from None
    if not text.strip():
        raise InputError(f"{file} is empty")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected a JSON object: a Hugging Face config or a saved model")
    if "artifact" in tree:
        return artifact.loads(ModelSpec, text, artifact="model", schema_version=MODEL_SCHEMA_VERSION, where=str(file))
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return _read_fields(tree, name=name, where=str(file))


def _read_fields(fields: Mapping[str, Any], *, name: str, where: str) -> ModelSpec:
    given = fields.get("_name_or_path")
    if not name:
        name = given if isinstance(given, str) and given else str(fields.get("model_type"))
    return spec_from_config(fields, name=name, where=where)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
