"""Tables without lines, and bars: how figures stand on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

BAR_WIDTH = 32


def plain_table(title: str | None, *columns: tuple[str, str]) -> Table:
    """A table of ``(header, style)`` columns without lines; a header that starts with ``>`` is right-aligned."""
    from rich.table import Table

    table = Table(
        title=title and f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=any(header.strip(">") for header, _ in columns),
        padding=(0, 2, 0, 0) if title is None else (0, 2),
        pad_edge=True,
    )
    for header, style in columns:
        options: dict[str, Any] = {"justify": "right"} if header.startswith(">") else {}
        table.add_column(header.removeprefix(">"), style=style or None, **options)
    return table


def bar(share: float) -> str:
    """A bar in eighths of a character; never longer than a whole one."""
    eighths = round(min(share, 1.0) * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
