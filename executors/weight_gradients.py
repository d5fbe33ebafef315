"""Gradients of matrices put off: how a stage splits its backward under zb-h1, zbv and dualpipev.

The first part is an ordinary backward in which the matrices of decoder blocks work out the gradients of their inputs
alone, and keep what the second part needs: input and gradient of the output. The second part is one product for each
matrix (Qi et al. 2023, arXiv 2401.10241, section 2; ``dw_builder`` of ``torch.distributed.pipelining.PipelineStage``
is made for it). Norms, biases, tables, routers and the head have their gradients in the first part: they cost little,
or, as the head, would keep gradients of logits. So do routed experts, whose matrices are multiplied in groups: a
schedule gains less from splitting the backward of a model with many.

torch's own split (``pipelining/_backward.py``) is not used. It walks the graph of the stage again for each weight,
which takes time with the square of the number of blocks (16 small blocks on a CPU: 31 ms instead of 5), keeps all that
the forward saved until the second part, and recomputes a block once for each of its weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from meshwright.executors.data_parallel import local
from meshwright.executors.recompute import unkept_product
from meshwright.profiler.skeleton import find_matrices

_Waiting = tuple[nn.Parameter, Tensor, Tensor, bool]  # weight, input, gradient of the output, transposed


class WeightGradients:
    """Of one stage's ``blocks``, whose matrices are changed in place; ``put_off`` says whether the coming backward is.

    Matrices that tensor parallelism has split ask for it themselves (``tp_modules``). ``recomputed`` blocks will run
    again as a whole.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, tensor_parallel: bool, recomputed: bool) -> None:
        self.put_off = False
        self._recomputed = recomputed
        self._waiting: deque[_Waiting] = deque()
        for block in blocks:
            if tensor_parallel:
                for module in block.modules():
                    if hasattr(module, "tensor_parallel"):
                        object.__setattr__(module, "weight_gradients", self)
            else:
                for name, matrix in find_matrices(block).items():
                    module = block.get_submodule(name)
                    module.forward = partial(self.product, module, transposed=matrix.transposed)

    def product(
        self, module: nn.Module, x: Tensor, *, transposed: bool, with_bias: bool = True, kept: bool = True
    ) -> Tensor:
        """``x @ weight.T + bias`` or, ``transposed``, ``x @ weight + bias``: ``[..., inputs]`` to ``[..., outputs]``.

        Without ``with_bias`` the product alone; without ``kept`` it is ``recompute.unkept_product``.
        """
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None) if with_bias else None
        matrix = weight.t() if transposed else weight
        compute = functional.linear if kept else unkept_product
        if not (torch.is_grad_enabled() and x.requires_grad):
            return compute(x, matrix, *([bias] if with_bias else []))
        use = _Use(self, module._parameters["weight"], transposed)
        if self._recomputed:
            x = _Input.apply(x, matrix.detach(), use)
        product: Tensor = _Product.apply(x, matrix.detach(), bias, use, compute)
        return product

    def note(self, weight: nn.Parameter, x: Tensor, grad: Tensor, transposed: bool) -> None:
        """Work out one use's gradient, or keep what it takes."""
        if self.put_off:
            self._waiting.append((weight, x, grad, transposed))
        else:
            _add_gradient(weight, x, grad, transposed)

    def take(self) -> Callable[[], None]:
        """The second part of the backward that has just run."""
        waiting, self._waiting = self._waiting, deque()
        return partial(_work_off, waiting)


class _Use:
    """One use of a matrix in a forward, through to its backward."""

    def __init__(self, owner: WeightGradients, weight: Any, transposed: bool) -> None:
        self.owner, self.weight, self.transposed = owner, weight, transposed
        self.saved: Any = None  # the context that has input and matrix, if not the product's own


class _Input(torch.autograd.Function):
    """Saves what backward takes ahead of the product, as torch's operators do: full recompute stops there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, use: _Use) -> Tensor:
        ctx.save_for_backward(x, matrix)
        use.saved = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, use: _Use, compute: Callable[..., Tensor]
    ) -> Tensor:
        ctx.use = use
        if use.saved is None:
            ctx.save_for_backward(x, matrix)
        return compute(x, matrix) if bias is None else compute(x, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None, None, None]:
        (grad,), use = grads, ctx.use
        x, matrix = (use.saved or ctx).saved_tensors
        use.owner.note(use.weight, x.detach(), grad, use.transposed)
        to_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad @ matrix, None, to_bias, None, None


@torch.no_grad()
def _work_off(waiting: deque[_Waiting]) -> None:
    while waiting:
        _add_gradient(*waiting.popleft())


def _add_gradient(weight: nn.Parameter, x: Tensor, grad: Tensor, transposed: bool) -> None:
    rows, columns = (x, grad) if transposed else (grad, x)
    found = rows.flatten(0, -2).t() @ columns.flatten(0, -2)
    if weight.grad is not None:
        local(weight.grad).add_(found)
    elif isinstance(weight, DTensor):
        weight.grad = DTensor.from_local(
            found, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
    else:
        weight.grad = found
