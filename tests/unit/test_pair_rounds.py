"""Who talks to whom: every pair once, nothing shared in a round, and as many rounds as the formula says."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from meshwright.profiler.rounds import (
    across_rounds,
    crowded_inside_rounds,
    crowded_rounds,
    inside_rounds,
    tournament,
)


def make_nodes(*sizes: int) -> list[list[int]]:
    edges = [sum(sizes[:place]) for place in range(len(sizes) + 1)]
    return [list(range(edges[place], edges[place + 1])) for place in range(len(sizes))]


def unordered(pairs: object) -> Counter[tuple[int, ...]]:
    return Counter(tuple(sorted(pair)) for pair in pairs)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", range(10))
def test_a_tournament_pairs_each_two_once(size: int) -> None:
    rounds = tournament(size)
    assert len(rounds) == (0 if size < 2 else size - 1 if size % 2 == 0 else size)
    for meeting in rounds:
        players = list(chain(*meeting))
        assert len(players) == len(set(players))
    met = unordered(chain(*rounds))
    assert set(met) == {(a, b) for a in range(size) for b in range(a + 1, size)}
    assert set(met.values()) <= {1}


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (4, 4, 4, 4), (8, 8, 8), (3, 2, 4), (1, 5)])
def test_across_nodes_each_pair_once_and_no_host_twice_in_a_round(sizes: tuple[int, ...]) -> None:
    nodes = make_nodes(*sizes)
    host = {rank: place for place, node in enumerate(nodes) for rank in node}
    rounds = across_rounds(nodes)
    for meeting in rounds:
        hosts = [host[rank] for pair in meeting for rank in pair]
        assert len(hosts) == len(set(hosts))
    met = unordered(chain(*rounds))
    assert set(met) == {(a, b) for a in host for b in host if a < b and host[a] != host[b]}
    assert set(met.values()) == {1}


@pytest.mark.parametrize(("num_nodes", "size"), [(2, 4), (4, 8), (16, 8), (5, 2)])
def test_rounds_grow_with_nodes_not_with_pairs(num_nodes: int, size: int) -> None:
    meetings = num_nodes - 1 if num_nodes % 2 == 0 else num_nodes
    nodes = make_nodes(*[size] * num_nodes)
    assert len(across_rounds(nodes)) == size * size * meetings
    assert len(crowded_rounds(nodes)) == size * meetings


@pytest.mark.parametrize("sizes", [(4,), (4, 4), (8, 3), (1, 1)])
@pytest.mark.parametrize("one_pair_a_host", [True, False])
def test_inside_nodes_each_pair_once(sizes: tuple[int, ...], one_pair_a_host: bool) -> None:
    nodes = make_nodes(*sizes)
    host = {rank: place for place, node in enumerate(nodes) for rank in node}
    rounds = inside_rounds(nodes, one_pair_a_host=one_pair_a_host)
    for meeting in rounds:
        ranks = list(chain(*meeting))
        assert len(ranks) == len(set(ranks))
        if one_pair_a_host:
            assert len({host[a] for a, _ in meeting}) == len(meeting)
    met = unordered(chain(*rounds))
    assert set(met) == {(a, b) for a in host for b in host if a < b and host[a] == host[b]}
    largest = max(sizes)
    assert len(rounds) == (largest * (largest - 1) // 2 if one_pair_a_host else len(tournament(largest)))


@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2), (2, 3)])
def test_a_crowd_has_every_device_of_the_smaller_node_talking(sizes: tuple[int, ...]) -> None:
    nodes = make_nodes(*sizes)
    host = {rank: place for place, node in enumerate(nodes) for rank in node}
    rounds = crowded_rounds(nodes)
    for sets in rounds:
        for group in sets:
            one, other = {host[a] for a, _ in group}, {host[b] for _, b in group}
            assert len(one) == len(other) == 1 and one != other
            assert len(group) == min(len(nodes[place]) for place in (*one, *other))
    met = unordered(chain(*chain(*rounds)))
    assert set(met) == {(a, b) for a in host for b in host if a < b and host[a] != host[b]}
    assert set(met.values()) == {1}


def test_a_crowd_inside_sends_each_ordered_pair_once() -> None:
    nodes = make_nodes(4, 2)
    sent = Counter(chain(*chain(*crowded_inside_rounds(nodes))))
    assert set(sent) == {(a, b) for node in nodes for a in node for b in node if a != b}
    assert set(sent.values()) == {1}
    for sets in crowded_inside_rounds(nodes):
        for group in sets:
            assert sorted(a for a, _ in group) == sorted(b for _, b in group)
