"""Memory of a plan on the screen: what the fullest stage holds at its peak, what is kept free, and what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshwright.cost_models.estimate import KINDS
from meshwright.cost_models.margin import ASKED_FOR
from meshwright.planner.summary import needed_of
from meshwright.planner.tight import largest_kind, what_helps
from meshwright.profiler.units import format_bytes
from meshwright.terminal.tables import bar, plain_table

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.cost_models.estimate import MemoryBreakdown
    from meshwright.planner.plan import Plan
    from meshwright.planner.summary import Summary

KIND_WORDS = {
    "params": "parameters",
    "grads": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "gathered": "gathered weights",
    "working": "working",
    "communication": "communication",
}
MOMENT_WORDS = {
    "backward": "in backward",
    "update": "in the optimizer's step",
    "build": "while the model is built, before it is sharded",
    "gather": "while weights are gathered",
    "loss": "around the loss",
    "weights": "while gradients of weights are worked out",
    "reduction": "while gradients are reduced",
}


def show_memory(plan: Plan, memory: MemoryBreakdown, console: Console) -> None:
    """Print kinds, fragmentation, margin, what others hold and what is left, which together are the device."""
    capacity = memory.capacity_bytes
    when = MOMENT_WORDS.get(memory.moment.value, memory.moment.value)
    title = f"Memory of stage {memory.stage} at its peak, {when}"
    table = plain_table(title, ("", ""), (">", ""), (">", ""), ("", "magenta"))
    for words, num_bytes in _rows(plan, memory):
        if num_bytes > 0:
            table.add_row(words, format_bytes(num_bytes), f"{num_bytes / capacity:.1%}", bar(num_bytes / capacity))
    console.print(table)
    console.print(f"  of {format_bytes(capacity)}{_margin(plan)}", markup=False, highlight=False)
    kind = largest_kind(plan)
    if kind is not None:
        changes = what_helps(plan, kind)
        advice = f"; less of it with {_listed(changes)}" if changes else ""
        console.print(f"  tight: most of it is {KIND_WORDS[kind]}{advice}", markup=False)


def fit_words(summary: Summary, plan: Plan) -> str:
    """Whether a plan fits and is recommended, and by how much."""
    if not summary.fits:
        return f"DOES NOT FIT, {format_bytes(summary.peak_bytes - summary.usable_bytes)} too much"
    if plan.memory_margin is None:
        return "fits; no margin was asked for"
    share = f"with fragmentation and a margin of {plan.memory_margin.share:.1%} it needs"
    needed = f"{share} {format_bytes(summary.needed_bytes)}"
    if summary.recommended:
        return f"recommended: {needed}"
    short = format_bytes(summary.needed_bytes - summary.usable_bytes)
    return f"NOT RECOMMENDED, though it fits: {needed}, {short} too much"


def _rows(plan: Plan, memory: MemoryBreakdown) -> list[tuple[str, int]]:
    needed = needed_of(memory, plan.memory_margin)
    on_top = memory.fragmentation_bytes
    rows = [(KIND_WORDS[kind], int(getattr(memory, f"{kind}_bytes"))) for kind in KINDS]
    rows.append(("fragmentation", on_top))
    rows.append(("margin", max(needed - memory.peak_bytes - on_top, 0)))
    rows.append(("context, others", memory.reserved_bytes))
    held = sum(num_bytes for _, num_bytes in rows)
    rows.append(("free", memory.capacity_bytes - held))
    return rows


def _margin(plan: Plan) -> str:
    margin = plan.memory_margin
    if margin is None:
        return "; no margin kept"
    source = f", as {ASKED_FOR}" if margin.source == ASKED_FOR else f": {margin.source}" if margin.source else ""
    return f"; margin of {margin.share:.1%}{source}"


def _listed(items: tuple[str, ...]) -> str:
    *first, last = items
    return f"{', '.join(first)} or {last}" if first else last
