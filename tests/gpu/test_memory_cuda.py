"""Memory of one rank's share of larger plans on a real GPU: predicted and dry-run against torch's allocator.

The plans are those of ``benchmarks/memory_on_gpu.py``, whose tiny versions ``tests/multiprocess/test_lone_rank.py``
runs on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.device_count(), reason="no CUDA device")]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_on_gpu.py"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("memory_on_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_on_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


BENCH = _script()


@pytest.mark.parametrize("case", BENCH.CASES, ids=lambda case: str(case.name))
def test_peaks_are_those_of_the_allocator(case: Any) -> None:
    found = BENCH.compare(case, "cuda")
    assert abs(found.predicted_error) <= 0.05, found
    assert abs(found.dry_error) <= 0.05, found
    assert found.allocator_bytes >= found.measured_bytes
