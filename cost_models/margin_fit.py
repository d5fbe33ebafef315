"""The margin of every target, from the published peaks of runs that ran: what predictions of memory have missed.

Of a run, *exceeding* is measured over predicted peak, minus 1, in what its source counts (``scorecard_memory``). The
margin of a target is the smallest share that ``QUANTILE`` of its runs do not exceed, and never below 0. Versions of a
target are one with it. A target with fewer than ``MIN_PEAKS`` peaks has the widest margin among its own and those of
its relatives: other targets on the same library, whose allocator and workspaces are the same.

Runs that failed have no peak, so that the peaks are those of runs which had room: where the device was full, an
allocator frees what it holds before it gives up, and a peak cannot be above the device. What that leaves out is seen in
the scorecard's picks among failures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from meshwright.cost_models.framework import Framework
from meshwright.cost_models.scorecard_memory import RAN
from meshwright.cost_models.scorecard_rows import RowScore
from meshwright.profiler.record import record

# A first choice is seldom at the very limit, so that far fewer than one in ten of them needs more than it has; a wider
# margin costs the fast plans of models that fill their devices. ``validate``'s picks among failures show both sides.
QUANTILE = 0.9
MIN_PEAKS = 10  # of fewer the quantile is but the largest
# targets on one library: torch's own FSDP, DTensor and pipelining; Megatron-Core and what it grew from. nanotron and
# internevo have code, and peaks, of their own
RELATIVES = (
    ("meshwright", "torchtitan", "llm-foundry", "deepspeed", "deepspeed-2021", "llama3-4d"),
    ("megatron-lm", "megatron-deepspeed", "megatron-bridge"),
)


@record
class TargetMargin:
    """The margin of one target, and in words whose peaks say so and how many those are."""

    margin: float
    source: str


def derive_margins(rows: Iterable[RowScore], targets: Mapping[str, Framework]) -> dict[str, TargetMargin]:
    """The margin of each of ``targets`` that has peaks, or relatives with peaks, among ``rows``."""
    exceeding: dict[str, list[float]] = {}
    for row in rows:
        if row.peak_error is not None and row.status in RAN and row.framework is not None:
            exceeding.setdefault(_root(targets[row.framework]), []).append(1.0 / (1.0 + row.peak_error) - 1.0)
    found = {name: _margin(target, exceeding) for name, target in targets.items()}
    return {name: margin for name, margin in found.items() if margin is not None}


def _root(target: Framework) -> str:
    return target.version_of or target.name


def _margin(target: Framework, exceeding: Mapping[str, list[float]]) -> TargetMargin | None:
    root = _root(target)
    sources = [root]
    if len(exceeding.get(root, ())) < MIN_PEAKS:
        sources += [other for family in RELATIVES if root in family for other in family if other != root]
    shares = {name: _share(exceeding[name]) for name in sources if exceeding.get(name)}
    if not shares:
        return None
    widest = max(shares, key=lambda name: shares[name])
    source = f"{QUANTILE:.0%} of {len(exceeding[widest]):,} published peaks of {widest} stay within it"
    return TargetMargin(margin=shares[widest], source=source)


def _share(exceeding: list[float]) -> float:
    """Rounded up to a thousandth, so that the stored figure is not below what was found."""
    quantile = float(np.quantile(exceeding, QUANTILE, method="inverted_cdf"))
    return max(float(np.ceil(quantile * 1000.0 - 1e-9)) / 1000.0, 0.0)


def write_margins(margins: Mapping[str, TargetMargin], path: Path) -> None:
    """Write them where ``targets`` reads them."""
    document = {name: {"margin": each.margin, "source": each.source} for name, each in sorted(margins.items())}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
