"""Commands about how true predictions are: parse, call one function, print. ``cli`` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CALIBRATE_EXAMPLE = "Example: meshwright calibrate cluster.json measured/*.json -o calibrated.json"
VALIDATE_EXAMPLE = "Example: meshwright validate runs.csv --per-cell --plot accuracy.svg"


def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE.csv", help="Published runs, one a line.")],
    family: Annotated[str | None, typer.Option(help="Only rows of this family.", show_default=False)] = None,
    per_cell: Annotated[bool, typer.Option("--per-cell", help="Also show every cell, plan by plan.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw predicted against measured to this .png or .svg.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Predict every run of a table of measurements, and score the predictions family by family."""
    from meshwright.cost_models.scorecard import validate as validated
    from meshwright.terminal.accuracy_plot import save_accuracy_plot
    from meshwright.terminal.cluster_view import progress_bar
    from meshwright.terminal.console import stdout_console
    from meshwright.terminal.scorecard_view import scorecard_json, show_scorecard

    with progress_bar("validate") as on_progress:
        card = validated(file, family=family, on_progress=on_progress)
    if plot:
        save_accuracy_plot(card, plot)
    if as_json:
        typer.echo(scorecard_json(card))
    else:
        show_scorecard(card, stdout_console(), per_cell=per_cell)
        if plot:
            typer.echo(f"wrote {plot}")


def calibrate(
    cluster: Annotated[str, typer.Argument(help="The profile (or preset) that the measured plans were made on.")],
    measurements: Annotated[list[Path], typer.Argument(metavar="MEASUREMENT...", help="Files of meshwright measure.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the calibrated cluster here.")] = None,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="Plan of a measurement that does not hold it; repeat for more.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Correct a cluster by measured steps: launches, efficiencies and overlap of these machines and this target."""
    from meshwright.planner.calibrate import calibrate as calibrated
    from meshwright.planner.calibrate import read_measured
    from meshwright.profiler import artifact
    from meshwright.profiler.cluster import load_cluster
    from meshwright.terminal.calibration_view import show_calibration
    from meshwright.terminal.console import stdout_console

    found = calibrated(load_cluster(cluster), read_measured(measurements, plans or ()))
    if output:
        artifact.save(found.cluster, output)
    if as_json:
        typer.echo(artifact.to_json(found))
    else:
        show_calibration(found, stdout_console())
        if output:
            typer.echo(f"wrote {output}")


__all__ = ["CALIBRATE_EXAMPLE", "VALIDATE_EXAMPLE", "calibrate", "validate"]
