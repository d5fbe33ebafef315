"""Sentences for searches that found nothing to recommend: what is nearest, what it lacks, how to take it anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from meshwright.cost_models.estimate import Estimate
from meshwright.cost_models.margin import MemoryMargin
from meshwright.planner.exhaustive import EXHAUSTIVE, Scored
from meshwright.profiler.units import format_bytes

SMALLER = "take more devices or shorter sequences, or a smaller dtype recipe (--dtype-recipe bf16-pure)"


def nothing_recommended(scored: Scored, margin: MemoryMargin | None, constraints: Mapping[str, Any]) -> str:
    """Why none of the legal configs is taken, with the numbers of the nearest and what to do."""
    ranking = scored.ranking
    position = ranking.nearest_miss()
    nearest = ranking.estimates(np.asarray([position]))[0]
    advice = f"drop a --fix, {SMALLER}" if constraints else SMALLER
    num_fit = int(ranking.fits.sum())
    if num_fit and margin is not None:
        verb = "config fits" if num_fit == 1 else "configs fit"
        fit = f"{num_fit:,} {verb}" if scored.method == EXHAUSTIVE else "some configs fit"
        return _nothing_with_margin(nearest, margin, fit, advice)
    memory = nearest.memory
    lacking = float(ranking.peak_bytes[position] - ranking.usable_bytes[position])
    return (
        f"nothing fits: the nearest miss is {nearest.config.describe()}, which needs {format_bytes(memory.peak_bytes)} "
        f"of {format_bytes(memory.capacity_bytes - memory.reserved_bytes)} on stage {memory.stage}, "
        f"{format_bytes(lacking)} too much; {advice}"
    )


def _nothing_with_margin(nearest: Estimate, margin: MemoryMargin, fit: str, advice: str) -> str:
    memory = nearest.memory
    usable = memory.capacity_bytes - memory.reserved_bytes
    held = memory.peak_bytes + memory.fragmentation_bytes
    needed = held * (1.0 + margin.share)
    fragmentation = (
        f", {format_bytes(memory.fragmentation_bytes)} of fragmentation" if memory.fragmentation_bytes else ""
    )
    share = np.floor((usable / held - 1.0) * 1000.0) / 1000.0  # the largest margin that takes it
    return (
        f"nothing is recommended, though {fit}: nearest is {nearest.config.describe()}, which needs "
        f"{format_bytes(memory.peak_bytes)}{fragmentation} and a margin of {margin.share:.1%}, {format_bytes(needed)} "
        f"of {format_bytes(usable)} on stage {memory.stage}, {format_bytes(needed - usable)} too much; "
        f"--memory-margin {share if share > 0 else 0:g} would take it at your risk, or {advice}"
    )
