"""The exchange of an expert layer: rows sorted by expert, sizes told first, all-to-alls that can run beside work.

Each function's backward is the adjoint of its forward, with the same number of collectives. ``start`` and ``wait`` are
two functions: since autograd runs backward in the opposite order of forward, the work that lies between them in forward
lies between them in backward too.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from meshwright.profiler.record import record

Group = dist.ProcessGroup

_ops = torch.ops._c10d_functional  # functional forms: selective recompute can keep their outputs


@record
class Arrived:
    """Rows that one part brings to this rank's experts: ``num_rows`` of each expert, which end at ``ends`` (int32).

    ``places``: where the rows of each expert in turn lie among those that arrived, None where they lie so already.
    Where rows are gathered, those of each rank of the etp group are padded to ``longest``.
    """

    num_rows: list[int]
    ends: Tensor
    places: Tensor | None
    longest: int


@record
class Part:
    """One part of a rank's tokens on its way to the experts and back, ``k`` choices a token.

    ``order``: the choices that travel, ``[sent rows]``, as places in ``[tokens * k]``, sorted by expert. ``sent`` and
    ``received``: rows to and from each rank of the ep group.
    """

    num_tokens: int
    top_k: int
    order: Tensor
    sent: list[int]
    received: list[int]
    arrived: Arrived


def arrivals(sizes: list[list[list[int]]], device: torch.device) -> Arrived:
    """From ``sizes`` ``[etp][ep][local experts]``, the rows that arrive, in that order. Copies to the device once."""
    peers = [sum(map(sum, peer)) for peer in sizes]
    longest, local = max(1, *peers), len(sizes[0][0])
    num_rows = [sum(rows) for rows in zip(*(source for peer in sizes for source in peer), strict=True)]
    runs, experts = [], []  # lengths of runs of rows of one expert; padding counts as one more
    for peer, total in zip(sizes, peers, strict=True):
        runs += [*(rows for source in peer for rows in source), longest - total]
        experts += [*(expert for _ in peer for expert in range(local)), local]
    numbers = torch.tensor([*accumulate(num_rows), *runs, *experts], device=device)
    ends, lengths, of_runs = numbers.split([local, len(runs), len(experts)])
    places = None
    if len(sizes) * len(sizes[0]) > 1:
        of_rows = of_runs.repeat_interleave(lengths, output_size=longest * len(sizes))
        places = of_rows.argsort(stable=True)[: sum(peers)]
    return Arrived(num_rows=num_rows, ends=ends.int(), places=places, longest=longest)


def count_choices(index: Tensor, num_experts: int) -> Tensor:
    """How many of ``index`` (any shape) name each expert, ``[experts]`` int64; ``num_experts`` names none."""
    flat = index.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def plan_parts(
    index: Tensor, num_experts: int, num_chunks: int, ep_group: Group | None, etp_group: Group | None
) -> list[Part]:
    """What travels where, for ``num_chunks`` contiguous parts of the tokens that made the choices ``[tokens, k]``.

    A choice of ``num_experts`` is one that was dropped, and stays. ``ep_group`` None: all experts are here.
    ``etp_group``: the ranks whose rows are gathered, if any. One all_to_all over ep and one all_gather over etp tell
    the sizes of all parts; the host waits for them once.
    """
    num_tokens, top_k = index.shape
    ep, etp = _size(ep_group), _size(etp_group)
    bounds = [num_tokens * part // num_chunks for part in range(num_chunks + 1)]
    pieces = index.split([stop - start for start, stop in pairwise(bounds)])
    orders = [piece.reshape(-1).argsort(stable=True) for piece in pieces]
    local = num_experts // ep
    counts = torch.stack([count_choices(piece, num_experts) for piece in pieces]).view(num_chunks, ep, local)
    arriving = counts.transpose(0, 1).contiguous()  # [ep, chunks, local experts]
    if ep_group is not None:
        equal = [1] * ep
        arriving = _ops.wait_tensor(_ops.all_to_all_single(arriving, equal, equal, ep_group.group_name))
    arriving = arriving.unsqueeze(0)
    if etp_group is not None:
        arriving = _ops.wait_tensor(_ops.all_gather_into_tensor(arriving, etp, etp_group.group_name))
    if is_valueless(counts):
        place = 0 if ep_group is None else ep_group.rank()
        sent, arrived = balanced_sizes([piece.numel() for piece in pieces], num_experts, ep, place, etp)
    else:
        sent, arrived = _on_host(counts, arriving)
    own = 0 if etp_group is None else etp_group.rank()
    parts = []
    for chunk, (piece, order) in enumerate(zip(pieces, orders, strict=True)):
        rows = [sum(experts) for experts in sent[chunk]]
        sizes = [[source[chunk] for source in peer] for peer in arrived]
        parts.append(
            Part(
                num_tokens=piece.shape[0],
                top_k=top_k,
                order=order[: sum(rows)],
                sent=rows,
                received=[sum(source) for source in sizes[own]],
                arrived=arrivals(sizes, index.device),
            )
        )
    return parts


def _size(group: Group | None) -> int:
    return 1 if group is None else group.size()


def _on_host(counts: Tensor, arriving: Tensor) -> tuple[Any, Any]:
    """Both as nested lists; the host waits once."""
    both = torch.cat((counts.reshape(-1), arriving.reshape(-1))).cpu()
    sent, arrived = both.split([counts.numel(), arriving.numel()])
    return sent.view(counts.shape).tolist(), arrived.view(arriving.shape).tolist()


def is_valueless(counts: Tensor) -> bool:
    """Whether sizes cannot be read: a tensor without values, or one that a fake process group was to fill."""
    return isinstance(counts, FakeTensor) or counts.is_meta or dist.get_backend() == "fake"


def balanced_sizes(num_choices: list[int], num_experts: int, ep: int, place: int, etp: int) -> tuple[Any, Any]:
    """Sizes as if the choices of each part, on every rank, fell evenly on all experts (what a dry run assumes).

    ``num_choices`` of each part; ``place`` is this rank's in its ep group. Returns rows sent ``[chunks][ep][local
    experts]`` and rows that arrive ``[etp][ep][chunks][local experts]``.
    """
    local = num_experts // ep
    sent = []
    for total in num_choices:
        upto = [expert * total // num_experts for expert in range(num_experts + 1)]
        each = [stop - start for start, stop in pairwise(upto)]
        sent.append([each[rank * local : (rank + 1) * local] for rank in range(ep)])
    return sent, [[[part[place] for part in sent] for _ in range(ep)] for _ in range(etp)]


# -- rows on their way ------------------------------------------------------------------------------------------------


def spread(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """The row of each travelling choice: ``x`` ``[tokens, h]`` to ``[sent rows, h]``.

    Backward adds up a token's choices in their own order, so that it is the same each time.
    """
    rows: Tensor = _Spread.apply(x, order, top_k)
    return rows


def take(rows: Tensor, places: Tensor) -> Tensor:
    """``rows[places]`` for places that are all different; the adjoint of ``put``."""
    taken: Tensor = _Take.apply(rows, places)
    return taken


def put(rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
    """``[num_rows, h]`` with ``rows`` at ``places``, all different, and zeros elsewhere."""
    whole: Tensor = _Put.apply(rows, places, num_rows)
    return whole


class Exchange:
    """One all_to_all of rows: begun, and waited for later; backward the other way, begun and waited for likewise.

    ``sent`` and ``received``: rows to and from each rank of ``group``.
    """

    def __init__(self, group: Group, sent: list[int], received: list[int]) -> None:
        self._group, self._sent, self._received = group, sent, received
        self._returning: Tensor | None = None  # gradients on their way; not of the shape that autograd expects there

    def start(self, rows: Tensor) -> Tensor:
        """Begin to send ``rows``; what ``wait`` must be given before anything else touches it."""
        pending: Tensor = _Start.apply(rows, self)
        return pending

    def wait(self, pending: Tensor) -> Tensor:
        """The rows that were received, ``[sum(received), h]``."""
        arrived: Tensor = _Wait.apply(pending, self)
        return arrived

    def forward(self, rows: Tensor) -> Tensor:
        """Send; not waited for."""
        sending = _ops.all_to_all_single(rows.contiguous(), self._received, self._sent, self._group.group_name)
        return sending  # type: ignore[no-any-return]

    def start_backward(self, grad: Tensor) -> None:
        """Send gradients of received rows back."""
        self._returning = _ops.all_to_all_single(grad.contiguous(), self._sent, self._received, self._group.group_name)

    def wait_backward(self) -> Tensor:
        """The gradients of sent rows."""
        returning, self._returning = self._returning, None
        return _ops.wait_tensor(returning)  # type: ignore[no-any-return]


def _put(rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
    return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, places, rows)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.num_tokens, ctx.top_k = x.shape[0], top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        choices = _put(grads[0], order, ctx.num_tokens * ctx.top_k)
        return choices.unflatten(0, (ctx.num_tokens, ctx.top_k)).sum(1), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _put(grads[0], places, ctx.num_rows), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(places)
        return _put(rows, places, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places), None, None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.forward(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait_backward(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _ops.wait_tensor(pending)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start_backward(grads[0])
        return grads[0], None  # stands for what is on its way
