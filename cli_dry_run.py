"""The command that proves a plan without its GPUs: parse, call one function, print. ``cli`` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import meshwright
from meshwright.cli_plan import AsJson, Quiet

DRY_RUN_EXAMPLE = "Example: meshwright dry-run plan.json --all-stages"


def dry_run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan for our own executors.")],
    rank: Annotated[
        int | None, typer.Option(min=0, help="The rank (default: one of the fullest stage).", show_default=False)
    ] = None,
    all_stages: Annotated[bool, typer.Option("--all-stages", help="One rank of every pipeline stage.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json to build the model from (default: a plain decoder).")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", "-c", help="The plan's cluster, for a plan without a prediction.")
    ] = None,
    kernels: Annotated[
        str, typer.Option(help="Whose kernels to count: cuda, or cpu (what real CPU ranks run).")
    ] = "cuda",
    all_microbatches: Annotated[
        bool, typer.Option("--all-micro-batches", help="Run the step whole, even where fewer reach the same peak.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Apply PLAN to one of its ranks without any GPU, and count every byte of real steps on fake tensors."""
    from meshwright.executors.dry_run_file import dry_run_file
    from meshwright.profiler.artifact import to_json
    from meshwright.terminal.cluster_view import progress_bar
    from meshwright.terminal.console import stdout_console
    from meshwright.terminal.dry_run_view import dry_run_line, dry_run_shortage, show_dry_run

    options: Any = {"kernels": kernels, "all_microbatches": all_microbatches}
    with progress_bar("dry run") as on_progress:
        loaded, runs = dry_run_file(
            plan, rank=rank, all_stages=all_stages, model=model, cluster=cluster, on_progress=on_progress, **options
        )
    if as_json:
        typer.echo("[" + ",\n".join(to_json(run) for run in runs) + "]")
    elif quiet:
        typer.echo(dry_run_line(loaded, runs))
    else:
        show_dry_run(loaded, runs, stdout_console())
    short = dry_run_shortage(loaded, runs)
    if short:
        raise meshwright.InfeasibleError(short)


__all__ = ["DRY_RUN_EXAMPLE", "dry_run"]
