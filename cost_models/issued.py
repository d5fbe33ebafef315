"""One kind of collective that a block issues: along which axis, in which phase, how often and how large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Axis = Literal["tp", "cp_ring", "cp_ulysses", "ep", "etp", "edp", "dp"]
Phase = Literal["forward", "backward", "recompute", "first_forward", "last_backward", "end"]
PER_MICROBATCH: tuple[Phase, ...] = ("forward", "backward", "recompute")


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of collective of one block: arrays of shape ``[num_configs]``.

    ``calls`` is for each micro-batch in the phases forward, backward and recompute; once a step in ``first_forward``
    (before or during the first micro-batch), ``last_backward`` (during the last one's backward) and ``end`` (after it).
    ``message_bytes`` is the whole tensor, as ``profiler.cluster.CollectiveCurve`` defines it for each operation.
    ``in_shard`` says that of the data ranks only those that share one copy of the weights take part.
    """

    axis: Axis
    op: str
    phase: Phase
    calls: FloatArray
    message_bytes: FloatArray
    in_shard: bool = False
