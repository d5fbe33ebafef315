"""A plan on the screen: what to run, how fast, does it fit; then what came next, where time goes, why not others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshwright.planner.reasons import SENTENCES
from meshwright.planner.summary import needed_of, summarize
from meshwright.profiler.units import format_bytes, format_count, format_seconds
from meshwright.terminal.memory_view import fit_words, show_memory
from meshwright.terminal.tables import bar, plain_table

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.cost_models.estimate import CostBreakdown, Estimate
    from meshwright.planner.plan import Plan, SearchReport
    from meshwright.profiler.cluster import ClusterProfile

TIME_WORDS = {
    "compute_s": "compute",
    "recompute_s": "recompute",
    "tp_s": "tensor parallel",
    "cp_s": "context parallel",
    "ep_s": "expert parallel",
    "pp_s": "pipeline transfers",
    "dp_s": "data parallel, ZeRO",
    "bubble_s": "pipeline bubble",
    "optimizer_s": "optimizer",
    "overhead_s": "host overhead",
}


def show_plan(plan: Plan, cluster: ClusterProfile, console: Console) -> None:
    """Print everything about a plan; the first ten lines answer what to run, how fast it is, and whether it fits."""
    _headline(plan, cluster, console)
    if plan.search is not None and plan.cost is not None:
        _runners_up(plan.search, plan.cost.step_s, console)
    if plan.cost is not None and plan.memory is not None:
        _time(plan.cost, console)
        show_memory(plan, plan.memory, console)
    if plan.search is not None:
        _rejected(plan.search, console)
    for assumption in plan.assumptions:
        console.print(f"  assumed: {assumption}", markup=False)


def pick_line(plan: Plan) -> str:
    """The pick in one line, for ``--quiet``."""
    step = f": {format_seconds(plan.cost.step_s)} a step" if plan.cost else ""
    return f"{plan.config.describe()}{step}{_unless_recommended(plan)}"


def _unless_recommended(plan: Plan) -> str:
    memory = plan.memory
    if memory is None:
        return ""
    usable = memory.capacity_bytes - memory.reserved_bytes
    if memory.peak_bytes > usable:
        return ", does not fit"
    return "" if needed_of(memory, plan.memory_margin) <= usable else ", fits but is not recommended"


def shortage(plan: Plan, cluster: ClusterProfile) -> str:
    """One sentence on a plan that does not fit: by how much, on which stage."""
    summary = summarize(plan, cluster)
    return (
        f"{plan.config.describe()} does not fit: stage {summary.stage} needs {format_bytes(summary.peak_bytes)} of "
        f"{format_bytes(summary.usable_bytes)}, {format_bytes(-summary.headroom_bytes)} too much"
    )


def _headline(plan: Plan, cluster: ClusterProfile, console: Console) -> None:
    summary, workload, world = summarize(plan, cluster), plan.workload, plan.config.world_size
    sequences = f"{workload.global_batch_size} sequences of {workload.seq_len} tokens"
    machines = f"{world} x {cluster.device.kind} ({plan.cluster_name})"
    console.print(f"{plan.model.name} on {machines}: {sequences}, for {plan.framework}", markup=False)
    free = summary.headroom_bytes
    used = f"{summary.peak_bytes / summary.usable_bytes:.0%}"
    rows = [
        ("run", plan.config.describe()),
        *_layout(plan),
        ("step", format_seconds(summary.step_s)),
        (
            "tokens",
            f"{format_count(summary.tokens_per_s)}/s, {format_count(summary.tokens_per_s_per_device)}/s a device",
        ),
        ("MFU", "unknown: no peak of this dtype" if summary.mfu is None else f"{summary.mfu:.1%}"),
        (
            "memory",
            f"{format_bytes(summary.peak_bytes)} of {format_bytes(summary.usable_bytes)} ({used}) "
            f"on stage {summary.stage}" + (f", {format_bytes(free)} free" if free >= 0 else ""),
        ),
        ("fit", fit_words(summary, plan)),
        ("bubble", f"{summary.bubble_share:.1%} of the step"),
    ]
    if plan.search is not None:
        rows.append(("search", _searched(plan.search, margin=plan.memory_margin is not None)))
    grid = plain_table(None, ("", "cyan"), ("", "bold"))
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def _searched(report: SearchReport, *, margin: bool) -> str:
    """What became of the legal configs, and how long that took."""
    seconds = format_seconds(report.seconds)
    taken = f"{report.num_feasible:,} {'recommended' if margin else 'fit'}"
    if report.num_too_slow + report.num_too_large == 0:
        return f"{report.num_scored:,} legal configs, all scored, in {seconds}: {taken}"
    return (
        f"{report.num_legal:,} legal configs in {seconds}: {report.num_scored:,} scored; ruled out by bounds: "
        f"{report.num_too_slow:,} too slow, {report.num_too_large:,} too large"
    )


def _layout(plan: Plan) -> list[tuple[str, str]]:
    """How attention and experts lie over the same ranks, where these differ."""
    config = plan.config
    if config.ep * config.etp == 1:
        return []
    sizes = f"tp {config.tp} x cp {config.cp} x dp {config.dp}"
    experts = f"etp {config.etp} x ep {config.ep} x edp {config.edp}"
    each = f" on each of {config.pp} stages" if config.pp > 1 else ""
    return [("mesh", f"attention {sizes} beside experts {experts}{each}")]


def _runners_up(report: SearchReport, pick_s: float, console: Console) -> None:
    if not report.runners_up:
        return
    table = plain_table("What came next", ("", "dim"), ("config", ""), (">step", ""), (">slower", ""), (">memory", ""))
    for place, estimate in enumerate(report.runners_up, start=2):
        table.add_row(str(place), *_estimate_row(estimate, pick_s))
    console.print(table)


def _estimate_row(estimate: Estimate, pick_s: float) -> tuple[str, ...]:
    step_s = estimate.cost.step_s
    slower = f"{step_s / pick_s - 1:+.1%}"
    return estimate.config.describe(), format_seconds(step_s), slower, format_bytes(estimate.memory.peak_bytes)


def _time(cost: CostBreakdown, console: Console) -> None:
    table = plain_table("Where the step goes", ("", ""), (">", ""), (">", ""), ("", "green"))
    for name, words in TIME_WORDS.items():
        seconds = getattr(cost, name)
        if seconds > 0:
            table.add_row(words, format_seconds(seconds), f"{seconds / cost.step_s:.1%}", bar(seconds / cost.step_s))
    console.print(table)
    if cost.hidden_s > 0:
        console.print(f"  beside it, hidden behind compute: {format_seconds(cost.hidden_s)} of communication")


def _rejected(report: SearchReport, console: Console) -> None:
    if not report.rejected:
        return
    title = (
        "Not taken"
        if report.num_too_slow + report.num_too_large == 0
        else "Not taken: not legal, or scored and too large"
    )
    table = plain_table(title, (">configs", ""), ("because", ""), ("reason", "dim"))
    for rejected in report.rejected:
        table.add_row(f"{rejected.count:,}", SENTENCES[rejected.reason], rejected.reason.value)
    console.print(table)
