"""A table of published measurements, read: one ``Row`` a line, each figure asked for by column and checked then."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshwright import InputError

# without these no row can be predicted; every other column may be absent, which reads as blank
REQUIRED = (
    "id", "family", "gpu_type", "num_gpus", "framework", "model", "arch_family", "layers", "hidden", "heads",
    "seq_len", "precision", "tp", "pp", "dp", "global_batch",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``line`` is its number in the file, for messages."""

    columns: Mapping[str, str]
    line: int

    def text(self, name: str) -> str:
        """The column as it stands, without blanks around it; empty where it is blank or absent."""
        return (self.columns.get(name) or "").strip()

    def number(self, name: str) -> float | None:
        """The column as a number, ``None`` where blank. Raises ``Malformed`` for anything else."""
        text = self.text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise Malformed(f"line {self.line} ({self.text('id')}): {name} must be a number, found {text!r}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """The column as a whole number of at least 1, ``default`` where blank.

        Raises ``Skip`` where it is blank without a default, ``Malformed`` for anything else.
        """
        value = self.number(name)
        if value is None:
            if default is None:
                raise Skip(f"{name} is not published")
            return default
        if value != int(value) or value < 1:
            raise Malformed(f"line {self.line} ({self.text('id')}): {name} must be 1, 2, ..., found {value:g}")
        return int(value)


class Skip(InputError):
    """A row that cannot be predicted; the message is the reason."""


class Malformed(InputError):
    """A column that does not hold what it is for: the table is wrong, not only this row out of reach."""


def read_rows(path: str | Path) -> tuple[Row, ...]:
    """Every line of a CSV file with a header, in order.

    Raises ``InputError`` for a file that cannot be read, is empty, lacks a column of ``REQUIRED``, has a line of
    another length than the header, or the same ``id`` twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                raise InputError(f"{path}, line {reader.line_num}: {len(fields)} fields, the header has {len(header)}")
            rows.append(Row(dict(zip(header, fields, strict=True)), reader.line_num))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise InputError(f"{path} has a header and no rows")
    _check_ids(path, rows)
    return tuple(rows)


def _check_header(path: Path, header: list[str]) -> None:
    if not any(header):
        raise InputError(f"{path} is empty: expected a CSV file with a header of {', '.join(REQUIRED)}, ...")
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise InputError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has the column{'s' * (len(twice) > 1)} {', '.join(twice)} twice")


def _check_ids(path: Path, rows: list[Row]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        name = row.text("id")
        if not name:
            raise InputError(f"{path}, line {row.line}: id is blank")
        if name in seen:
            raise InputError(f"{path}, line {row.line}: id {name} stands on line {seen[name]} already")
        seen[name] = row.line
