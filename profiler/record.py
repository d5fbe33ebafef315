"""The one shape of every record: frozen, keyword-only, slotted, and strict when read from JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only, slotted dataclass whose JSON form admits no unknown field, NaN or infinity.

    Records hold tuples of small records rather than dicts, SI units inside, and the unit in the field's name
    (``latency_s``, ``bytes_per_s``, ``params_bytes``).
    """
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)
