"""Memory of a GPU that torch's allocator does not know of, with torch's figures of a GPU given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from meshwright.profiler import measure


def test_context_and_communicators_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 bytes, 30 of them free, 50 the allocator's; a group's first collective takes 7 more."""
    free: list[int] = [30]
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda size, device: size)
    monkeypatch.setattr(dist, "ProcessGroup", str)
    monkeypatch.setattr(dist, "new_group", lambda: "group")
    monkeypatch.setattr(dist, "destroy_process_group", made.append)

    def all_reduce(message: Any, group: str) -> None:
        assert group == "group"
        free[0] -= 7

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    gpu = torch.device("cuda", 0)
    assert measure.untracked_bytes(gpu) == 20
    assert measure._communicator_bytes(gpu) == 7
    assert made == ["group"]


def test_a_cpu_has_neither() -> None:
    assert measure.untracked_bytes(torch.device("cpu")) == 0
    assert measure._communicator_bytes(torch.device("cpu")) == 0
