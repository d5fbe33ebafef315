"""Fields of the config that the user fixes: read from words, checked, and coded as ``ConfigBatch`` codes them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from meshwright import InputError
from meshwright.cost_models.strategy import FIELDS, RECOMPUTES, SCHEDULES, ParallelConfig, Recompute, Schedule

Constraints = Mapping[str, Any]  # field of ParallelConfig -> the value it must have


def parse_constraints(words: Iterable[str]) -> dict[str, Any]:
    """``["tp=8", "schedule=1f1b", "sequence_parallel=on"]`` as constraints.

    Raises ``InputError`` naming the field's possible values, or the nearest field for one that does not exist.
    """
    constraints: dict[str, Any] = {}
    for word in words:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise InputError(f"--fix {word}: expected FIELD=VALUE, such as tp=8")
        field = name.replace("-", "_")
        if field not in FIELDS:
            raise InputError(_unknown_field(name))
        parsed = parse_value(field, value)
        if field in constraints and constraints[field] != parsed:
            raise InputError(f"{field} is fixed twice, to {constraints[field]} and to {parsed}")
        constraints[field] = parsed
    return constraints


def _unknown_field(name: str) -> str:
    near = difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.4)
    return f"a config has no field {name!r}: {'did you mean' if near else 'fields are'} {', '.join(near or FIELDS)}?"


def parse_value(field: str, value: str) -> Any:
    """One field's value from a word of the command line. Raises ``InputError`` naming the possible ones."""
    default = getattr(ParallelConfig(), field)
    if isinstance(default, bool):
        words = {
            "on": True,
            "true": True,
            "yes": True,
            "1": True,
            "off": False,
            "false": False,
            "no": False,
            "0": False,
        }
        if value.lower() not in words:
            raise InputError(f"{field} is on or off, found {value!r}")
        return words[value.lower()]
    if isinstance(default, (Schedule, Recompute)):
        try:
            return type(default)(value)
        except ValueError:
            known = ", ".join(type(default))
            raise InputError(f"unknown {field} {value!r}: expected one of {known}") from None
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise InputError(f"{field} must be a whole number of at least {min(default, 1)}, found {value!r}")
    return int(value)


def as_columns(constraints: Constraints) -> dict[str, int]:
    """Constraints as ``ConfigBatch`` codes them. Raises ``InputError`` for a field or a word that does not exist."""
    codes: dict[str, int] = {}
    for name, value in constraints.items():
        if name not in FIELDS:
            raise InputError(_unknown_field(name))
        words: tuple[Any, ...] = {"schedule": SCHEDULES, "recompute": RECOMPUTES}.get(name, ())
        if words and value not in words:
            raise InputError(f"unknown {name} {value!r}: expected one of {', '.join(words)}")
        codes[name] = words.index(value) if words else int(value)
    return codes


def check_possible(fixed: Mapping[str, int], every: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for a fixed value that no candidate has; ``every`` holds the candidates' values by field."""
    words: dict[str, tuple[Any, ...]] = {"schedule": SCHEDULES, "recompute": RECOMPUTES}
    for name, value in fixed.items():
        values = sorted({int(found) for found in every[name]})
        if value not in values:
            shown = [str(words[name][found]) if name in words else str(found) for found in values[:12]]
            more = ", ..." if len(values) > 12 else ""
            wanted = words[name][value] if name in words else value
            raise InputError(f"{name}={wanted} is not possible here: it can be {', '.join(shown)}{more}")
