"""Commands that predict: parse, call one function, print. ``cli`` registers them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import meshwright

PLAN_EXAMPLE = "Example: meshwright plan llama3-8b --cluster h100-sxm:8 --global-batch 512 --seq-len 8192 -o plan.json"
ESTIMATE_EXAMPLE = (
    "Example: meshwright estimate llama3-8b --cluster h100-sxm:8 --global-batch 512 --seq-len 8192 --tp 8 --pp 2"
)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A preset (llama3-8b), a Hugging Face config.json or its folder.")
]
ClusterName = Annotated[
    str, typer.Option("--cluster", "-c", help="A profile (cluster.json) or a preset: h100-sxm:8 is 8 nodes.")
]
GlobalBatch = Annotated[int, typer.Option(min=1, help="Sequences in one optimizer step.")]
SeqLen = Annotated[int, typer.Option(min=1, help="Tokens in one sequence.")]
Recipe = Annotated[str, typer.Option(help="Dtypes of weights, gradients and optimizer: bf16, bf16-pure, fp32, fp64.")]
OptimizerName = Annotated[str, typer.Option("--optimizer", help="adamw or sgd.")]
FrameworkName = Annotated[str, typer.Option("--framework", help="What runs the plan.")]
Gpus = Annotated[int | None, typer.Option(help="Use so many devices, whole nodes (default: all).", show_default=False)]
MemoryMarginShare = Annotated[
    float | None,
    typer.Option(
        "--memory-margin",
        help="Memory to keep free beyond the prediction, as a share of it; 0 takes whatever fits (default: by how much "
        "measured peaks exceeded predicted ones of this target).",
        show_default=False,
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan to this file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer in one line.")]


def plan(
    model: ModelName,
    cluster: ClusterName,
    global_batch: GlobalBatch,
    seq_len: SeqLen,
    output: Output = None,
    top: Annotated[int, typer.Option(min=1, help="Show so many of the best.")] = 10,
    fix: Annotated[list[str] | None, typer.Option(help="Fix a field of the config: tp=8. Repeat for more.")] = None,
    dtype_recipe: Recipe = "bf16",
    optimizer: OptimizerName = "adamw",
    framework: FrameworkName = "meshwright",
    gpus: Gpus = None,
    memory_margin: MemoryMarginShare = None,
    emit: Annotated[Path | None, typer.Option(help="Write the best --count plans into this folder.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many plans --emit writes.")] = 10,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search every legal way to split MODEL over the cluster, and pick the fastest that fits with a margin."""
    from meshwright.planner.constraints import parse_constraints
    from meshwright.planner.plan import save_candidates, save_plan
    from meshwright.planner.search import search
    from meshwright.terminal.console import working

    profile = meshwright.load_cluster(cluster)
    with working() as on_progress:
        found = search(
            meshwright.load_model(model),
            _workload(global_batch, seq_len, dtype_recipe, optimizer),
            profile,
            framework=framework,
            constraints=parse_constraints(fix or []),
            memory_margin=memory_margin,
            gpus=gpus,
            wanted=max(top, count if emit else 1),
            on_progress=on_progress,
        )
    best = found.plan(top)
    if output:
        save_plan(best, output)
    if emit:
        save_candidates(found.candidates(count), emit)
    _print_plan(best, profile, as_json=as_json, quiet=quiet, written=[path for path in (output, emit) if path])


def estimate(
    model: ModelName,
    cluster: ClusterName,
    global_batch: GlobalBatch,
    seq_len: SeqLen,
    tp: Annotated[int | None, typer.Option(help="Tensor parallel.", show_default=False)] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline parallel.", show_default=False)] = None,
    dp: Annotated[int | None, typer.Option(help="Data parallel (default: what is left).", show_default=False)] = None,
    cp: Annotated[int | None, typer.Option(help="Context parallel.", show_default=False)] = None,
    cp_ulysses: Annotated[int | None, typer.Option(help="The all-to-all part of cp.", show_default=False)] = None,
    ep: Annotated[int | None, typer.Option(help="Expert parallel.", show_default=False)] = None,
    etp: Annotated[int | None, typer.Option(help="Tensor parallel inside experts.", show_default=False)] = None,
    ep_chunks: Annotated[int, typer.Option(help="Parts in which tokens travel to experts.")] = 1,
    vpp: Annotated[int | None, typer.Option(help="Chunks on each pipeline rank.", show_default=False)] = None,
    micro_batch: Annotated[int, typer.Option(help="Sequences in a micro-batch.")] = 1,
    zero_stage: Annotated[int, typer.Option(help="ZeRO stage, 0 to 3.")] = 0,
    dp_shard: Annotated[int | None, typer.Option(help="Ranks ZeRO shards over (default: dp*cp).")] = None,
    sp: Annotated[bool, typer.Option("--sp/--no-sp", help="Sequence parallel beside tp.")] = False,
    schedule: Annotated[str, typer.Option(help="gpipe, 1f1b, interleaved, zb-h1, zbv, dualpipev.")] = "1f1b",
    recompute: Annotated[str, typer.Option(help="none, selective or full.")] = "none",
    output: Output = None,
    dtype_recipe: Recipe = "bf16",
    optimizer: OptimizerName = "adamw",
    framework: FrameworkName = "meshwright",
    gpus: Gpus = None,
    memory_margin: MemoryMarginShare = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Price one given way to split MODEL: step time, memory, and where they go."""
    from meshwright.cost_models.targets import framework_named
    from meshwright.planner.constraints import parse_value
    from meshwright.planner.given import complete_config
    from meshwright.planner.plan import save_plan
    from meshwright.planner.search import plan_for, whole_nodes
    from meshwright.terminal.plan_view import shortage

    profile, target = meshwright.load_cluster(cluster), framework_named(framework)
    given: dict[str, Any] = {
        "tp": tp, "pp": pp, "dp": dp, "cp": cp, "cp_ulysses": cp_ulysses, "ep": ep, "etp": etp,
        "ep_chunks": ep_chunks, "vpp": vpp, "micro_batch_size": micro_batch, "zero_stage": zero_stage,
        "dp_shard": dp_shard, "sequence_parallel": sp, "schedule": parse_value("schedule", schedule),
        "recompute": parse_value("recompute", recompute),
    }  # fmt: skip
    config = complete_config(given, whole_nodes(profile, gpus), target)
    workload = _workload(global_batch, seq_len, dtype_recipe, optimizer)
    priced = plan_for(
        config, meshwright.load_model(model), workload, profile, framework=target, memory_margin=memory_margin
    )
    if output:
        save_plan(priced, output)
    _print_plan(priced, profile, as_json=as_json, quiet=quiet, written=[output] if output else [])
    if priced.memory is not None and priced.memory.headroom_bytes < 0:
        raise meshwright.InfeasibleError(shortage(priced, profile))


def _workload(global_batch: int, seq_len: int, dtype_recipe: str, optimizer: str) -> Any:
    from meshwright.cost_models.workload import optimizer_named, recipe_named

    return meshwright.Workload(
        global_batch_size=global_batch,
        seq_len=seq_len,
        recipe=recipe_named(dtype_recipe),
        optimizer=optimizer_named(optimizer),
    )


def _print_plan(plan: Any, cluster: Any, *, as_json: bool, quiet: bool, written: Sequence[Path]) -> None:
    from meshwright.terminal.plan_view import pick_line, show_plan

    if as_json:
        from meshwright.profiler.artifact import to_json

        typer.echo(to_json(plan))
    elif quiet:
        typer.echo(pick_line(plan))
    else:
        from meshwright.terminal.console import stdout_console

        show_plan(plan, cluster, stdout_console())
        for path in written:
            typer.echo(f"written: {path}")


__all__ = ["ESTIMATE_EXAMPLE", "PLAN_EXAMPLE", "AsJson", "ModelName", "Quiet", "estimate", "plan"]
