"""The one shape of every record: frozen, keyword-only, slotted, and strict when read from JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

from meshwright import InputError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only, slotted dataclass whose JSON form admits no unknown field, NaN or infinity.

    Records hold tuples of small records rather than dicts, SI units inside, and the unit in the field's name
    (``latency_s``, ``bytes_per_s``, ``params_bytes``).
    """
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


def check_numbers(value: Any, *, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
    """Raise ``InputError`` naming a field that must be above zero, or not below it; fields that are ``None`` pass."""
    for name in (*positive, *not_negative):
        number = getattr(value, name)
        if number is not None and (number < 0 or (number == 0 and name in positive)):
            raise InputError(f"{name} must be {'above' if name in positive else 'at least'} 0, found {number}")
