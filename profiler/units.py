"""Units, told apart once: GB is 1e9 bytes, GiB is 2**30; everything inside the house is bytes, seconds, FLOP/s."""

from __future__ import annotations

import math
import re

from meshwright import InputError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

_BYTES = {"b": 1, "kb": KB, "mb": MB, "gb": GB, "tb": TB, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_PREFIXES = {"": 1, "k": KB, "M": MB, "G": GB, "T": TB, "Ki": KIB, "Mi": MIB, "Gi": GIB, "Ti": TIB}
_RATE = re.compile(r"(?P<prefix>|[kKmMgGtT]i?)(?P<thing>bits?|b|B)(?:/s|ps)\Z")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-zµ/]*)\s*\Z")


def _split(text: str, kind: str, units: str) -> tuple[float, str]:
    match = _QUANTITY.match(text)
    if not match:
        raise InputError(f"cannot read {text!r} as {kind}: expected a number and one of {units}")
    number = float(match[1])
    if not math.isfinite(number):
        raise InputError(f"{text!r} is too large for {kind}")
    return number, match[2]


def parse_bytes(text: str) -> int:
    """Bytes of ``"80GB"`` (8e10), ``"64 GiB"`` (2**36) or ``"1024"``. Raises ``InputError``."""
    number, unit = _split(text, "a size", "B KB MB GB TB KiB MiB GiB TiB")
    if unit and unit.lower() not in _BYTES:
        raise InputError(f"unknown unit {unit!r} in {text!r}: expected one of B KB MB GB TB KiB MiB GiB TiB")
    return round(number * (_BYTES[unit.lower()] if unit else 1))


def parse_seconds(text: str) -> float:
    """Seconds of ``"120s"``, ``"2.5 ms"``, ``"2min"`` or ``"30"``. Raises ``InputError``."""
    number, unit = _split(text, "a time", "ns us ms s min h")
    if unit and unit not in _SECONDS:
        raise InputError(f"unknown unit {unit!r} in {text!r}: expected one of ns us ms s min h")
    return number * (_SECONDS[unit] if unit else 1.0)


def parse_bytes_per_s(text: str) -> float:
    """Bytes a second of ``"200Mbit/s"`` (2.5e7), ``"25 GB/s"`` or ``"1e9"``. Raises ``InputError``.

    A small b is bits, a large B bytes, as the field writes them: ``"400Gbps"`` is 5e10.
    """
    number, unit = _split(text, "a rate", "bit/s kbit/s Mbit/s Gbit/s B/s KB/s MB/s GB/s")
    if not unit:
        return number
    match = _RATE.match(unit)
    if not match:
        expected = "bit/s kbit/s Mbit/s Gbit/s B/s KB/s MB/s or GB/s"
        raise InputError(f"unknown unit {unit!r} in {text!r}: expected one of {expected}")
    letter, binary = match["prefix"][:1], match["prefix"][1:]
    scale = _PREFIXES[(letter.upper() if letter not in ("k", "K") or binary else "k") + binary]
    return number * scale / (1 if match["thing"] == "B" else 8)


def format_bytes(num_bytes: float) -> str:
    """Binary units, as memory is sold and reported: ``"63.4 GiB"``."""
    return _scaled(num_bytes, ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B")))


def format_seconds(seconds: float) -> str:
    """``"12.4 s"``, ``"3.10 ms"``, ``"45.0 us"``."""
    if seconds >= 600:
        return f"{seconds / 60:.1f} min"
    return _scaled(seconds, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")))


def format_bytes_per_s(bytes_per_s: float) -> str:
    """Decimal units, as links are sold: ``"25.0 GB/s"``."""
    return _scaled(bytes_per_s, ((TB, "TB/s"), (GB, "GB/s"), (MB, "MB/s"), (KB, "KB/s"), (1, "B/s")))


def format_flops_per_s(flops_per_s: float) -> str:
    """FLOP/s with the largest unit below it, three digits: ``"312 TFLOP/s"``."""
    units = ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1, "FLOP/s"))
    return _scaled(flops_per_s, units)


def format_count(count: float) -> str:
    """``"8.03 B"`` for parameters and tokens."""
    return _scaled(count, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (1, ""))).strip()


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    # the largest unit of which there is one at least, rounded: 999.9 KB are 1.00 MB, 10 GiB are not 9.97
    places = [(value / scale, float(f"{value / scale:.3g}"), scale, unit) for scale, unit in units]
    exact, number, scale, unit = next((place for place in places if abs(place[1]) >= 1), places[-1])
    whole = abs(number) >= 100 or value == 0 or (unit != "s" and scale == 1 and number.is_integer())
    return f"{exact:.0f} {unit}" if whole else f"{number:#.3g} {unit}"
