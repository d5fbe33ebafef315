"""Time pairs of ranks over a real process group: latency, bandwidth alone, and each device's share in a crowd.

*Alone*: ping-pong. Half the median round trip of 8 bytes is the latency; a large message answered by 8 bytes takes
``bytes / bandwidth + 2 latencies`` (here the quickest, or a busy host would be taken for a fast link). Messages grow
until one takes long enough for the clock, both directions apart.
*Crowded*: every device of a node sends to one of another node (or of its own) at once. What counts is when the last is
done, as in a collective: a device's share is the bytes of the set over the slowest time, over the number of senders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from meshwright.profiler.clock import DeviceClock
from meshwright.profiler.cluster import LinkMatrix
from meshwright.profiler.record import record
from meshwright.profiler.rounds import (
    Pair,
    Round,
    across_rounds,
    crowded_inside_rounds,
    crowded_rounds,
    inside_rounds,
)

FIRST_BYTES = 2**18
LARGEST_BYTES = {"cpu": 2**26, "cuda": 2**28}
WARM_UP, PING_PONGS = 5, 30

Progress = Callable[[float], None]
Transfer = Callable[[torch.Tensor, int], Any]  # dist.isend or dist.irecv


@record
class LinkOptions:
    """``message_s``: how long a timed message should take; ``crowd_s``: how long a crowd talks, each of its turns."""

    message_s: float = 0.02
    crowd_s: float = 0.15
    repeats: int = 5
    turns: int = 3


class PairClock:
    """Sends and times messages between this rank and another."""

    def __init__(self, clock: DeviceClock, options: LinkOptions) -> None:
        self.clock, self.options = clock, options
        self.rank = dist.get_rank()
        self.small = torch.zeros(1, dtype=torch.int64, device=clock.device)
        self._large = torch.zeros(0, dtype=torch.uint8, device=clock.device)
        self.batched = dist.get_backend() == "nccl"  # one communicator for all pairs instead of one for each

    def large(self, num_bytes: int) -> torch.Tensor:
        """A message of that size, from a buffer that only grows."""
        if self._large.numel() < num_bytes:
            self._large = torch.zeros(num_bytes, dtype=torch.uint8, device=self.clock.device)
        return self._large[:num_bytes]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send, and return when the buffer is free again."""
        self._run([(dist.isend, tensor, to)]) if self.batched else dist.send(tensor, to)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """Receive into the tensor."""
        self._run([(dist.irecv, tensor, source)]) if self.batched else dist.recv(tensor, source)

    def _run(self, calls: Sequence[tuple[Transfer, torch.Tensor, int]]) -> None:
        if self.batched:
            works = dist.batch_isend_irecv([dist.P2POp(call, tensor, peer) for call, tensor, peer in calls])
        else:
            works = [call(tensor, peer) for call, tensor, peer in calls]
        for work in works:
            work.wait()

    def latency(self, pair: Pair) -> tuple[float, float] | None:
        """One-way seconds of 8 bytes, the median and the quickest, known to the pair's first rank."""
        first, second = pair
        samples = []
        for turn in range(WARM_UP + PING_PONGS):
            start = self.clock.now()
            if self.rank == first:
                self.send(self.small, second)
                self.receive(self.small, second)
            else:
                self.receive(self.small, first)
                self.send(self.small, first)
            if turn >= WARM_UP:
                samples.append((self.clock.now() - start) / 2)
        return (float(np.median(samples)), min(samples)) if self.rank == first else None

    def bandwidth(self, source: int, target: int, quickest_s: float) -> tuple[float, float] | None:
        """Bytes a second from ``source`` to ``target`` and the spread of its samples, known to ``source``.

        The source leads: it announces each size (0 ends), sends, and is answered.
        """
        if self.rank != source:
            while True:
                self.receive(self.small, source)
                if not (size := int(self.small.item())):
                    return None
                self.receive(self.large(size), source)
                self.send(self.small, source)
        size, largest = FIRST_BYTES, LARGEST_BYTES[self.clock.device.type]
        self._timed(size, target)  # warms the connection up, and empties a traffic shaper's bucket
        while (seconds := self._timed(size, target)) < self.options.message_s and size < largest:
            # straight to the size that should do, at most eightfold, at least double
            size = min(largest, size * 2 ** int(np.clip(np.ceil(np.log2(self.options.message_s / seconds)), 1, 3)))
        samples = [seconds, *(self._timed(size, target) for _ in range(self.options.repeats - 1))]
        self.small.fill_(0)
        self.send(self.small, target)
        rates = size / np.maximum(np.asarray(samples) - 2 * quickest_s, np.asarray(samples) / 2)
        low, middle, high = np.percentile(rates, [10, 50, 90])
        return float(middle), float((high - low) / middle)

    def _timed(self, size: int, target: int) -> float:
        self.small.fill_(size)
        self.send(self.small, target)
        message = self.large(size)
        start = self.clock.now()
        self.send(message, target)
        self.receive(self.small, target)
        return self.clock.now() - start

    def stream(self, sends: Sequence[int], receives: Sequence[int], size: int, repeats: int) -> float:
        """Seconds to send ``repeats`` messages to each target and receive as many from each source.

        Collective: starts after a barrier of all ranks.
        """
        inbox = [torch.zeros(size, dtype=torch.uint8, device=self.clock.device) for _ in receives]
        message = self.large(size)
        dist.barrier()
        start = self.clock.now()
        for _ in range(repeats):
            calls: list[tuple[Transfer, torch.Tensor, int]] = [
                (dist.irecv, buffer, peer) for buffer, peer in zip(inbox, receives, strict=True)
            ]
            calls += [(dist.isend, message, peer) for peer in sends]
            if calls:
                self._run(calls)
        return self.clock.now() - start


def measure_links(
    nodes: Sequence[Sequence[int]], clock: DeviceClock, options: LinkOptions, progress: Progress
) -> tuple[LinkMatrix, tuple[str, ...]]:
    """The link matrix of all ranks, equal on every rank, and notes on pairs that were unsteady.

    ``nodes`` lists the ranks of each node. Collective: every rank of the default group calls it.
    """
    world = dist.get_world_size()
    pairs = PairClock(clock, options)
    latency, rate, spread = (np.zeros((world, world)) for _ in range(3))
    # pairs of a host share its memory bus where messages go through memory; NVLink pairs share nothing
    rounds = [*inside_rounds(nodes, one_pair_a_host=clock.device.type == "cpu"), *across_rounds(nodes)]
    crowds = [*crowded_inside_rounds(nodes), *crowded_rounds(nodes)]
    total = len(rounds) + len(crowds)
    for step, meeting in enumerate(rounds):
        dist.barrier()
        _alone(meeting, pairs, latency, rate, spread)
        progress((step + 1) / total)
    latency, rate, spread = (_shared(array, clock.device) for array in (latency, rate, spread))
    crowded = np.zeros((world, world))
    for step, sets in enumerate(crowds):
        across = step >= len(crowds) - len(crowded_rounds(nodes))
        _crowd(sets, pairs, rate, crowded)
        if across:  # and the other way; inside a node each (from, to) has its own round
            _crowd([tuple((b, a) for a, b in group) for group in sets], pairs, rate, crowded)
        progress((len(rounds) + step + 1) / total)
    matrix = LinkMatrix(latency_s=_rows(latency), bytes_per_s=_rows(rate), contended_bytes_per_s=_rows(crowded))
    return matrix, _unsteady(rate, spread)


def _alone(
    meeting: Round,
    pairs: PairClock,
    latency: NDArray[np.float64],
    rate: NDArray[np.float64],
    spread: NDArray[np.float64],
) -> None:
    mine = next((pair for pair in meeting if pairs.rank in pair), None)
    if mine is None:
        return
    for source, target in (mine, mine[::-1]):
        seconds = pairs.latency((source, target))
        found = pairs.bandwidth(source, target, seconds[1] if seconds else 0.0)
        if found and seconds:
            latency[source, target] = seconds[0]
            rate[source, target], spread[source, target] = found


def _crowd(sets: Sequence[Round], pairs: PairClock, rate: NDArray[np.float64], crowded: NDArray[np.float64]) -> None:
    """Let every set talk at once, and write each set's share into ``crowded`` (equal on all ranks)."""
    mine = [pair for group in sets for pair in group if pairs.rank in pair]
    sends = [target for source, target in mine if source == pairs.rank]
    receives = [source for source, target in mine if target == pairs.rank]
    # a crowd on one link gets a share of it: ask for what the share would move in the time
    slowest = min(min(rate[source, target] for source, target in group) / len(group) for group in sets)
    wanted = slowest * pairs.options.crowd_s
    size = int(min(max(wanted / 4, 2**14), 2**22))
    repeats = int(np.clip(wanted / size, 2, 64))
    seconds = torch.zeros(pairs.options.turns, dist.get_world_size(), dtype=torch.float64, device=pairs.clock.device)
    for turn in range(pairs.options.turns):
        elapsed = pairs.stream(sends, receives, size, repeats)
        seconds[turn, pairs.rank] = elapsed
    dist.all_reduce(seconds)
    for group in sets:
        ranks = sorted({rank for pair in group for rank in pair})
        last = float(np.median(seconds[:, ranks].amax(dim=1).cpu().numpy()))
        for source, target in group:
            crowded[source, target] = size * repeats / last


def _shared(array: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """The sum over ranks: each entry was filled by one of them."""
    tensor = torch.from_numpy(array).to(device)
    dist.all_reduce(tensor)
    return np.asarray(tensor.cpu().numpy())


def _rows(array: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in array)


def _unsteady(rate: NDArray[np.float64], spread: NDArray[np.float64]) -> tuple[str, ...]:
    shaky = [(spread[a, b], a, b) for a, b in zip(*np.nonzero(spread > 0.3), strict=True)]
    if not shaky:
        return ()
    worst = max(shaky)
    return (
        f"bandwidth of {len(shaky)} of {np.count_nonzero(rate)} ordered pairs varied by more than 30 % between "
        f"samples, most from rank {worst[1]} to {worst[2]} ({100 * worst[0]:.0f} %)",
    )
