"""Parts of expert parallelism that need no ranks: cuts of stacked weights, sizes, places of rows, groups of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe import MoeConfig, MoeMlp, drop
from torch import Tensor, nn

from meshwright import InputError
from meshwright.cost_models.strategy import ParallelConfig
from meshwright.executors.expert_compute import grouped_product
from meshwright.executors.expert_dispatch import arrivals, balanced_sizes, count_choices, put, spread, take
from meshwright.executors.expert_modules import ExpertShape, find_experts
from meshwright.executors.expert_routing import AllLayers, Routing, check_token_groups
from meshwright.executors.tp_layout import take_part
from meshwright.profiler.layers import MoeLayer

SHAPE = ExpertShape(
    num_experts=2, hidden=3, ffn_size=4, up="gate_up_proj", gated=True, interleaved=False, transposed=False, biased=True
)


def columns(shape: ExpertShape, name: str, rank: int) -> list[int]:
    """Which columns of a width, counted from 0, that rank of etp 2 holds."""
    layout = shape.layout(name, 2)
    assert layout.dim is not None
    sizes = [2, 1, 1]
    sizes[layout.dim] = layout.whole_size
    whole = torch.arange(layout.whole_size).view([-1 if size == layout.whole_size else 1 for size in sizes])
    return take_part(whole.expand(sizes), layout, rank)[0].flatten().tolist()


def test_width_is_cut_half_by_half_or_pair_by_pair() -> None:
    """Width 4 over 2 ranks: columns 0 to 3 are the gate, 4 to 7 up; interleaved they take turns."""
    assert columns(SHAPE, "gate_up_proj", 0) == [0, 1, 4, 5]
    assert columns(SHAPE, "gate_up_proj", 1) == [2, 3, 6, 7]
    turns = replace(SHAPE, interleaved=True, transposed=True)
    assert columns(turns, "gate_up_proj", 0) == [0, 1, 2, 3]
    assert columns(turns, "gate_up_proj", 1) == [4, 5, 6, 7]
    assert columns(SHAPE, "down_proj", 1) == columns(turns, "down_proj", 1) == [2, 3]
    assert columns(replace(SHAPE, gated=False, up="up_proj"), "up_proj", 1) == [2, 3]


def test_dimensions_and_copies() -> None:
    dims = {name: SHAPE.layout(name, 2).dim for name in SHAPE.names}
    assert dims == {"gate_up_proj": 1, "down_proj": 2, "gate_up_proj_bias": 1, "down_proj_bias": None}
    turned = replace(SHAPE, transposed=True)
    assert [turned.layout(name, 2).dim for name in ("gate_up_proj", "down_proj")] == [2, 1]
    assert [SHAPE.layout(name, 2).copies for name in SHAPE.names] == [1, 1, 1, 2]


def test_experts_and_their_router_are_found() -> None:
    config = MoeConfig(hidden=8, num_experts=4, expert_ffn_size=6, ffn_size=4)
    (place,) = find_experts(nn.ModuleDict({"mlp": MoeMlp(config)}))
    assert (place.name, place.router) == ("mlp.experts", "mlp.router")
    assert (place.shape.num_experts, place.shape.hidden, place.shape.ffn_size) == (4, 8, 6)
    assert place.shape.gated and not (place.shape.biased or place.shape.transposed or place.shape.interleaved)


class Stacked(nn.Module):
    def __init__(self, **sizes: tuple[int, ...]) -> None:
        super().__init__()
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x


class OfTokensAlone(Stacked):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


@pytest.mark.parametrize(
    ("experts", "why"),
    [
        (Stacked(w1=(4, 6, 8), w2=(4, 8, 6)), "it holds w1, w2"),
        (Stacked(gate_up_proj=(4, 6, 8), down_proj=(4, 8, 4)), r"\[4, 6, 8\] and \[4, 8, 4\] do not fit"),
        (OfTokensAlone(gate_up_proj=(4, 6, 8), down_proj=(4, 8, 3)), "not called with tokens, choices and weights"),
        (Stacked(gate_up_proj=(4, 6, 8), down_proj=(4, 8, 3)), r"one router with a weight of shape \[4, 8\], found 0"),
    ],
)
def test_unknown_experts_are_refused(experts: nn.Module, why: str) -> None:
    with pytest.raises(InputError, match=why):
        find_experts(nn.ModuleDict({"experts": experts}))


def test_a_router_that_returns_something_else_is_refused() -> None:
    router = nn.Linear(8, 4)
    Routing(router, 4, None, AllLayers())
    with pytest.raises(InputError, match="the router Linear returns Tensor: expected logits, weights, choices"):
        router(torch.zeros(2, 8))


def test_balanced_sizes_add_up() -> None:
    """10 choices over 4 experts: 2, 3, 2, 3; the second of two ranks gets experts 2 and 3 of both, 5 rows from each."""
    sent, arrived = balanced_sizes([10, 4], 4, ep=2, place=1, etp=1)
    assert sent == [[[2, 3], [2, 3]], [[1, 1], [1, 1]]]
    assert arrived == [[[[2, 3], [1, 1]], [[2, 3], [1, 1]]]]


def test_rows_are_put_in_the_order_of_experts() -> None:
    """Two etp peers, two ranks each, two experts; the second peer gives one row less and is padded."""
    arrived = arrivals([[[1, 1], [0, 1]], [[0, 1], [1, 0]]], torch.device("cpu"))
    assert arrived.num_rows == [2, 3] and arrived.ends.tolist() == [2, 5] and arrived.longest == 3
    # rows: 0 expert 0, 1 and 2 expert 1 | 3 expert 1, 4 expert 0, 5 padding
    assert arrived.places is not None and arrived.places.tolist() == [0, 4, 1, 2, 3]
    assert arrivals([[[2, 3]]], torch.device("cpu")).places is None


def test_choices_are_counted_without_those_dropped() -> None:
    assert count_choices(torch.tensor([[0, 2], [3, 2]]), 3).tolist() == [1, 0, 2]


def test_rows_on_their_way_have_exact_gradients() -> None:
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x: take(x, places), rows)
    assert torch.autograd.gradcheck(lambda x: put(x[:3], places, 5), rows)
    assert torch.autograd.gradcheck(lambda x: spread(x, torch.tensor([7, 2, 0, 3, 6]), 2), rows)


def test_an_expert_without_rows_has_a_gradient_of_zero() -> None:
    rows = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    matrices = torch.ones(3, 2, 4, dtype=torch.float64, requires_grad=True)
    grouped_product(rows, matrices, arrivals([[[1, 0, 2]]], torch.device("cpu"))).sum().backward()
    assert matrices.grad is not None and matrices.grad.sum((1, 2)).tolist() == [8.0, 0.0, 16.0]


def test_a_group_takes_first_choices_first() -> None:
    """Groups of 4 tokens, 2 choices, 4 experts, factor 1: room for 2. All choose expert 0 first and 1 second, the last
    token the other way round: expert 0 takes tokens 0 and 1, expert 1 takes token 3 (a first choice) and then 0."""
    config = MoeConfig(num_experts=4, top_k=2, capacity_factor=1.0, group_tokens=4)
    index = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    expected = [[0, 1], [0, 4], [4, 4], [1, 4]]
    assert config.capacity == 2
    assert drop(index.repeat(2, 1).view(1, 8, 2), config).view(2, 4, 2).tolist() == [expected, expected]


def test_groups_of_tokens_must_lie_on_one_rank() -> None:
    moe = MoeLayer(hidden=8, num_experts=4, top_k=2, expert_ffn_size=8, capacity_factor=1.0, group_tokens=16)
    check_token_groups(moe, ParallelConfig(), 64)
    check_token_groups(moe, ParallelConfig(cp=2, cp_ulysses=2, tp=2, sequence_parallel=True), 64)
    check_token_groups(moe, ParallelConfig(cp=2, cp_ring=2), 64)
    check_token_groups(moe, ParallelConfig(tp=8), 64)  # without sequence parallelism ranks have whole sequences
    check_token_groups(replace(moe, capacity_factor=0.0, group_tokens=0), ParallelConfig(cp=8, cp_ring=8), 64)
    with pytest.raises(InputError, match=r"a group of 16 neighbouring tokens .* runs of 8"):
        check_token_groups(moe, ParallelConfig(cp=4, cp_ring=4), 64)
    with pytest.raises(InputError, match="cut 64 tokens into runs of 8"):
        check_token_groups(moe, ParallelConfig(cp=2, cp_ulysses=2, tp=4, sequence_parallel=True), 64)
    with pytest.raises(InputError, match="cut 72 tokens into runs of 72"):
        check_token_groups(moe, ParallelConfig(), 72)
