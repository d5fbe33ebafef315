from __future__ import annotations

import pytest

from meshwright import InputError
from meshwright.profiler.units import (
    GIB,
    MIB,
    format_bytes,
    format_bytes_per_s,
    format_count,
    format_flops_per_s,
    format_seconds,
    parse_bytes,
    parse_bytes_per_s,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GB", 80 * 10**9), ("64 GiB", 2**36), ("1024", 1024), ("1.5 kib", 1536), ("2e3 MB", 2 * 10**9), (".5KB", 500)],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200Mbit/s", 25e6),
        ("400Gbps", 50e9),
        ("400 Gb/s", 50e9),
        ("25 GB/s", 25e9),
        ("25GBps", 25e9),
        ("1e9", 1e9),
        ("100 KiB/s", 102400.0),
        ("8kbit/s", 1000.0),
        ("8 bit/s", 1.0),
    ],
)
def test_parse_rate_tells_bits_from_bytes(text: str, expected: float) -> None:
    assert parse_bytes_per_s(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"), [("120s", 120.0), ("2.5 ms", 2.5e-3), ("2min", 120.0), ("30", 30.0), ("7µs", 7e-6)]
)
def test_parse_seconds(text: str, expected: float) -> None:
    assert parse_seconds(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("text", ["", "GB", "12 parsecs", "-1GB", "1,5GB", "1e999GB", "nan", "0x10", "1GB/s"])
def test_sizes_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "fast", "5 GB", "5 Gbit", "5 XB/s", "-5GB/s", "1e999 GB/s"])
def test_rates_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_bytes_per_s(text)


@pytest.mark.parametrize("text", ["", "soon", "5 days", "-1s", "1e999h"])
def test_times_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_seconds(text)


def test_formats_have_three_figures() -> None:
    assert format_bytes(63.4 * GIB) == "63.4 GiB"
    assert format_bytes(8 * MIB) == "8.00 MiB"
    assert format_bytes(10 * GIB) == "10.0 GiB"
    assert format_bytes(GIB) == "1.00 GiB"
    assert format_bytes(-13.5 * GIB) == "-13.5 GiB"
    assert (format_bytes(0), format_bytes(512)) == ("0 B", "512 B")
    assert format_seconds(12.4) == "12.4 s"
    assert format_seconds(3.1e-3) == "3.10 ms"
    assert format_seconds(45e-6) == "45.0 us"
    assert format_seconds(750) == "12.5 min"
    assert format_bytes_per_s(25e9) == "25.0 GB/s"
    assert format_bytes_per_s(999.9e6) == "1.00 GB/s", "rounding up changes the unit"
    assert format_flops_per_s(312e12) == "312 TFLOP/s"
    assert format_count(8.03e9) == "8.03 B"
    assert format_count(12) == "12"


@pytest.mark.parametrize("num_bytes", [1, 1023, 1024, 7 * MIB, 63 * GIB, 5 * 2**40])
def test_a_formatted_size_reads_back(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=5e-3)
