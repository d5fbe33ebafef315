"""The one console: colours only at a terminal, full width when piped."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120


def stdout_console() -> Console:
    """A console on standard output; a pipe gets no colours and lines of ``PIPED_WIDTH`` columns."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
