"""Units, told apart once: GB is 1e9 bytes, GiB is 2**30; everything inside the house is bytes, seconds, FLOP/s."""

from __future__ import annotations

import re

from meshwright import InputError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

_BYTES = {"b": 1, "kb": KB, "mb": MB, "gb": GB, "tb": TB, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-zµ/]*)\s*\Z")


def _split(text: str, kind: str, units: str) -> tuple[float, str]:
    match = _QUANTITY.match(text)
    if not match:
        raise InputError(f"cannot read {text!r} as {kind}: expected a number and one of {units}")
    return float(match[1]), match[2]


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
    """Bytes a second of ``"200Mbit/s"`` (2.5e7), ``"25 GB/s"`` or ``"1e9"``. Raises ``InputError``."""
    number, unit = _split(text, "a rate", "bit/s kbit/s Mbit/s Gbit/s B/s KB/s MB/s GB/s")
    if not unit:
        return number
    base = unit.lower().removesuffix("/s").removesuffix("ps")
    if base in _BITS:
        return number * _BITS[base] / 8
    if base in _BYTES and unit.lower() != base:
        return number * _BYTES[base]
    raise InputError(f"unknown unit {unit!r} in {text!r}: expected bit/s kbit/s Mbit/s Gbit/s B/s KB/s MB/s or GB/s")


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
    """``"312 TFLOP/s"``."""
    units = ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1, "FLOP/s"))
    return _scaled(flops_per_s, units)


def format_count(count: float) -> str:
    """``"8.03 B"`` for parameters and tokens."""
    return _scaled(count, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (1, ""))).strip()


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, unit = next(((scale, unit) for scale, unit in units if abs(value) >= scale), units[-1])
    number = value / scale
    return f"{number:.0f} {unit}" if abs(number) >= 100 or value == 0 else f"{number:.3g} {unit}"
