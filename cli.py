"""The commands: parse, call one function, print. No arithmetic here, and no torch until a command needs it.

Exit codes: 0 done; 2 something you gave is wrong; 3 a well-formed request has no answer, or a real run failed.
An error is one sentence on standard error. ``--json`` prints one JSON document and nothing else on standard output;
``--quiet`` prints the answer in one line. Colours appear at a terminal only.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import meshwright
from meshwright.cli_accuracy import CALIBRATE_EXAMPLE, VALIDATE_EXAMPLE, calibrate, validate
from meshwright.cli_dry_run import DRY_RUN_EXAMPLE, dry_run
from meshwright.cli_plan import ESTIMATE_EXAMPLE, PLAN_EXAMPLE, AsJson, ModelName, Quiet, estimate, plan

app = typer.Typer(
    name="meshwright",
    help="Decide how a PyTorch model is split over a cluster: profile, plan, apply, measure.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"meshwright {meshwright.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command(epilog=PLAN_EXAMPLE)(plan)
app.command(epilog=ESTIMATE_EXAMPLE)(estimate)


@app.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Example: meshwright emulate --topology examples/two_hosts.json -- python train.py",
)
def emulate(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="What every rank runs.")],
    topology: Annotated[Path, typer.Option("--topology", "-t", help="Hosts, their devices and their links, as JSON.")],
    per_host: Annotated[
        bool | None,
        typer.Option(
            "--per-host/--per-rank", help="Start COMMAND once a host (default: for torchrun).", show_default=False
        ),
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="Stop after this long: 10min.", show_default=False)] = None,
) -> None:
    """Run COMMAND on an emulated cluster: hosts joined at stated rates, all on this machine (Linux, as root)."""
    from meshwright.profiler.emulate import run_emulated
    from meshwright.profiler.topology_file import load_topology
    from meshwright.profiler.units import parse_seconds

    run_emulated(
        load_topology(topology),
        command,
        per_host=per_host,
        timeout_s=parse_seconds(timeout) if timeout else None,
    )


@app.command(epilog="Example: meshwright profile -o cluster.json")
def profile(
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Write the profile to this file.")],
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on this machine (default: one for each GPU, else core).", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or virtual:h100/1000 (default: cuda if there is any).", show_default=False),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Measure kernels in this dtype (default: bfloat16, on a CPU float32). Repeat for more."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Measure for about this long: 25s, 2min.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the cluster (default: this host's name).")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure this machine, or under torchrun or Slurm the whole cluster: links, collectives, kernels, memory."""
    from meshwright.profiler.artifact import save
    from meshwright.profiler.profile import profile_cluster
    from meshwright.profiler.units import parse_seconds
    from meshwright.terminal.cluster_view import progress_bar, show_cluster
    from meshwright.terminal.console import stdout_console

    with progress_bar("profile") as on_progress:
        found = profile_cluster(
            num_ranks=nproc,
            device=device,
            dtypes=dtype or (),
            budget_s=parse_seconds(budget) if budget else None,
            name=name,
            keep_partial=output.with_suffix(".partial.json"),
            on_progress=on_progress,
        )
    if found is None:  # a rank other than 0 among a launcher's
        return
    save(found, output)
    if not quiet:
        show_cluster(found, stdout_console())
    typer.echo(f"wrote {output}")


cluster_app = typer.Typer(help="Show, compare and write clusters.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")


@cluster_app.command("show", epilog="Example: meshwright cluster show cluster.json --heatmap links.svg")
def cluster_show(
    source: Annotated[str, typer.Argument(metavar="CLUSTER", help="A profile (cluster.json) or a preset: h100-sxm:8.")],
    heatmap: Annotated[
        Path | None, typer.Option(help="Also draw the bandwidth of every pair to this .png or .svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a cluster's devices, links, operators and collectives."""
    from meshwright.terminal.cluster_view import show_cluster
    from meshwright.terminal.console import stdout_console

    found = meshwright.load_cluster(source)
    if as_json:
        from meshwright.profiler.artifact import to_json

        typer.echo(to_json(found))
    else:
        show_cluster(found, stdout_console())
    if heatmap:
        from meshwright.terminal.heatmap import save_heatmap

        save_heatmap(found, heatmap)


@cluster_app.command("preset", epilog="Example: meshwright cluster preset h100-sxm:8 -o mine.json")
def cluster_preset(
    source: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Which one; without it all are listed.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
) -> None:
    """List the presets, or write one to a file, where it can be corrected."""
    from meshwright.profiler.artifact import save
    from meshwright.profiler.cluster import load_preset
    from meshwright.profiler.cluster_presets import preset_names
    from meshwright.terminal.cluster_view import show_cluster, show_presets
    from meshwright.terminal.console import stdout_console

    if source is None and output is not None:
        raise meshwright.InputError(f"name the preset to write to {output}: one of {', '.join(preset_names())}")
    if source is None:
        show_presets([load_preset(f"{name}:2") for name in preset_names()], stdout_console())
    elif output is None:
        show_cluster(load_preset(source), stdout_console())
    else:
        save(load_preset(source), output)
        typer.echo(f"wrote {output}")


@cluster_app.command("diff", epilog="Example: meshwright cluster diff monday.json today.json")
def cluster_diff(
    before: Annotated[str, typer.Argument(help="A profile or a preset.")],
    after: Annotated[str, typer.Argument(help="A profile or a preset.")],
) -> None:
    """Say what changed between two clusters, in percent."""
    from meshwright.profiler.cluster_diff import diff_clusters
    from meshwright.terminal.cluster_view import show_diff
    from meshwright.terminal.console import stdout_console

    show_diff(diff_clusters(meshwright.load_cluster(before), meshwright.load_cluster(after)), stdout_console())


@app.command(epilog="Example: meshwright measure plan.json --steps 20 -o measurement.json")
def measure(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plans for one number of ranks.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the measurement; of several plans, into this folder.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before those.")] = 3,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json to build the model from (default: a plain decoder).")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", "-c", help="This machine's profile: refuse plans made for another.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or virtual:h100/1000.")] = "auto",
    timeout: Annotated[str, typer.Option(help="Stop after this long.")] = "10min",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run real steps of each PLAN, on ranks started here or by torchrun or Slurm, and compare with its prediction."""
    from meshwright.executors.measure import measure_files
    from meshwright.profiler.artifact import to_json
    from meshwright.profiler.units import parse_seconds
    from meshwright.terminal.cluster_view import progress_bar
    from meshwright.terminal.console import stdout_console
    from meshwright.terminal.steps_view import measurement_line, show_measurements

    with progress_bar("measure") as on_progress:
        found = measure_files(
            plans,
            model=model,
            cluster=cluster,
            steps=steps,
            warmup=warmup,
            device=device,
            timeout_s=parse_seconds(timeout),
            output=output,
            on_progress=on_progress,
        )
    if as_json and found:
        typer.echo("[" + ",\n".join(to_json(measurement) for measurement in found) + "]")
    elif quiet:
        for measurement in found:
            typer.echo(measurement_line(measurement))
    elif found:
        show_measurements(found, stdout_console())


app.command(name="dry-run", epilog=DRY_RUN_EXAMPLE)(dry_run)
app.command(epilog=VALIDATE_EXAMPLE)(validate)
app.command(epilog=CALIBRATE_EXAMPLE)(calibrate)


@app.command(epilog="Example: meshwright schema plan > plan.schema.json")
def schema(
    artifact: Annotated[str, typer.Argument(help="cluster, model, plan, step-measurement or topology.")],
) -> None:
    """Print the JSON Schema of an artifact."""
    from meshwright.planner.schemas import schema_of

    typer.echo(schema_of(artifact))


@app.command(epilog="Example: meshwright check cluster.json")
def check(
    file: Annotated[Path, typer.Argument(help="A cluster, model, plan, step measurement or topology.")],
) -> None:
    """Read FILE as any command would, and say what it holds or what is wrong with it."""
    from meshwright.planner.schemas import load_any

    kind, _ = load_any(file)
    typer.echo(f"{file}: a valid {kind}")


model_app = typer.Typer(help="Look at models: their layers, their parameters, the presets.", no_args_is_help=True)
app.add_typer(model_app, name="model")


@model_app.command("show", epilog="Example: meshwright model show llama3-8b")
def model_show(
    model: ModelName,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it as a model file.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show MODEL's layers, their sizes and their parameters."""
    from meshwright.profiler.model import save_model
    from meshwright.profiler.model_presets import find_preset
    from meshwright.terminal.model_view import model_line, show_model

    spec = meshwright.load_model(model)
    if output:
        save_model(spec, output)
    if as_json:
        from meshwright.profiler.artifact import to_json

        typer.echo(to_json(spec))
    elif quiet:
        typer.echo(model_line(spec))
    else:
        from meshwright.terminal.console import stdout_console

        show_model(spec, find_preset(model), stdout_console())


@model_app.command("presets", epilog="Example: meshwright model presets qwen3")
def model_presets(
    contains: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only names that contain TEXT.")] = "",
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the names alone.")] = False,
) -> None:
    """List the models known by name."""
    from meshwright.profiler.model_presets import presets_named
    from meshwright.terminal.model_view import preset_json, show_presets

    presets = presets_named(contains)
    if as_json:
        typer.echo(preset_json(presets))
    elif quiet:
        typer.echo("\n".join(preset.name for preset in presets))
    else:
        from meshwright.terminal.console import stdout_console

        show_presets([(preset, meshwright.load_model(preset.name)) for preset in presets], stdout_console())


# typer carries its own copy of click under a private name; what users get wrong in a command line is this class
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; an error of ours becomes one sentence on stderr and exit code 2 or 3."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without our characters shows others, it does not stop us
    try:
        code = app(args=args, prog_name="meshwright", standalone_mode=False)
    except _UsageError as error:
        sys.exit(_usage(error))
    except meshwright.InputError as error:
        typer.echo(f"meshwright: {error}", err=True)
        sys.exit(2)
    except meshwright.Error as error:
        typer.echo(f"meshwright: {error}", err=True)
        sys.exit(3)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        typer.echo("meshwright: measuring and running need torch: pip install torch (2.11 or newer)", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> int:
    """Say what is wrong with the command line, and where its help is."""
    message = error.format_message().strip().replace("\n", " ")
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2  # the help is on the screen already
    command = context.command_path if context is not None else "meshwright"
    end = "" if message.endswith((".", "?")) else "."
    typer.echo(f"meshwright: {message}{end} See: {command} --help", err=True)
    return 2


if __name__ == "__main__":
    main()
