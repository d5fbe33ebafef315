"""What the scorecard says of one row, and of the errors of many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshwright.profiler.record import record


@record
class RowScore:
    """One row of the table: what was predicted, what was measured, or why it was skipped.

    ``error`` is of the step or the utilisation, ``peak_error`` of the peak, in what its source counts.
    """

    row_id: str
    family: str
    framework: str | None = None
    status: str | None = None
    predicted_step_s: float | None = None
    predicted_peak_bytes: int | None = None  # tensors
    predicted_fragmentation_bytes: int | None = None
    fits: bool | None = None
    recommended: bool | None = None
    skipped_reason: str | None = None
    measured_step_s: float | None = None
    measured_peak_bytes: float | None = None
    peak_kind: str | None = None
    error: float | None = None
    peak_error: float | None = None
    notes: tuple[str, ...] = ()


@record
class ErrorScore:
    """Over the rows with a prediction and a measurement; ``bias`` is the median signed error."""

    rows: int
    median: float
    mean: float
    bias: float


def error_score(errors: Sequence[float]) -> ErrorScore | None:
    """Of relative errors; ``None`` without any."""
    if not errors:
        return None
    values = np.asarray(errors)
    return ErrorScore(
        rows=len(values),
        median=float(np.median(np.abs(values))),
        mean=float(np.mean(np.abs(values))),
        bias=float(np.median(values)),
    )
