"""Births, deaths, kinds and peaks of storages, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.cost_models.estimate import KINDS
from meshwright.executors.memory_peak import Block, find_peak
from meshwright.executors.memory_tracker import MemoryTracker


def block(num_bytes: int, born: int, died: int | None = None, **fields: Any) -> Block:
    given = {"kind": None, "window": None, "phase": "forward", "module": "", "operator": "op"}
    return Block(num_bytes=num_bytes, born=born, died=died, shape=(), dtype="float32", **{**given, **fields})


class TestPeak:
    def test_is_the_moment_with_most_bytes_and_what_they_are(self) -> None:
        blocks = [
            block(100, 1, kind="params"),
            block(50, 2, 6, window=0),  # born in a forward that ends at 3, alive then: an activation
            block(30, 3, 5, window=0, module="mlp", phase="forward"),  # the same
            block(70, 4, 7, phase="backward", module="head", operator="mm"),
        ]
        peak = find_peak(blocks, windows=[3], steps=[0], clock=7)
        assert peak.peak_bytes == 250
        assert {kind: peak.kind(kind) for kind in KINDS if peak.kind(kind)} == {
            "params": 100, "activations": 80, "working": 70,
        }  # fmt: skip
        assert (peak.phase, peak.module, peak.operator) == ("backward", "head", "mm")
        assert [tensor.num_bytes for tensor in peak.tensors] == [100, 70, 50, 30]

    def test_what_dies_within_its_forward_is_no_activation(self) -> None:
        blocks = [block(10, 1, 2, window=0), block(20, 3, 6, window=0), block(5, 5, window=1)]
        peak = find_peak(blocks, windows=[4, 7], steps=[0], clock=7)
        assert [one.kind for one in blocks] == ["working", "activations", "activations"]
        assert peak.peak_bytes == 25

    def test_of_several_steps_the_largest_counts(self) -> None:
        blocks = [block(10, 1, 2), block(7, 4), block(8, 5, 6)]
        peak = find_peak(blocks, windows=[], steps=[0, 3], clock=6)
        assert peak.step_peaks == (10, 15)
        assert (peak.step, peak.peak_bytes) == (1, 15)

    def test_timeline_reaches_the_peak_within_its_step(self) -> None:
        blocks = [block(1, time, time + 40) for time in range(1, 1000)]
        peak = find_peak(blocks, windows=[], steps=[0], clock=1100)
        totals = [sum(point.num_bytes) for point in peak.timeline]
        assert len(totals) == 200
        assert max(totals) == peak.peak_bytes == 40


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 512, bias=False)
        self.second = nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def tracked(model: nn.Module) -> tuple[MemoryTracker, Any]:
    """A tracker of a model that stands for a stage of its own."""
    stage = nn.Module()
    stage.model = model
    nothing = SimpleNamespace(finish=lambda: None, finish_gradients=lambda: None)
    stage.forward = model.forward
    chunk = SimpleNamespace(module=stage, data_parallel=nothing, tensor_parallel=nothing)
    parallel: Any = SimpleNamespace(
        _chunks=[chunk],
        parameters=model.parameters,
        named_parameters=model.named_parameters,
        modules=lambda: [model],
        _sum_tied_grads=lambda copies: None,
    )
    return MemoryTracker(parallel), stage


def test_one_step_of_two_matrices() -> None:
    """Rows ``x`` [64, 256]: kept for backward are x, the rectified [64, 512]; at the head of backward nothing else."""
    torch.manual_seed(0)
    tracker, stage = tracked(_Model())
    matrix, rows, wide = 256 * 512 * 4, 64 * 256 * 4, 64 * 512 * 4
    x = torch.randn(64, 256)
    with tracker:
        tracker.take_up([x])
        tracker.begin_step()
        out = stage(x)
        grad = torch.ones_like(out)
        out.backward(grad)
        tracker.mark_gradients()
    peak = tracker.peak()
    assert peak.kind("params") == 2 * matrix
    # backward of the first matrix: both gradients are there, of its output the gradient
    assert peak.kind("grads") == 2 * matrix
    assert peak.kind("activations") == rows  # out, which the caller holds
    assert peak.kind("working") == 2 * rows + wide  # x, the gradient of out, the gradient of what was rectified
    assert (peak.phase, peak.module) == ("backward", "first")
    assert {tensor.module for tensor in peak.tensors if tensor.kind == "params"} == {"first", "second"}


def test_views_count_once_and_sizes_are_rounded_to_512_bytes() -> None:
    tracker, _ = tracked(nn.Linear(1, 1, bias=False))
    with tracker:
        tracker.begin_step()
        base = torch.empty(1000, dtype=torch.uint8)
        views = [base.view(10, 100), base[:5], base.t()]
        kept = torch.empty(1, dtype=torch.uint8)
    assert tracker.peak().peak_bytes == 512 + 1024 + 512  # the weight, the base, the single byte
    assert len(views) + kept.numel() == 4


def test_a_storage_resized_to_nothing_is_free_until_it_is_resized_again() -> None:
    tracker, _ = tracked(nn.Linear(1, 1, bias=False))
    with tracker:
        tracker.begin_step()
        gathered = torch.empty(1024)
        gathered.untyped_storage().resize_(0)
        tracker.begin_step()
        other = torch.empty(512)
        tracker.begin_step()
        gathered.untyped_storage().resize_(8192)
    assert tracker.peak().step_peaks == (512 + 4096, 512 + 2048, 512 + 2048 + 8192)
    assert other.numel() == 512


def test_hooks_and_patches_are_gone_afterwards() -> None:
    tracker, stage = tracked(_Model())
    resize = torch.UntypedStorage.resize_
    with tracker:
        assert torch.UntypedStorage.resize_ is not resize
    assert torch.UntypedStorage.resize_ is resize
    assert not stage._forward_hooks
    assert not stage._forward_pre_hooks


def test_where_an_operator_fails_is_kept() -> None:
    tracker, stage = tracked(_Model())
    with pytest.raises(RuntimeError), tracker:
        stage(torch.randn(3, 255))
    assert tracker.failed_at == "in the forward of first (aten::mm)"
