"""The circumstances of a measurement: versions, variables, clocks, hosts; and how two of them differ."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import meshwright
from meshwright.profiler.record import record

# variables that change how fast ranks compute or talk; MASTER_ADDR and the like do not
PREFIXES = ("NCCL_", "GLOO_", "OMP_", "MKL_", "KMP_", "TORCH_NCCL_", "CUDA_DEVICE_", "PYTORCH_")
NVIDIA_FIELDS = ("driver_version", "clocks.max.sm", "clocks.applications.graphics", "power.limit")


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


def capture_environment(*, backend: str | None, hosts: Sequence[str] = ()) -> Environment:
    """What this process runs under now. ``hosts`` are those of all ranks, as the caller knows them.

    Clocks and the power cap are those of the first GPU (``nvidia-smi``), or of the first core (sysfs); what cannot be
    read is left out.
    """
    settings = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    settings["kernel"] = platform.release()
    settings["cpu"] = cpu_model()
    settings["cpu_cores"] = str(os.cpu_count())
    for name, path in (
        ("cpu_governor", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        ("cpu_max_khz", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq"),
    ):
        if text := _read(path):
            settings[name] = text
    graphics = _nvidia() if backend == "nccl" else {}
    settings |= {name: value for name, value in graphics.items() if name != "driver_version"}
    return Environment(
        meshwright=meshwright.__version__,
        python=platform.python_version(),
        torch=_version("torch"),
        backend=backend,
        driver=graphics.get("driver_version"),
        hosts=tuple(hosts),
        settings=tuple(Setting(name=name, value=settings[name]) for name in sorted(settings)),
    )


def environment_differences(then: Environment, now: Environment) -> tuple[str, ...]:
    """One readable sentence for each thing that differs: ``NCCL_ALGO was Ring, now is not set``.

    Hosts are compared as a set; a side that does not know them differs in nothing.
    """
    sentences = []
    for name in ("meshwright", "python", "torch", "backend", "driver"):
        before, after = getattr(then, name), getattr(now, name)
        if before != after and before is not None and after is not None:
            sentences.append(f"{name} was {before}, now is {after}")
    if then.hosts and now.hosts and set(then.hosts) != set(now.hosts):
        sentences.append(f"hosts were {_some(then.hosts)}, now are {_some(now.hosts)}")
    before_settings = {setting.name: setting.value for setting in then.settings}
    after_settings = {setting.name: setting.value for setting in now.settings}
    for name in sorted(before_settings.keys() | after_settings.keys()):
        before, after = before_settings.get(name), after_settings.get(name)
        if before == after:
            continue
        was = f"{name} was {before}" if before is not None else f"{name} was not set"
        sentences.append(f"{was}, now is {after if after is not None else 'not set'}")
    return tuple(sentences)


def cpu_model() -> str:
    """The processor's name as the kernel tells it, or the architecture."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _some(names: Sequence[str]) -> str:
    unique = sorted(set(names))
    return ", ".join(unique[:4]) + (f" and {len(unique) - 4} more" if len(unique) > 4 else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _nvidia() -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, f"--query-gpu={','.join(NVIDIA_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer.strip() else []
    return dict(zip(NVIDIA_FIELDS, values, strict=False))
