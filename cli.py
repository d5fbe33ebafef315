"""The commands: parse, call one function, print. No arithmetic here, and no torch until a command needs it.

Exit codes: 0 done; 2 something you gave is wrong; 3 a well-formed request has no answer, or a real run failed.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import meshwright

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


def main() -> None:
    """Run the command line; an error of ours becomes one sentence on stderr and exit code 2 or 3."""
    try:
        app()
    except meshwright.InputError as error:
        typer.echo(f"meshwright: {error}", err=True)
        sys.exit(2)
    except meshwright.Error as error:
        typer.echo(f"meshwright: {error}", err=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
