from __future__ import annotations

import pytest

from meshwright import InputError
from meshwright.cost_models.placement import Placement, groups, rank_grid
from meshwright.cost_models.strategy import ParallelConfig

CONFIG = ParallelConfig(tp=2, pp=2, dp=2)


def test_neighbours_are_tensor_parallel_peers_and_stages_far_apart() -> None:
    assert rank_grid(CONFIG, Placement()).shape == (2, 2, 1, 2)  # [pp, dp, cp, tp]
    assert groups(CONFIG, Placement(), "tp").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups(CONFIG, Placement(), "dp").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups(CONFIG, Placement(), "pp").tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups(CONFIG, Placement(), "dp", "tp").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(CONFIG, Placement()).tolist() == [[rank] for rank in range(8)]


def test_another_order_moves_the_axes() -> None:
    order = Placement(order=("pp", "tp", "cp", "dp"))
    assert groups(CONFIG, order, "pp").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups(CONFIG, order, "tp").tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_a_permutation_says_who_takes_each_place() -> None:
    reversed_ranks = Placement(permutation=tuple(range(7, -1, -1)))
    assert groups(CONFIG, reversed_ranks, "tp").tolist() == [[7, 6], [5, 4], [3, 2], [1, 0]]


@pytest.mark.parametrize("axes", [("tp",), ("dp", "cp"), ("pp", "tp"), ("tp", "cp", "dp", "pp")])
def test_groups_hold_every_rank_once(axes: tuple[str, ...]) -> None:
    config = ParallelConfig(tp=3, cp=2, cp_ring=2, pp=5, dp=4)
    assert sorted(groups(config, Placement(), *axes).ravel().tolist()) == list(range(120))


def test_placements_that_place_nobody_are_refused() -> None:
    with pytest.raises(InputError, match="must name tp, cp, dp, pp once each"):
        Placement(order=("tp", "dp", "pp", "pp"))
    with pytest.raises(InputError, match=r"must hold each of 0\.\.2 once"):
        Placement(permutation=(0, 2, 2))
    with pytest.raises(InputError, match="permutes 4 ranks, the config has 8"):
        rank_grid(CONFIG, Placement(permutation=(0, 1, 2, 3)))
