"""What recompute does again: counted operators of one step, forward, backward and recomputation together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.multiprocess

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def _count(parallel: Any, batch: Any) -> tuple[int, int, int]:
    with Operators() as operators:
        parallel.step(batch)
    calls = operators.calls
    return calls[aten.mm.default] + calls[aten.addmm.default], calls[ATTENTION], calls[aten.silu.default]


LAYERS, PROJECTIONS = 4, 7  # a layer's q, k, v, o, gate, up, down
FORWARD = LAYERS * PROJECTIONS + 1  # and the head
MATMULS = 3 * FORWARD  # backward computes two for each


@pytest.mark.parametrize("split", ["dp2", "tp2", "tp2 sp", "dp2 zero3"])
def test_what_is_computed_again(split: str, on_split: Callable[..., list[Any]]) -> None:
    assert on_split(f"example | {split} | n1", _count) == [(MATMULS, LAYERS, LAYERS)] * 2
    # no projection and no attention, but the memory-bound rest
    assert on_split(f"example | {split} selective | n1", _count) == [(MATMULS, LAYERS, 2 * LAYERS)] * 2
    # everything but each block's last projection
    again = LAYERS * (PROJECTIONS - 1)
    assert on_split(f"example | {split} full | n1", _count) == [(MATMULS + again, 2 * LAYERS, 2 * LAYERS)] * 2
