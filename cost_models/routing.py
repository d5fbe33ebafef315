"""How unevenly tokens fall on experts, and what that makes of the rank with the most.

All ranks of an expert-parallel group meet in every exchange, so that each layer takes as long as its most loaded rank:
with loads ``f[l, e]`` (shares of a layer's routed tokens, summing to 1) and experts laid out in order, ``E / ep`` on
each rank, layer ``l`` takes ``max_r(ep * sum of f[l, e] over rank r's experts)`` times as long as under even routing.
``Skew`` keeps the mean of that over layers for every ``ep`` that divides the experts: what a step needs, whatever
the number of experts and layers. Left out: loads that change from micro-batch to micro-batch (a measured load is a mean
over many, whose maximum is below the mean of the maxima), and experts of unlike load on one rank, whose rows add up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.profiler.record import record

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@record
class Skew:
    """Rows of the most loaded rank over the mean: ``slowest[i]`` where experts are spread over ``ranks[i]`` ranks.

    Raises ``InputError`` where it is not one figure of at least 1 for each of the growing ``ranks``.
    """

    ranks: tuple[int, ...]
    slowest: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.slowest) or list(self.ranks) != sorted(set(self.ranks)) or not self.ranks:
            raise InputError("a routing skew has one figure for each number of ranks, which grow")
        if min(self.slowest) < 1.0 - 1e-9:
            raise InputError(f"the most loaded rank has the mean at least, found {min(self.slowest)} of it")

    def of(self, ep: IntArray) -> FloatArray:
        """Rows of the most loaded of ``ep`` ranks over the mean; between known numbers of ranks that of the next."""
        place = np.minimum(np.searchsorted(np.array(self.ranks), ep), len(self.ranks) - 1)
        return np.where(ep > 1, np.array(self.slowest)[place], 1.0)


def skew_of(load: Any) -> Skew:
    """The skew of a measured load ``[layers, experts]`` (tokens or shares; ``[experts]`` of one layer).

    Raises ``InputError`` for another shape, negative loads, or a layer without any token.
    """
    shares = np.atleast_2d(np.asarray(load, dtype=np.float64))
    if shares.ndim != 2 or not shares.size:
        raise InputError(f"a load has the shape [layers, experts], found {list(np.shape(load))}")
    total = shares.sum(axis=1, keepdims=True)
    if not np.isfinite(shares).all() or (shares < 0).any() or (total <= 0).any():
        raise InputError("a load counts tokens: at least 0 for each expert, above 0 for each layer")
    shares, experts = shares / total, shares.shape[1]
    ranks = [ways for ways in range(1, experts + 1) if experts % ways == 0]
    slowest = [float(np.mean(ways * shares.reshape(len(shares), ways, -1).sum(axis=2).max(axis=1))) for ways in ranks]
    return Skew(ranks=tuple(ranks), slowest=tuple(max(value, 1.0) for value in slowest))
