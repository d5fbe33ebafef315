"""The one console: colours only at a terminal, full width when piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120


def stdout_console() -> Console:
    """A console on standard output; a pipe gets no colours and lines of ``PIPED_WIDTH`` columns."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


@contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """Gives a function that says at a terminal, beside a sign that moves, what is being worked on."""
    if not sys.stderr.isatty():
        yield lambda words: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update
