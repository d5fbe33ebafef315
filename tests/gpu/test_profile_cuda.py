"""A profile of the GPUs that are here: figures must lie below the datasheet's, where a preset knows the device."""

from __future__ import annotations

import pytest
import torch

from meshwright.profiler.cluster_presets import datasheet_peak
from meshwright.profiler.fit import best_rate
from meshwright.profiler.profile import profile_cluster

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.device_count(), reason="no CUDA device")]


def test_a_gpu_is_profiled() -> None:
    profile = profile_cluster(device="cuda", budget_s=20.0)
    assert profile is not None
    device = profile.device
    assert device.memory_bytes > device.reserved_bytes > 0
    matmuls = [sample for sample in device.samples if sample.op == "matmul"]
    peak = datasheet_peak(device.kind, "bfloat16")
    if peak is not None:
        assert 0.3 * peak < best_rate(matmuls) < peak
    assert device.efficiency("matmul", "bfloat16").residual < 0.5
    assert 1e-7 < device.launch_s < 1e-3
