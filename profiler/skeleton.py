"""A model that runs without its weights: matrices cost nothing, so the flow of data can be watched at any size.

The skeleton of a model is a copy in float64 on the CPU whose token and position tables hold one row repeated without
storage, whose vectors (norms, biases) are random, and whose matrices stay on the meta device: who runs the skeleton
gives each matrix a stand-in, or passes over the blocks that hold them. It costs a few milliseconds for models of any
size and works for models on the meta device too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meshwright import InputError
from meshwright.profiler.record import record

BATCH, SEQUENCE = 2, 6  # tokens of a trial run: enough for attention to mix, few enough to cost nothing


@record
class Matrix:
    """A module that computes ``x @ weight.T + bias``, or ``x @ weight + bias`` where ``transposed``."""

    inputs: int
    outputs: int
    transposed: bool

    @property
    def output_dim(self) -> int:
        """The weight's dimension that counts outputs."""
        return 1 if self.transposed else 0


def find_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every module that is a matrix with an optional bias, by dotted name; embeddings are not.

    ``nn.Linear`` is known. Any other class with a two-dimensional ``weight`` (GPT-2's ``Conv1D``) is settled by running
    a shrunken instance and comparing with both products; a class that is neither is left out.
    """
    found: dict[str, Matrix] = {}
    unknown: dict[type[nn.Module], list[str]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        weights = dict(module.named_parameters(recurse=False))
        weight = weights.pop("weight", None)
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding) or not set(weights) <= {"bias"}:
            continue
        if type(module).forward is nn.Linear.forward:
            found[name] = Matrix(inputs=weight.shape[1], outputs=weight.shape[0], transposed=False)
        else:
            unknown.setdefault(type(module), []).append(name)
    for names in unknown.values():
        oblong = [name for name in names if _shape(modules[name])[0] != _shape(modules[name])[1]]
        with torch.device("cpu"):  # whatever the caller's default
            transposed = _is_transposed(modules[oblong[0]]) if oblong else None
        if transposed is None:
            continue
        for name in names:
            first, second = _shape(modules[name])
            inputs, outputs = (first, second) if transposed else (second, first)
            found[name] = Matrix(inputs=inputs, outputs=outputs, transposed=transposed)
    return {name: found[name] for name in modules if name in found}


def find_experts(model: nn.Module) -> dict[str, int]:
    """Modules of stacked experts, by dotted name, with their number of experts.

    Such a module holds a weight ``[num_experts, ...]`` of three dimensions; whatever else it holds (biases) is stacked
    in the same way.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        weights = dict(module.named_parameters(recurse=False))
        stacked = [weight.shape[0] for weight in weights.values() if weight.dim() == 3]
        if stacked and all(weight.dim() > 1 and weight.shape[0] == stacked[0] for weight in weights.values()):
            found[name] = stacked[0]
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.get_parameter("weight")
    return weight.shape[0], weight.shape[1]


def _is_transposed(module: nn.Module) -> bool | None:
    """Whether a 6x4 copy of ``module`` computes ``x @ weight + bias`` (True), ``x @ weight.T + bias`` or neither."""
    rows, columns = _shape(module)
    small: dict[int, Any] = {}
    for parameter in module.parameters():
        shape = [6 if size == rows else 4 if size == columns else size for size in parameter.shape]
        small[id(parameter)] = nn.Parameter(torch.rand(shape, dtype=torch.float64), requires_grad=False)
    trial = copy.deepcopy(module, small)
    for name, value in list(vars(trial).items()):
        if type(value) is int and value in (rows, columns):
            setattr(trial, name, 6 if value == rows else 4)
    weight, bias = trial.get_parameter("weight"), getattr(trial, "bias", None)
    if weight.shape != (6, 4):
        return None
    for transposed, matrix in ((True, weight), (False, weight.T)):
        x = torch.rand(2, 3, matrix.shape[0], dtype=torch.float64)
        expected = x @ matrix + (bias if bias is not None and bias.shape[0] == matrix.shape[1] else 0.0)
        try:
            output = trial(x)
        except (RuntimeError, ValueError, TypeError, IndexError):  # the other orientation, or called otherwise
            continue
        if isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected):
            return transposed
    return None


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of ``model`` as the module docstring says; the model itself is not touched. In evaluation mode."""
    stand_ins: dict[int, Any] = {}
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5

    for parameter in model.parameters():
        if id(parameter) in tables:
            value = random(1, parameter.shape[1]).expand(parameter.shape)
        elif parameter.dim() <= 1:
            value = random(*parameter.shape)
        else:
            value = torch.empty(parameter.shape, dtype=torch.float64, device="meta")
        stand_ins[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for buffer in model.buffers():
        # a buffer's values do not matter for where data flows, only that all runs see the same
        if buffer.device.type != "meta":
            value = buffer.detach().cpu().clone()
        elif buffer.is_floating_point():
            value = random(*buffer.shape).to(buffer.dtype)
        else:
            value = torch.ones(buffer.shape, dtype=buffer.dtype)
        stand_ins[id(buffer)] = value
    return copy.deepcopy(model, stand_ins).eval()


def stand_in(module: nn.Module, function: Callable[..., Any]) -> None:
    """Let ``function`` answer when ``module`` is called; hooks still run."""
    object.__setattr__(module, "forward", function)


def hollow(model: nn.Module, blocks_name: str) -> nn.Module:
    """A skeleton whose blocks answer with the hidden states they were given and whose other matrices with ones.

    Blocks answer in a tuple while the skeleton's ``blocks_in_tuple`` is true.
    """
    copied = skeleton(model)
    config: Any = getattr(copied, "config", None)
    if getattr(config, "use_cache", False):  # keys of one run would be there in the next
        config.use_cache = False
    copied.blocks_in_tuple = False  # type: ignore[assignment]

    def hidden_states(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        return (hidden,) if copied.blocks_in_tuple else hidden

    for block in copied.get_submodule(blocks_name).children():
        stand_in(block, hidden_states)
    for name, matrix in find_matrices(model).items():
        if not name.startswith(blocks_name + "."):
            stand_in(copied.get_submodule(name), partial(_ones, outputs=matrix.outputs))
    return copied


def call_with_tokens(hollow_model: nn.Module) -> None:
    """Run a hollow model on ``[BATCH, SEQUENCE]`` token ids, without a key-value cache or routers' logits.

    Blocks that return a tuple are noticed by the failure of a run in which they do not; it is then run again.
    Raises ``InputError`` when the model does not run on token ids alone.
    """
    taken = inspect.signature(hollow_model.forward).parameters
    options = {name: False for name in ("use_cache", "output_router_logits") if name in taken}
    tokens = (torch.arange(BATCH * SEQUENCE) % 3 + 3).view(BATCH, SEQUENCE)  # clear of special tokens 0, 1 and 2
    failures = []
    for in_tuple in (False, True):
        hollow_model.blocks_in_tuple = in_tuple  # type: ignore[assignment]
        try:
            hollow_model(tokens, **options)
            return
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            failures.append(error)
    raise InputError(f"{type(hollow_model).__name__} does not run on token ids alone: {failures[0]}") from failures[0]


def _ones(x: Tensor, outputs: int) -> Tensor:
    return x.new_ones(*x.shape[:-1], outputs)
