"""Sums and counts of the default loss, on one process; sharded logits are tested over real ranks."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor  # noqa: E402

from meshwright.executors.loss import IGNORED, cross_entropy, loss_on_shards  # noqa: E402


def test_sum_and_count_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [5.0, 5.0], [1.0, 2.0]]], dtype=torch.float64)
    total, count = cross_entropy(logits, torch.tensor([[1, 0, IGNORED]]))
    # probabilities 3/4 and 1/2
    assert total.item() == pytest.approx(math.log(4 / 3) + math.log(2), rel=1e-12)
    assert count.item() == 2


def test_nothing_counts() -> None:
    total, count = cross_entropy(torch.zeros(2, 3, 5), torch.full((2, 3), IGNORED))
    assert (total.item(), count.item()) == (0.0, 0)


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.randn(4, 64, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(4, 64, dtype=torch.int64)
    total, _ = cross_entropy(logits, targets)
    exact, _ = cross_entropy(logits.double(), targets)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)


def test_without_tensor_parallelism_the_loss_is_the_users() -> None:
    assert loss_on_shards(None, group=None, vocab_size=5) is cross_entropy

    def mine(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sum(), targets.sum()

    assert loss_on_shards(mine, group=None, vocab_size=5) is mine
