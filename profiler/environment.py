"""The circumstances of a measurement: versions, variables, clocks, hosts; and how two of them differ."""

from __future__ import annotations

from meshwright.profiler.record import record


@record
class Setting:
    """One named fact of the environment: ``("NCCL_ALGO", "Ring")``, ``("clock_hz", "1.98e9")``."""

    name: str
    value: str


@record
class Environment:
    """What a measurement ran under; ``settings`` sorted by name, everything that could change a figure."""

    meshwright: str
    python: str
    torch: str | None = None
    backend: str | None = None  # nccl or gloo
    driver: str | None = None
    hosts: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
