"""What a real step took: the fact that executors write and calibration reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from meshwright.profiler import artifact
from meshwright.profiler.environment import Environment
from meshwright.profiler.record import record

STEP_SCHEMA_VERSION = 1


@record
class KindBytes:
    """Bytes of one kind of tensor at a peak; the kinds are those of ``cost_models.estimate.MemoryBreakdown``."""

    kind: str
    num_bytes: int


@record
class RankMeasurement:
    """One rank's figures over the measured steps.

    On a GPU ``peak_bytes`` and ``reserved_bytes`` are what torch's allocator had at most given out
    (``max_memory_allocated``) and taken from the device (``max_memory_reserved``; only of a plan that ran alone). On a
    CPU, which has no such figure, ``peak_bytes`` is what all tensors took, counted one by one over two steps before the
    timed ones, and ``kinds`` says of what; None where there were fewer than two steps to warm up.
    """

    rank: int
    host: str
    device: str
    step_s: tuple[float, ...]  # wall time of each measured step, between barriers' exits
    peak_bytes: int | None
    compute_s: float | None = None  # seconds a virtual device slept for compute, per step; None on real devices
    reserved_bytes: int | None = None
    kinds: tuple[KindBytes, ...] = ()

    @property
    def fragmentation(self) -> float | None:
        """What the allocator held on top of all tensors, as a share of them: its peak over theirs, minus 1."""
        if self.reserved_bytes is None or not self.peak_bytes:
            return None
        return self.reserved_bytes / self.peak_bytes - 1


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

    @property
    def peak_bytes(self) -> int | None:
        """The largest peak of any rank."""
        return max((rank.peak_bytes for rank in self.ranks if rank.peak_bytes is not None), default=None)

    @property
    def fragmentation(self) -> float | None:
        """That of the rank whose allocator held most."""
        known = [rank for rank in self.ranks if rank.fragmentation is not None]
        return max(known, key=lambda rank: rank.reserved_bytes or 0).fragmentation if known else None


def load_measurement(path: str | Path) -> StepMeasurement:
    """Read a measurement; raises ``InputError`` as ``artifact.load`` does."""
    return artifact.load(StepMeasurement, path, artifact="step-measurement", schema_version=STEP_SCHEMA_VERSION)
