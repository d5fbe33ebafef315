"""The targets by name: each framework's facts (``target_torch``, ``target_megatron``) with its calibrated constants.

``framework.Framework`` explains the traits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from meshwright import InputError
from meshwright.cost_models.constants import Value, on_framework
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.target_experts import EXPERT_TARGETS
from meshwright.cost_models.target_llama3 import LLAMA3_4D
from meshwright.cost_models.target_megatron import (
    INTERNEVO,
    MEGASCALE,
    MEGATRON_BRIDGE,
    MEGATRON_BRIDGE_NCCL,
    MEGATRON_BRIDGE_OFFLOAD,
    MEGATRON_DEEPSPEED,
    MEGATRON_LM,
    MEGATRON_LM_2021,
    MEGATRON_LM_2022,
    MEGATRON_LM_INTERLACED,
    MEGATRON_LM_VOCAB_1,
    MEGATRON_LM_VOCAB_2,
    NANOTRON,
    NANOTRON_2024,
    NEMO,
    NEMO_2024,
    NEMO_NCCL,
)
from meshwright.cost_models.target_torch import (
    DEEPSPEED,
    DEEPSPEED_2021,
    LLM_FOUNDRY,
    LLM_FOUNDRY_TORCH1,
    MESHWRIGHT,
    TORCHTITAN,
    TORCHTITAN_2024,
    TORCHTITAN_ASYNC_TP,
    TORCHTITAN_EAGER,
)

# as the records above say, before what published runs say
ASSUMED: dict[str, Framework] = {
    target.name: target
    for target in (
        MESHWRIGHT,
        MEGATRON_LM,
        MEGATRON_LM_VOCAB_1,
        MEGATRON_LM_VOCAB_2,
        MEGATRON_LM_INTERLACED,
        MEGATRON_LM_2022,
        MEGATRON_LM_2021,
        MEGASCALE,
        MEGATRON_DEEPSPEED,
        MEGATRON_BRIDGE,
        MEGATRON_BRIDGE_OFFLOAD,
        NEMO,
        NEMO_2024,
        MEGATRON_BRIDGE_NCCL,
        NEMO_NCCL,
        NANOTRON,
        NANOTRON_2024,
        TORCHTITAN,
        TORCHTITAN_2024,
        TORCHTITAN_EAGER,
        TORCHTITAN_ASYNC_TP,
        LLM_FOUNDRY,
        LLM_FOUNDRY_TORCH1,
        DEEPSPEED,
        DEEPSPEED_2021,
        INTERNEVO,
        LLAMA3_4D,
        *EXPERT_TARGETS,
    )
}
CALIBRATED = Path(__file__).parent / "calibrated.json"  # written by benchmarks/calibrate_presets.py
MARGINS = Path(__file__).parent / "memory_margins.json"  # written by benchmarks/memory_margin.py


def _calibrated(targets: Mapping[str, Framework]) -> dict[str, Framework]:
    """The targets with their fitted constants; a version has those of its target that it shares."""
    entries = json.loads(CALIBRATED.read_text(encoding="utf-8")) if CALIBRATED.is_file() else {}
    values = tuple(
        Value(owner="target", of=of, name=name, value=value)
        for of, entry in entries.items()
        for name, value in entry["values"].items()
    )
    found = {}
    for name, target in targets.items():
        on = [entries[of]["fitted_on"] for of in (target.version_of, name) if of in entries]
        found[name] = replace(on_framework(target, values), calibrated_on="; ".join(dict.fromkeys(on)))
    return found


def _with_margins(targets: Mapping[str, Framework]) -> dict[str, Framework]:
    """The targets with what their predictions of memory have been seen to miss."""
    margins = json.loads(MARGINS.read_text(encoding="utf-8")) if MARGINS.is_file() else {}
    return {
        name: replace(
            target,
            memory=replace(target.memory, margin=margins[name]["margin"], margin_source=margins[name]["source"]),
        )
        if name in margins
        else target
        for name, target in targets.items()
    }


FRAMEWORKS: dict[str, Framework] = _with_margins(_calibrated(ASSUMED))


def framework_named(name: str) -> Framework:
    """The target of that name. Raises ``InputError`` naming the known ones."""
    try:
        return FRAMEWORKS[name]
    except KeyError:
        raise InputError(f"unknown framework {name!r}: expected one of {', '.join(FRAMEWORKS)}") from None
