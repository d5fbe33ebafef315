"""Run one decoder block without its matrices, and see what is made from what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meshwright import InputError
from meshwright.profiler.record import record
from meshwright.profiler.skeleton import Matrix, stand_in

BoolArray = NDArray[np.bool_]


@record
class Call:
    """What a module was given and what it returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


@record
class Trace:
    """One run: what each matrix was given, in the order they ran, and the calls of the modules that hold them.

    Experts are among the ``inputs`` with their tokens; ``routed`` is all that they were given, weights of tokens too.
    """

    inputs: Mapping[str, Tensor]
    routed: Mapping[str, tuple[Tensor, ...]]
    calls: Mapping[str, Call]
    output: Any


class BlockRun:
    """A skeleton's block with the arguments its model gave it, run with stand-ins for the outputs of its matrices.

    ``outputs`` holds the stand-ins of the first run, leaves of the graph: positive, so that no rectifier hides a
    dependence. ``experts`` (modules of stacked experts) have stand-ins too; routers, which return more than a product,
    run with random weights. Names are relative to the block; ``name`` is the block's own, for messages.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        matrices: Mapping[str, Matrix],
        experts: Collection[str] = (),
    ) -> None:
        self.name = name
        self.block = block
        self.matrices = matrices
        self.experts = experts
        self.outputs: dict[str, Tensor] = {}
        self.read: set[tuple[str, str]] = set()
        self._given: Mapping[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._routed: dict[str, tuple[Tensor, ...]] = {}
        self._calls: dict[str, Call] = {}
        self._args, self._kwargs = list(call[0]), dict(call[1])
        self.hidden_argument = _hidden_argument(name, *call)
        self.hidden = self._argument(self.hidden_argument).detach().clone().requires_grad_()
        self.vectors = {key: value.requires_grad_() for key, value in block.named_parameters() if value.dim() <= 1}
        generator = torch.Generator().manual_seed(1)
        for key, matrix in matrices.items():
            stand_in(block.get_submodule(key), self._stand_in(key, matrix.outputs, generator))
        for key in experts:
            stand_in(block.get_submodule(key), self._experts(key, generator))
        for key, module in block.named_modules():
            if key not in matrices:
                _watch_reads(module, key, self.read)
                _fill_matrices(module, generator)
            if key and any(other.startswith(key + ".") for other in matrices):
                module.register_forward_hook(self._keep_call(key), with_kwargs=True)
        self.whole = self.run()

    def run(self, given: Mapping[str, Tensor] | None = None) -> Trace:
        """Run the block; matrices in ``given`` answer with that, the others as in the first run."""
        self._given, self._inputs, self._routed, self._calls = given or {}, {}, {}, {}
        args, kwargs = list(self._args), dict(self._kwargs)
        if isinstance(self.hidden_argument, int):
            args[self.hidden_argument] = self.hidden
        else:
            kwargs[self.hidden_argument] = self.hidden
        output = self.block(*args, **kwargs)
        return Trace(inputs=self._inputs, routed=self._routed, calls=self._calls, output=output)

    def made_from(self, x: Tensor, start: int, stop: int, names: Sequence[str]) -> list[BoolArray]:
        """For each named matrix, or vector, which of its outputs, or entries, ``x[..., start:stop]`` depends on."""
        part = x[..., start:stop]
        weights = torch.rand(part.shape, dtype=part.dtype, generator=torch.Generator().manual_seed(start)) + 0.5
        sources = [self.outputs[name] if name in self.outputs else self.vectors[name] for name in names]
        found = torch.autograd.grad((part * weights).sum(), sources, retain_graph=True)
        return [(gradient.reshape(-1, gradient.shape[-1]) != 0).any(0).numpy() for gradient in found]

    def affected_by(self, name: str, output: int, row: str) -> BoolArray:
        """Which inputs of ``row`` change when one output of the matrix ``name`` does."""
        changed = self.outputs[name].detach().clone()
        changed[..., output] += torch.rand(changed.shape[:-1], dtype=changed.dtype)
        with torch.no_grad():
            after = self.run({name: changed}).inputs[row]
        return (after != self.whole.inputs[row]).flatten(0, -2).any(0).numpy()

    def set_vector(self, name: str, value: Tensor) -> None:
        """Let the block use ``value`` for one of its vectors."""
        holder, _, key = name.rpartition(".")
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        self.block.get_submodule(holder)._parameters[key] = parameter

    def _argument(self, where: int | str) -> Any:
        return self._args[where] if isinstance(where, int) else self._kwargs[where]

    def _stand_in(self, name: str, width: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        def answer(x: Tensor) -> Tensor:
            if name in self._inputs:
                raise InputError(f"{self.name}.{name} is used twice in one forward: tensor parallelism cannot tell how")
            self._inputs[name] = x
            if name in self._given:
                return self._given[name]
            if name not in self.outputs:
                random = torch.rand(*x.shape[:-1], width, dtype=torch.float64, generator=generator) + 0.5
                self.outputs[name] = random.requires_grad_()
            return self.outputs[name].clone()  # a model may go on in place

        return answer

    def _experts(self, name: str, generator: torch.Generator) -> Callable[..., Tensor]:
        def answer(*args: Any, **kwargs: Any) -> Tensor:
            if name in self._inputs:
                raise InputError(f"{self.name}.{name} is used twice in one forward: tensor parallelism cannot tell how")
            given = tuple(value for value in tensors_in((args, kwargs)) if value.is_floating_point())
            x = next(value for value in given if value.shape[-1] == self.hidden.shape[-1])
            self._inputs[name], self._routed[name] = x, given
            if name not in self.outputs:
                random = torch.rand(x.shape, dtype=torch.float64, generator=generator) + 0.5
                self.outputs[name] = random.requires_grad_()
            return self.outputs[name].clone()

        return answer

    def _keep_call(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._calls[name] = Call(args=args, kwargs=kwargs, output=output)

        return keep


def depends(result: Any, sources: Sequence[Tensor]) -> list[bool]:
    """Which of ``sources`` the tensors in ``result`` are computed from."""
    reached = [False] * len(sources)
    for tensor in tensors_in(result):
        if tensor.requires_grad and sources:
            found = torch.autograd.grad(tensor.sum(), sources, retain_graph=True, allow_unused=True)
            reached = [before or gradient is not None for before, gradient in zip(reached, found, strict=True)]
    return reached


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def _hidden_argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for where, value in places:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
            return where
    raise InputError(f"{name} is given no hidden states [batch, sequence, hidden]: cannot see what it does with them")


def _fill_matrices(module: nn.Module, generator: torch.Generator) -> None:
    """Random values for two-dimensional weights, which the skeleton left without: a router's."""
    for key, weight in module.named_parameters(recurse=False):
        if weight.dim() == 2:
            value = torch.rand(weight.shape, dtype=torch.float64, generator=generator) + 0.5
            module._parameters[key] = nn.Parameter(value, requires_grad=False)


def _watch_reads(module: nn.Module, name: str, read: set[tuple[str, str]]) -> None:
    """Note in ``read`` every integer attribute that is looked up on ``module``."""
    base = type(module)

    def look_up(self: Any, attribute: str) -> Any:
        value = base.__getattribute__(self, attribute)
        if type(value) is int and not attribute.startswith("_"):
            read.add((name, attribute))
        return value

    module.__class__ = type(base.__name__, (base,), {"__getattribute__": look_up})
