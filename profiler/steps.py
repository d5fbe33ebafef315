"""What a real step took: the fact that executors write and calibration reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from meshwright.profiler import artifact
from meshwright.profiler.environment import Environment
from meshwright.profiler.record import record

STEP_SCHEMA_VERSION = 1


@record
class RankMeasurement:
    """One rank's figures over the measured steps."""

    rank: int
    host: str
    device: str
    step_s: tuple[float, ...]  # wall time of each measured step, between barriers' exits
    peak_bytes: int | None  # peak of tensors allocated on the device; None where it cannot be read
    compute_s: float | None = None  # seconds a virtual device slept for compute, per step; None on real devices


@record
class StepMeasurement:
    """Real steps of a plan: per rank, with what was predicted and the environment they ran in.

    ``step_s`` is the median over steps of the slowest rank's time.
    """

    artifact: Literal["step-measurement"] = "step-measurement"
    schema_version: int = STEP_SCHEMA_VERSION
    plan_digest: str
    framework: str
    config: str  # ParallelConfig.describe()
    step_s: float
    step_s_spread: float  # (p90 - p10) / median over the measured steps
    predicted_step_s: float | None
    predicted_peak_bytes: int | None
    losses: tuple[float, ...]
    ranks: tuple[RankMeasurement, ...]
    environment: Environment
    measured_at: str  # ISO 8601, UTC
    plan: dict[str, Any] | None = None  # the plan's own JSON, without how it was found; None in older files


def load_measurement(path: str | Path) -> StepMeasurement:
    """Read a measurement; raises ``InputError`` as ``artifact.load`` does."""
    return artifact.load(StepMeasurement, path, artifact="step-measurement", schema_version=STEP_SCHEMA_VERSION)
