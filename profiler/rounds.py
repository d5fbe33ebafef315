"""Who talks to whom and when, so that a link is measured alone although many pairs run at once.

A round is a set of pairs that share neither a rank nor a host across the network. Nodes meet by the circle method of
round-robin tournaments: with ``M`` nodes there are ``M - 1`` meetings of all (``M`` when odd), each node in one pair at
most, so the number of rounds grows with nodes and not with pairs. Two nodes that meet go through their pairs of ranks
one by one: an uplink is never shared.
"""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[int, int]
Round = tuple[Pair, ...]


def tournament(size: int) -> tuple[Round, ...]:
    """Rounds in which each two of ``size`` players meet exactly once, nobody twice in a round.

    ``size - 1`` rounds, or ``size`` when it is odd (one player rests in each); none below two players.
    """
    if size < 2:
        return ()
    players: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        rounds.append(tuple((a, b) for a, b in pairs if a is not None and b is not None))
        players = [players[0], players[-1], *players[1:-1]]  # the first stays, the others move round
    return tuple(rounds)


def inside_rounds(nodes: Sequence[Sequence[int]], *, one_pair_a_host: bool) -> tuple[Round, ...]:
    """Pairs within nodes, all nodes at once; ``one_pair_a_host`` where pairs of a host share its memory bus.

    ``len(node) - 1`` rounds for the largest node (its size when odd), or one for each of its pairs.
    """
    plans = []
    for node in nodes:
        rounds = [[(node[a], node[b]) for a, b in meeting] for meeting in tournament(len(node))]
        plans.append([[pair] for meeting in rounds for pair in meeting] if one_pair_a_host else rounds)
    return _side_by_side(plans)


def across_rounds(nodes: Sequence[Sequence[int]]) -> tuple[Round, ...]:
    """Pairs on different nodes, one pair at a time for each two nodes that meet.

    With ``M`` nodes of ``G`` ranks: ``G * G`` rounds for each of the tournament's ``M - 1`` (``M`` when odd).
    """
    rounds: list[Round] = []
    for meeting in tournament(len(nodes)):
        rounds += _side_by_side([[[(a, b)] for a in nodes[one] for b in nodes[other]] for one, other in meeting])
    return tuple(rounds)


def crowded_rounds(nodes: Sequence[Sequence[int]]) -> tuple[tuple[Round, ...], ...]:
    """Pairs across with every device of a node talking at once: rounds of sets, one set for each two nodes that meet.

    Each pair of ranks comes exactly once. The smaller node's devices each talk to one of the larger node's.
    """
    rounds = []
    for meeting in tournament(len(nodes)):
        plans = []
        for one, other in meeting:
            few, many = sorted((nodes[one], nodes[other]), key=len)
            plans.append(
                [
                    tuple((rank, many[(place + shift) % len(many)]) for place, rank in enumerate(few))
                    for shift in range(len(many))
                ]
            )
        longest = max(len(plan) for plan in plans)
        rounds += [tuple(plan[step] for plan in plans if step < len(plan)) for step in range(longest)]
    return tuple(rounds)


def crowded_inside_rounds(nodes: Sequence[Sequence[int]]) -> tuple[tuple[Round, ...], ...]:
    """Within each node, every device sends to the one ``shift`` places on, for every shift: each (from, to) once."""
    longest = max(len(node) for node in nodes)
    return tuple(
        tuple(
            tuple((rank, node[(place + shift) % len(node)]) for place, rank in enumerate(node))
            for node in nodes
            if shift < len(node)
        )
        for shift in range(1, longest)
    )


def _side_by_side(plans: Sequence[Sequence[Sequence[Pair]]]) -> tuple[Round, ...]:
    """Run plans at once: round ``i`` joins what each plan has at ``i``."""
    longest = max((len(plan) for plan in plans), default=0)
    return tuple(tuple(pair for plan in plans if step < len(plan) for pair in plan[step]) for step in range(longest))
