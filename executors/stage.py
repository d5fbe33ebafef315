"""Cut one piece out of a model: some decoder blocks, with the embedding if it is the first, the head if the last.

The piece is the whole model's own skeleton (same forward, same dotted names and indices) in which what it does not own
has become a stand-in without parameters, so that masks, positions and rotary tables are made by the model itself:

* the block before the first owned one hands over the hidden states that came from the previous stage;
* the block after the last owned one takes the hidden states that go to the next stage;
* all others, the norm and the head included, return what they are given;
* the token table returns zeros of the right shape (they take no memory) for the skeleton to carry to the first block.

Hidden states so enter and leave between blocks, never as a view of something larger, which torch's pipeline refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.executors.loss import LossFunction
from meshwright.planner.plan import StagePlan
from meshwright.profiler.anatomy import Anatomy


class PassThrough(nn.Module):
    """Stands for a module of another stage: returns its first floating tensor, or a zero where it is given none."""

    def __init__(self, *, in_tuple: bool = False) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        self.seen: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first floating tensor among the arguments, kept in ``seen`` too."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.seen = next((value for value in given if value.is_floating_point()), None)
        return self._wrapped(torch.zeros(()) if self.seen is None else self.seen)

    def _wrapped(self, hidden: Tensor) -> Any:
        return (hidden,) if self.in_tuple else hidden


class Handover(PassThrough):
    """Stands for the block before a stage's first: returns ``hidden``, which the previous stage sent."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states received."""
        assert self.hidden is not None
        hidden, self.hidden = self.hidden, None
        return self._wrapped(hidden)


class BlankTable(nn.Module):
    """Stands for the token table on later stages: zeros ``[batch, sequence, hidden]`` that take no memory."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden, self.dtype = hidden, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Zeros of the shape that an embedding of ``tokens`` has."""
        return torch.zeros((), dtype=self.dtype, device=tokens.device).expand(*tokens.shape, self.hidden)


class StageModule(nn.Module):
    """One stage, called with this micro-batch's tokens and targets, and with the hidden states received, if any.

    Returns the hidden states for the next stage, or on the last stage the micro-batch's share of the global mean loss:
    its sum over ``global_count``. ``loss_sum`` and ``count`` add up what ``loss_fn`` returned.
    """

    def __init__(self, model: nn.Module, blocks: dict[int, nn.Module], loss_fn: LossFunction | None) -> None:
        super().__init__()
        self.model = model
        self.blocks = blocks  # by index in the whole model; a plain dict, so that no name is registered twice
        self.loss_fn = loss_fn  # None on all stages but the last
        self.source: Handover | None = None
        self.sink: PassThrough | None = None
        self.begin_step(1)

    def begin_step(self, global_count: Tensor | int) -> None:
        """Start a step in which ``global_count`` targets count, over all micro-batches of all data ranks."""
        self.global_count = global_count
        self.loss_sum: Tensor | float = 0.0
        self.count: Tensor | float = 0.0

    def forward(self, *hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """Run the stage on one micro-batch: ``tokens`` and ``targets`` are ``[micro_batch_size, sequence]``."""
        if self.source is not None:
            (self.source.hidden,) = hidden
        output = self.model(tokens)
        if self.sink is not None:
            leaving, self.sink.seen = self.sink.seen, None
            assert leaving is not None
            return leaving.clone() if leaving._is_view() else leaving
        assert self.loss_fn is not None
        total, count = self.loss_fn(logits_of(output), targets)
        self.loss_sum = self.loss_sum + total.detach()
        self.count = self.count + count
        return total / self.global_count


def logits_of(output: Any) -> Any:
    """The logits in what a model returns: itself, its ``logits``, or the first of a tuple."""
    if isinstance(output, tuple):
        return output[0]
    return getattr(output, "logits", output)


def whole_stage(model: nn.Module, anatomy: Anatomy, loss_fn: LossFunction) -> StageModule:
    """The whole model as the only stage, in place."""
    blocks = dict(enumerate(_block_list(model, anatomy)))
    return StageModule(model, blocks, loss_fn)


def cut_stage(
    model: nn.Module, anatomy: Anatomy, stage: StagePlan, loss_fn: LossFunction, order: Execution
) -> StageModule:
    """The piece of ``model`` that ``stage`` names, sharing its parameters with ``model``, which is left as it was."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    skeleton: nn.Module = copy.deepcopy(model, shared)  # type: ignore[arg-type]
    blocks = _block_list(skeleton, anatomy)
    is_first, is_last = stage.first_layer == 0, stage.last_layer == anatomy.num_blocks
    table = skeleton.get_submodule(anatomy.token_embedding)
    dtype = next(weight.dtype for weight in blocks.parameters() if weight.is_floating_point())
    for index in range(anatomy.num_blocks):
        if not stage.first_layer <= index < stage.last_layer:
            blocks[index] = PassThrough(in_tuple=order.block_returns_tuple)
    piece = StageModule(skeleton, {}, loss_fn if is_last else None)
    if not is_first:
        assert isinstance(table.weight, Tensor)
        width = table.weight.shape[-1]
        skeleton.set_submodule(anatomy.token_embedding, BlankTable(width, dtype))
        for name in order.before:
            skeleton.set_submodule(name, PassThrough())
        piece.source = Handover(in_tuple=order.block_returns_tuple)
        blocks[stage.first_layer - 1] = piece.source
    if not is_last:
        for name in (*order.after, anatomy.head):
            skeleton.set_submodule(name, PassThrough())
        sink = blocks[stage.last_layer]
        assert isinstance(sink, PassThrough)
        piece.sink = sink
    piece.blocks = {index: blocks[index] for index in range(stage.first_layer, stage.last_layer)}
    return piece


class Execution:
    """Which parts with parameters of their own a model runs ``before`` and ``after`` its blocks, by name.

    Found by running the model once on two tokens with all blocks but the first passed over; the order in which modules
    are registered does not tell (OPT registers its final norm before its blocks).
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.before: list[str] = []
        self.after: list[str] = []
        self.block_returns_tuple = False
        blocks = _block_list(model, anatomy)
        started = False

        def enter_block(module: nn.Module, args: Any) -> None:
            nonlocal started
            started = True

        def leave_block(module: nn.Module, args: Any, output: Any) -> None:
            self.block_returns_tuple = isinstance(output, tuple)
            for other in blocks[1:]:
                assert isinstance(other, PassThrough)
                other.in_tuple = self.block_returns_tuple

        def note(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, args: (self.after if started else self.before).append(name)

        with _first_block_only(blocks), _evaluating(model), torch.no_grad():
            hooks = [
                blocks[0].register_forward_pre_hook(enter_block),
                blocks[0].register_forward_hook(leave_block),
            ]
            for name, module in model.named_modules():
                outside = name != anatomy.blocks and not name.startswith(anatomy.blocks + ".")
                own = any(True for _ in module.parameters(recurse=False))
                if outside and own and name not in (anatomy.token_embedding, anatomy.head):
                    hooks.append(module.register_forward_pre_hook(note(name)))
            table = model.get_submodule(anatomy.token_embedding)
            device = next(table.parameters()).device
            try:
                model(torch.zeros((1, 2), dtype=torch.int64, device=device))
            finally:
                for hook in hooks:
                    hook.remove()


def _block_list(model: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@contextmanager
def _first_block_only(blocks: nn.ModuleList) -> Iterator[None]:
    kept = list(blocks)
    for index in range(1, len(kept)):
        blocks[index] = PassThrough()
    try:
        yield
    finally:
        for index, block in enumerate(kept):
            blocks[index] = block


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
