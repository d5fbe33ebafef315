"""Activations of some layers kept on the host from forward to backward, as many as it takes for the rest to fit.

Transformer Engine moves what a layer saved while later layers run, and brings it back ahead of its backward
(``pytorch/cpu_offload.py``); Megatron-Core lets that be any number of layers but all, without pipelines
(``transformer_config.py``: ``cpu_offloading_num_layers``). Left out: the seconds of the copies, and the two layers that
are under way at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def kept_activations(activations: FloatArray, excess: FloatArray, num_layers: int) -> FloatArray:
    """Bytes that stay on the device of all layers' ``activations``, when ``excess`` bytes are too many there."""
    layer = np.maximum(activations / num_layers, 1.0)
    moved = np.clip(np.ceil(excess / layer), 0.0, num_layers - 1.0)
    return np.asarray(activations - moved * layer)
