"""The demo's first half, shortened: it measures, plans, trains with a falling loss, and compares nine plans."""

from __future__ import annotations

import re

import demo
import pytest

from meshwright.terminal.console import stdout_console

pytestmark = pytest.mark.multiprocess


def test_the_demo_on_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "PROFILE_S", 2.0)
    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr(demo, "console", stdout_console())  # made under the capture
    demo.on_this_machine()
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"\d\.\d\d", re.search(r"^loss .*$", printed, re.M)[0])]  # type: ignore[index]
    assert losses[-1] < 0.8 * losses[0]
    table = printed[printed.index("Predicted and measured") :]
    rows = [line for line in table.splitlines() if re.search(r"\d%\s+\d+\s*$", line)]
    assert len(rows) >= demo.MIN_PLANS
    assert all(any(line.split()[0].startswith(axis) for line in rows) for axis in ("tp", "pp", "dp"))
    assert sorted(int(line.split()[-1]) for line in rows) == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(
    ("second", "expected"), [([1.0, 2.0, 3.0], 1.0), ([3.0, 2.0, 1.0], -1.0), ([2.0, 1.0, 3.0], 0.5)]
)
def test_rank_correlation(second: list[float], expected: float) -> None:
    assert demo.spearman([10.0, 20.0, 30.0], second) == pytest.approx(expected)
