"""The whole way on this machine: measure it, plan a small Llama, train it as planned, compare with other plans.

    make demo

Twice: on this machine as it is, and on a rehearsed cluster of two hosts with four virtual devices each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo warns that emulated hosts have no name in DNS

import torch
from llama import Llama, LlamaConfig
from rich.table import Table
from torch import Tensor, nn

from meshwright import ClusterProfile, ModelSpec, Plan, Workload, parallelize
from meshwright.cost_models.workload import recipe_named
from meshwright.executors.run import measure_plans
from meshwright.planner.search import Search, search
from meshwright.profiler.emulate import emulate_ranks
from meshwright.profiler.launch import Rank, run_ranks
from meshwright.profiler.namespaces import emulation_available
from meshwright.profiler.profile import core_shares, profile_cluster
from meshwright.profiler.steps import StepMeasurement
from meshwright.profiler.topology_file import load_topology
from meshwright.profiler.trace import trace_model
from meshwright.profiler.units import format_seconds
from meshwright.terminal.cluster_view import progress_bar
from meshwright.terminal.console import stdout_console
from meshwright.terminal.plan_view import show_plan

HERE = Path(__file__).resolve().parent

PROFILE_S = 15.0
TRAIN_STEPS = 60
MIN_PLANS = 9
STEPS = 5  # measured of each plan, on this machine
REHEARSED_STEPS = 3

console = stdout_console()


# -- here -----------------------------------------------------------------------------------------------------------


def on_this_machine() -> None:
    console.rule("This machine, as it is")
    config = LlamaConfig(hidden=256, num_layers=4, num_heads=8, num_kv_heads=4, ffn_size=688)
    with progress_bar("measure this machine") as on_progress:
        cluster = profile_cluster(name="this-machine", budget_s=PROFILE_S, on_progress=on_progress)
    assert cluster is not None  # no launcher started us
    found = find_plan(cluster, config, seq_len=128, global_batch_size=16)
    best = found.plan()
    show_plan(best, cluster, console)
    train(best, config)
    plans = variety(found)
    measured = measure_plans(plans, build_model=builder(config), steps=STEPS, warmup=2, on_step=progress(plans, STEPS))
    show_comparison("Predicted and measured on this machine", plans, measured)


def find_plan(cluster: ClusterProfile, config: LlamaConfig, *, seq_len: int, global_batch_size: int) -> Search:
    with torch.device("meta"):
        spec = trace_model(Llama(config), seq_len=seq_len, name="small-llama")
    workload = Workload(seq_len=seq_len, global_batch_size=global_batch_size, recipe=recipe_named("fp32"))
    return search(spec, workload, cluster)


def builder(config: LlamaConfig) -> Callable[[ModelSpec], nn.Module]:
    return lambda spec: Llama(config)


def variety(found: Search) -> list[Plan]:
    """The pick, and for each way to factor the ranks into tp, pp and dp its best plan and evenly spaced slower ones.

    Chosen by prediction alone, as many of each way as it takes for at least ``MIN_PLANS`` in all; the pick first.
    """
    ranked = found.candidates(len(found.ranking.order))
    ways: dict[tuple[int, int, int], list[Plan]] = {}
    for plan in ranked:
        ways.setdefault((plan.config.tp, plan.config.pp, plan.config.dp), []).append(plan)
    each = -(-MIN_PLANS // len(ways))
    chosen = {
        plan.digest: plan
        for plans in ways.values()
        for plan in (plans[round(index * (len(plans) - 1) / max(each - 1, 1))] for index in range(each))
    }
    return sorted(chosen.values(), key=lambda plan: plan.cost.step_s if plan.cost else 0.0)


# -- train ----------------------------------------------------------------------------------------------------------


def train(plan: Plan, config: LlamaConfig) -> None:
    """Some steps on real text, byte by byte, split as planned; the loss must fall."""
    ranks = plan.config.world_size
    on_cuda = torch.cuda.device_count() >= ranks
    console.print(f"\ntrain {TRAIN_STEPS} steps as planned, on {ranks} ranks, on the text of this project")
    losses = run_ranks(
        train_rank,
        ranks,
        plan,
        config,
        timeout_s=120,
        backend="nccl" if on_cuda else "gloo",
        cores=None if on_cuda else core_shares(ranks),
        before=torch.cuda.set_device if on_cuda else None,
    )[0]
    shown = ", ".join(f"{losses[step]:.2f}" for step in range(0, TRAIN_STEPS, TRAIN_STEPS // 6))
    console.print(f"loss {shown}, {losses[-1]:.2f}")
    if losses[-1] > 0.8 * losses[0]:
        raise SystemExit(f"the loss did not fall: {losses[0]:.2f} at first, {losses[-1]:.2f} at last")


def train_rank(rank: Rank, plan: Plan, config: LlamaConfig) -> list[float]:
    torch.manual_seed(0)  # the same weights on every rank
    parallel = parallelize(Llama(config), plan)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-3)
    tokens = project_text()
    draw = torch.Generator().manual_seed(parallel.data_rank)
    share = plan.workload.global_batch_size // parallel.data_size
    losses = []
    for _ in range(TRAIN_STEPS):
        loss = parallel.step(text_batch(tokens, share, plan.workload.seq_len, draw))
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def project_text() -> Tensor:
    files = [HERE.parent / "LICENSE", *sorted(HERE.parent.glob("*.md")), *sorted(HERE.parent.glob("docs/*.md"))]
    return torch.tensor(list(b"\n".join(file.read_bytes() for file in files)))


def text_batch(tokens: Tensor, rows: int, seq_len: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - seq_len - 1, (rows,), generator=draw)
    windows = torch.stack([tokens[start : start + seq_len + 1] for start in starts.tolist()])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# -- rehearsed ------------------------------------------------------------------------------------------------------


def on_two_rehearsed_hosts() -> None:
    console.rule("Two rehearsed hosts, four virtual devices each")
    missing = emulation_available()
    if missing:
        console.print(f"skipped: {missing}")
        return
    topology = load_topology(HERE / "demo_hosts.json")
    config = LlamaConfig(hidden=256, num_layers=8, num_heads=4, num_kv_heads=2, ffn_size=688)
    with progress_bar("measure the rehearsed cluster") as on_progress:
        cluster = emulate_ranks(
            topology, profile_rank, timeout_s=120, backend=None, on_report=lambda rank, report: on_progress(*report)
        )[0]
    found = find_plan(cluster, config, seq_len=256, global_batch_size=16)
    show_plan(found.plan(), cluster, console)
    plans = variety(found)
    seen = progress(plans, REHEARSED_STEPS)
    measured = emulate_ranks(
        topology,
        measure_rank,
        plans,
        config,
        timeout_s=240,
        backend=None,
        on_report=lambda rank, report: seen(report),
    )[0]
    show_comparison("Predicted and measured on the rehearsed cluster", plans, measured)


def profile_rank(rank: Rank) -> ClusterProfile | None:
    torch.set_num_threads(1)
    return profile_cluster(
        name="two-rehearsed-hosts", budget_s=PROFILE_S, on_progress=lambda share, text: rank.report((share, text))
    )


def measure_rank(rank: Rank, plans: Sequence[Plan], config: LlamaConfig) -> tuple[StepMeasurement, ...]:
    torch.set_num_threads(1)
    return measure_plans(plans, build_model=builder(config), steps=REHEARSED_STEPS, warmup=1, on_step=rank.report)


# -- compare --------------------------------------------------------------------------------------------------------


def progress(plans: Sequence[Plan], steps: int) -> Callable[[Sequence[StepMeasurement]], None]:
    def on_step(measured: Sequence[StepMeasurement]) -> None:
        done = min((len(each.losses) for each in measured), default=0)
        if console.is_terminal:
            console.print(f"measured {len(plans)} plans: round {done} of {steps}", end="\r")

    return on_step


def show_comparison(title: str, plans: Sequence[Plan], measured: Sequence[StepMeasurement]) -> None:
    order = sorted(range(len(plans)), key=lambda index: measured[index].step_s)
    place = {plan: rank + 1 for rank, plan in enumerate(order)}
    table = Table(title=f"\n{title}", title_justify="left", box=None)
    for name in ("plan", "predicted", "measured", "error", "measured order"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for index, (plan, real) in enumerate(zip(plans, measured, strict=True)):
        predicted = plan.cost.step_s if plan.cost else float("nan")
        table.add_row(
            plan.config.describe() + ("   <- the pick" if index == 0 else ""),
            format_seconds(predicted),
            format_seconds(real.step_s),
            f"{predicted / real.step_s - 1:+.0%}",
            str(place[index]),
            style="bold" if index == 0 else "",
        )
    console.print(table)
    best = measured[order[0]].step_s
    correlation = spearman([plan.cost.step_s for plan in plans if plan.cost], [real.step_s for real in measured])
    console.print(
        f"rank correlation (Spearman) {correlation:.2f} over {len(plans)} plans; the pick came {place[0]}. of "
        f"{len(plans)}, {measured[0].step_s / best - 1:.1%} behind the fastest\n"
    )


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    ranks = torch.tensor([[sorted(row).index(value) for value in row] for row in (first, second)], dtype=torch.float64)
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    started = time.monotonic()
    on_this_machine()
    on_two_rehearsed_hosts()
    console.print(f"done in {time.monotonic() - started:.0f} s")
