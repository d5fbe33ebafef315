"""Measured steps in words: peaks beside the predicted ones, what the allocator held beyond tensors."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from meshwright.profiler.environment import Environment
from meshwright.profiler.steps import KindBytes, RankMeasurement, StepMeasurement
from meshwright.terminal.steps_view import measurement_line, show_measurements

GIB = 2**30


def rank(
    number: int, peak_bytes: int | None, reserved_bytes: int | None, kinds: tuple[KindBytes, ...] = ()
) -> RankMeasurement:
    return RankMeasurement(
        rank=number,
        host="a",
        device="gpu",
        step_s=(1.0, 1.0),
        peak_bytes=peak_bytes,
        reserved_bytes=reserved_bytes,
        kinds=kinds,
    )


def step(*ranks: RankMeasurement) -> StepMeasurement:
    return StepMeasurement(
        plan_digest="",
        framework="meshwright",
        config="dp2 mbs1",
        step_s=1.0,
        step_s_spread=0.01,
        predicted_step_s=0.9,
        predicted_peak_bytes=11 * GIB,
        losses=(2.0, 1.0),
        ranks=ranks,
        environment=Environment(meshwright="0", python="3"),
        measured_at="2026-01-01T00:00:00+00:00",
    )


def shown(measurement: StepMeasurement) -> str:
    out = StringIO()
    show_measurements([measurement], Console(file=out, width=120))
    return out.getvalue()


def test_fragmentation_is_that_of_the_rank_with_the_fullest_allocator() -> None:
    measured = step(rank(0, 10 * GIB, 11 * GIB), rank(1, 8 * GIB, 12 * GIB))
    assert measured.ranks[0].fragmentation == pytest.approx(0.1)
    assert measured.fragmentation == pytest.approx(0.5)
    assert measured.peak_bytes == 10 * GIB
    assert "+50.0%" in shown(measured) and "+10.0%" in shown(measured)  # surplus, and 11 GiB predicted for 10
    assert (
        measurement_line(measured)
        == "dp2 mbs1: 1.00 s a step (predicted -10.0%), a peak of 10.0 GiB (predicted +10.0%)"
    )


def test_kinds_of_the_fullest_rank() -> None:
    few, many = (
        (KindBytes(kind="params", num_bytes=GIB),),
        (
            KindBytes(kind="grads", num_bytes=GIB),
            KindBytes(kind="optimizer", num_bytes=2 * GIB),
            KindBytes(kind="working", num_bytes=0),
        ),
    )
    measured = step(rank(0, GIB, None, few), rank(1, 3 * GIB, None, many))
    assert measured.fragmentation is None
    assert "dp2 mbs1: optimizer 2.00 GiB, grads 1.00 GiB\n" in shown(measured)


def test_no_peak_is_said_as_none() -> None:
    measured = step(rank(0, None, None))
    assert measured.peak_bytes is None
    assert measurement_line(measured) == "dp2 mbs1: 1.00 s a step (predicted -10.0%)"
