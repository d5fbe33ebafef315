"""One gradient norm over tensor, pipeline and ZeRO meshes, each element counted once.

Each rank sums the squares of what it holds, divided by the number of ranks that hold the same; one all_reduce over the
world adds them up. ``torch.nn.utils.clip_grad_norm_`` cannot: it refuses parameters on different meshes, and knows
nothing of other stages or of a tied weight's second copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from meshwright.executors.data_parallel import local


def global_grad_norm(weights: Iterable[tuple[nn.Parameter, int]], device: torch.device) -> Tensor:
    """The 2-norm of all gradients of the model, on every rank.

    ``weights`` are this rank's parameters, each with the number of ranks that hold the same elements of it.
    """
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for weight, copies in weights:
        if weight.grad is not None:
            by_copies[copies].append(local(weight.grad))
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for copies, grads in by_copies.items():
        squares += get_total_norm(grads).double() ** 2 / copies
    dist.all_reduce(squares)
    return squares.sqrt()


def scale_grads(weights: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale gradients in place by ``max_norm / norm`` where that is below 1."""
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for weight in weights:
        if weight.grad is not None:
            grad = local(weight.grad)
            grad.mul_(factor.to(grad.dtype))
