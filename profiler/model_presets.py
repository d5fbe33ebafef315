"""Well-known models by name: the fields of their public configs, in ``presets/models/*.json``.

A file holds one family: ``family``, ``source`` (where the figures were published), ``common`` (fields that all its
models share) and ``models``: each with ``name``, ``config`` (its own fields, in the words of a Hugging Face
``config.json``), and where there are any ``hub`` (its name on the Hugging Face hub) and ``notes``.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any

from meshwright import InputError
from meshwright.profiler.record import record

PRESETS = Path(__file__).parent / "presets" / "models"


@record
class ModelPreset:
    """A model's public config; ``hub`` is its name on the Hugging Face hub, empty where it was never there."""

    name: str
    family: str
    source: str
    hub: str
    notes: tuple[str, ...]
    config_json: str  # the config's fields as JSON text, so that the record stays immutable

    def config(self) -> dict[str, Any]:
        """The config's fields."""
        fields: dict[str, Any] = json.loads(self.config_json)
        return fields


@cache
def model_presets() -> tuple[ModelPreset, ...]:
    """Every preset, by file and then in the file's order (small to large)."""
    presets = []
    for path in sorted(PRESETS.glob("*.json")):
        family = json.loads(path.read_text(encoding="utf-8"))
        for model in family["models"]:
            presets.append(
                ModelPreset(
                    name=model["name"],
                    family=family["family"],
                    source=model.get("source", family["source"]),
                    hub=model.get("hub", ""),
                    notes=(*family.get("notes", ()), *model.get("notes", ())),
                    config_json=json.dumps({**family["common"], **model["config"]}),
                )
            )
    return tuple(presets)


def find_preset(name: str) -> ModelPreset | None:
    """The preset of that name or hub name (with or without its owner), whatever the case; None if there is none."""
    wanted = name.lower()
    for preset in model_presets():
        hub = preset.hub.lower()
        if wanted and wanted in (preset.name, hub, hub.rsplit("/", 1)[-1]):
            return preset
    return None


def presets_named(text: str) -> tuple[ModelPreset, ...]:
    """The presets whose names contain ``text`` (empty: all). Raises ``InputError`` if there is none."""
    found = tuple(preset for preset in model_presets() if text.lower() in preset.name)
    if not found:
        families = ", ".join(dict.fromkeys(preset.family for preset in model_presets()))
        raise InputError(f"no preset's name contains {text!r}; there are presets of {families}")
    return found


def nearest_presets(name: str, count: int = 4) -> list[str]:
    """The names most like ``name``, best first; may be empty."""
    names = [preset.name for preset in model_presets()]
    return difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], names, n=count, cutoff=0.5)
