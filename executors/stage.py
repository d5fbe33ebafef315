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
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.executors.loss import LossFunction
from meshwright.planner.plan import StagePlan
from meshwright.profiler.anatomy import Anatomy


class PassThrough(nn.Module):
    """Stands for a module of another stage: returns the hidden states it is given, its first floating tensor."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return next(value for value in given if value.is_floating_point())


class Takeover(PassThrough):
    """Stands for the block after a stage's last: keeps in ``hidden`` what goes to the next stage.

    The skeleton goes on with zeros that are as long as the whole sequence, of which ``hidden`` may be a rank's shard.
    """

    hidden: Tensor | None = None
    sequence: int = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros in place of the hidden states, which are kept."""
        self.hidden = super().forward(*args, **kwargs)
        return self.hidden.new_zeros(()).expand(self.hidden.shape[0], self.sequence, self.hidden.shape[-1])


class NoPositions(nn.Module):
    """Stands for a learned table of positions on later stages, where the hidden states have them already."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """A zero to add."""
        return torch.zeros(())


class Handover(nn.Module):
    """Stands for the block before a stage's first: returns ``hidden``, which the previous stage sent."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states received."""
        assert self.hidden is not None
        hidden, self.hidden = self.hidden, None
        return hidden


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
        self.sink: Takeover | None = None
        self.begin_step(1)

    def begin_step(self, global_count: Tensor | int, positions: Tensor | None = None) -> None:
        """Start a step in which ``global_count`` targets count, over all micro-batches of all data ranks.

        ``positions`` ``[sequence]`` say where the tokens stand in the sequence, if they are a part of it.
        """
        self.global_count = global_count
        self.given = {} if positions is None else {"position_ids": positions[None]}
        self.loss_sum: Tensor | float = 0.0
        self.count: Tensor | float = 0.0

    def forward(self, *hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """Run the stage on one micro-batch: ``tokens`` and ``targets`` are ``[micro_batch_size, sequence]``."""
        if self.source is not None:
            (self.source.hidden,) = hidden
        if self.sink is not None:
            self.sink.sequence = tokens.shape[1]
        output = self.model(tokens, **self.given)
        if self.sink is not None:
            leaving, self.sink.hidden = self.sink.hidden, None
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
    model: nn.Module, anatomy: Anatomy, stage: StagePlan, loss_fn: LossFunction, dtype: torch.dtype
) -> StageModule:
    """The piece of ``model`` that ``stage`` names, sharing its parameters with ``model``, which is left as it was.

    A head that is tied to an embedding on another stage becomes a copy: in a V one rank holds both, which are split and
    sharded each by itself. ``dtype`` is that of the hidden states between stages.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    skeleton: nn.Module = copy.deepcopy(model, shared)
    blocks = _block_list(skeleton, anatomy)
    is_first, is_last = stage.first_layer == 0, stage.last_layer == anatomy.num_blocks
    table = skeleton.get_submodule(anatomy.token_embedding)
    for index in range(anatomy.num_blocks):
        if not stage.first_layer <= index < stage.last_layer:
            blocks[index] = PassThrough()
    piece = StageModule(skeleton, {}, loss_fn if is_last else None)
    if not is_first:
        assert isinstance(table.weight, Tensor)
        width = table.weight.shape[-1]
        skeleton.set_submodule(anatomy.token_embedding, BlankTable(width, dtype))
        for name in anatomy.before:
            is_table = isinstance(skeleton.get_submodule(name), nn.Embedding)
            skeleton.set_submodule(name, NoPositions() if is_table else PassThrough())
        piece.source = Handover()
        blocks[stage.first_layer - 1] = piece.source
    if not is_last:
        for name in (*anatomy.after, anatomy.head):
            skeleton.set_submodule(name, PassThrough())
        piece.sink = Takeover()
        blocks[stage.last_layer] = piece.sink
    elif anatomy.tied and not is_first:
        head = skeleton.get_submodule(anatomy.head)
        assert isinstance(head.weight, Tensor)
        head.register_parameter("weight", nn.Parameter(head.weight.detach().clone()))
    piece.blocks = {index: blocks[index] for index in range(stage.first_layer, stage.last_layer)}
    return piece


def _block_list(model: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks
