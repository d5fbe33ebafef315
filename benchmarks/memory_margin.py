"""Margins of memory from the peaks of published runs, as ``validate`` scores them: python benchmarks/memory_margin.py.

Reads the table of published runs (``MESHWRIGHT_VALIDATION``, a folder with ``dev.csv``; default
``../shared/validation``, or a path as argument) and writes ``cost_models/memory_margins.json``; to be run again
whenever the memory model has changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from meshwright import InputError
from meshwright.cost_models.margin_fit import derive_margins, write_margins
from meshwright.cost_models.scorecard import validate
from meshwright.cost_models.targets import FRAMEWORKS, MARGINS
from meshwright.terminal.cluster_view import progress_bar

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str]) -> None:
    with progress_bar("memory margins") as on_progress:
        card = validate(Path(arguments[0]) if arguments else default_table(), on_progress=on_progress)
    margins = derive_margins(card.rows, FRAMEWORKS)
    for name, found in margins.items():
        print(f"{name:24} {FRAMEWORKS[name].memory.margin:6.1%} > {found.margin:6.1%}  {found.source}")
    write_margins(margins, MARGINS)
    print(f"wrote {MARGINS.name}")


def default_table() -> Path:
    folder = Path(os.environ.get("MESHWRIGHT_VALIDATION", ROOT.parent / "shared" / "validation"))
    if not (folder / "dev.csv").is_file():
        raise InputError(f"no dev.csv in {folder}: name the table, or set MESHWRIGHT_VALIDATION to its folder")
    return folder / "dev.csv"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
