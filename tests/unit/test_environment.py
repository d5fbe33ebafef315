"""What a measurement ran under, and sentences about what differs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.profiler.environment import Environment, Setting, capture_environment, environment_differences

THEN = Environment(
    meshwright="0.1.0",
    python="3.11.7",
    torch="2.13.0",
    backend="nccl",
    driver="550.54",
    hosts=("a", "b"),
    settings=(Setting(name="NCCL_ALGO", value="Ring"), Setting(name="power.limit", value="700.00 W")),
)


def test_the_same_environment_differs_in_nothing() -> None:
    assert environment_differences(THEN, THEN) == ()
    assert environment_differences(THEN, replace(THEN, hosts=("b", "a"))) == ()


def test_each_difference_is_a_sentence() -> None:
    now = replace(
        THEN,
        torch="2.14.0",
        hosts=("a", "c"),
        settings=(Setting(name="NCCL_PROTO", value="LL"), Setting(name="power.limit", value="500.00 W")),
    )
    assert environment_differences(THEN, now) == (
        "torch was 2.13.0, now is 2.14.0",
        "hosts were a, b, now are a, c",
        "NCCL_ALGO was Ring, now is not set",
        "NCCL_PROTO was not set, now is LL",
        "power.limit was 700.00 W, now is 500.00 W",
    )


def test_what_one_side_does_not_know_is_no_difference() -> None:
    assert environment_differences(THEN, replace(THEN, driver=None, hosts=())) == ()


def test_variables_that_change_speed_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    captured = capture_environment(backend="gloo", hosts=("here",))
    settings = {setting.name: setting.value for setting in captured.settings}
    assert settings["NCCL_ALGO"] == "Tree"
    assert settings["GLOO_SOCKET_IFNAME"] == "lo"
    assert "MASTER_ADDR" not in settings
    assert captured.hosts == ("here",)
    assert [setting.name for setting in captured.settings] == sorted(settings)
