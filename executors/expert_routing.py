"""What routers do, counted; the loss that spreads tokens over experts; groups of tokens under a capacity.

The auxiliary loss of one layer and one micro-batch is ``coef * E * sum_e f_e * P_e``: ``f_e`` the tokens that chose
expert ``e``, among their ``k``, over the number of tokens, and ``P_e`` the mean of the softmax of the logits (Fedus et
al. 2021, arXiv 2101.03961, equations 4 to 6; with ``k`` choices as Hugging Face's ``load_balancing_loss_func``). ``f``
is of all ranks that share the micro-batch's tokens and has no gradient. The loss is added up over layers and averaged
over the micro-batches of all data ranks. Nothing is added to the pipeline's loss: the router's weights pass through a
function whose backward gives the logits their gradient (as Megatron-LM's ``MoEAuxLossAutoScaler`` does), so it works on
every stage, under every schedule, and once under recompute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright import InputError
from meshwright.cost_models.strategy import ParallelConfig
from meshwright.executors.expert_dispatch import count_choices
from meshwright.executors.tp_collectives import all_reduce_sum
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.record import record


@record
class Auxiliary:
    """How the auxiliary loss is worked out on this rank.

    ``num_microbatches``: of a step, over all data ranks. ``groups``: those over which a micro-batch's tokens are
    shared, which together have ``num_shards`` ranks; ranks that have the same tokens have whole gradients each.
    ``across_layers``: Hugging Face's formula, ``f`` and ``P`` of all layers together.
    """

    coefficient: float
    num_microbatches: int
    groups: tuple[dist.ProcessGroup, ...]
    num_shards: int
    across_layers: bool


class AllLayers:
    """``f`` of all layers of a model together: complete once its forward is, which is before it has a backward."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start a step."""
        self._chosen: Tensor | None = None
        self._num_rows = 0

    def add(self, chosen: Tensor, num_tokens: int) -> None:
        """One layer's choices of each expert, ``[experts]``, and its tokens, of all ranks."""
        self._chosen = _added(self._chosen, chosen)
        self._num_rows += num_tokens

    def slope(self, scale: float) -> Tensor:
        """The loss' derivative by the sums of probabilities of any layer, ``[experts]``."""
        assert self._chosen is not None
        return self._chosen * (scale / self._num_rows**2)


class Routing:
    """Watches one router: what it chose since ``begin_step``, on this rank; and gives it the auxiliary loss."""

    def __init__(self, router: nn.Module, num_experts: int, auxiliary: Auxiliary | None, layers: AllLayers) -> None:
        self.num_experts = num_experts
        self._auxiliary = auxiliary
        self._layers = layers
        self.begin_step()
        router.register_forward_hook(self._observe)

    def begin_step(self) -> None:
        """Forget what was chosen and kept in the step before."""
        self.load: Tensor | None = None  # choices, [experts]
        self.kept: Tensor | None = None  # of them, those that were not dropped
        self._losses: list[Callable[[], Tensor]] = []

    def loss(self) -> float | Tensor:
        """This rank's part of the layer's auxiliary loss."""
        return sum(loss() for loss in self._losses)

    def note_kept(self, index: Tensor) -> None:
        """The choices that the experts are given."""
        if not _in_backward():
            self.kept = _added(self.kept, count_choices(index, self.num_experts))

    def _observe(self, router: nn.Module, given: object, output: Any) -> Any:
        if not isinstance(output, tuple) or len(output) != 3:
            raise InputError(
                f"the router {type(router).__name__} returns {type(output).__name__}: expected logits, weights, choices"
            )
        logits, weights, index = output
        chosen = count_choices(index, self.num_experts)
        if not _in_backward():
            self.load = _added(self.load, chosen)
        if self._auxiliary is None or not logits.requires_grad:
            return output
        return logits, self._with_loss(self._auxiliary, logits.reshape(-1, self.num_experts), weights, chosen), index

    def _with_loss(self, auxiliary: Auxiliary, logits: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        num_tokens = logits.shape[0] * auxiliary.num_shards
        summed = (logits if logits.dtype is torch.float64 else logits.float()).softmax(-1).sum(0)
        chosen = chosen.to(summed.dtype)
        for group in auxiliary.groups:
            chosen = all_reduce_sum(chosen, group)
        scale = auxiliary.coefficient * self.num_experts / auxiliary.num_microbatches
        if auxiliary.across_layers:
            slope = partial(self._layers.slope, scale)
        else:
            slope = partial(torch.mul, chosen, scale / num_tokens**2)
        if not _in_backward():
            if auxiliary.across_layers:
                self._layers.add(chosen, num_tokens)
            self._losses.append(partial(_product, slope, summed.detach()))
        passed: Tensor = _Auxiliary.apply(weights, summed, slope)
        return passed


class _Auxiliary(torch.autograd.Function):
    """Passes the router's weights; in backward gives the probabilities' sums ``[experts]`` their gradient."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, summed: Tensor, slope: Callable[[], Tensor]) -> Tensor:
        ctx.slope = slope
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.slope(), None


def _product(slope: Callable[[], Tensor], summed: Tensor) -> Tensor:
    return (slope() * summed).sum()


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _in_backward() -> bool:
    """Whether a forward is a recomputation, which autograd runs inside of its backward: it is not counted again."""
    return torch._C._current_graph_task_id() != -1


def check_token_groups(moe: MoeLayer, config: ParallelConfig, seq_len: int) -> None:
    """Refuse a config that would cut a group of tokens, whose capacity is its own, over ranks.

    A rank has ``seq_len / cp`` tokens of a sequence (``/ tp`` with sequence parallelism), with ring attention from two
    places of it.
    """
    group = moe.group_tokens
    if not group:
        return
    shards = config.cp * (config.tp if config.sequence_parallel else 1)
    runs = {seq_len // shards}
    if config.cp_ring > 1:
        runs.add(seq_len // (2 * config.cp_ring))
    broken = [run for run in sorted(runs) if run % group]
    if broken:
        raise InputError(
            f"a group of {group} neighbouring tokens shares the experts' capacity and must lie on one rank, but cp="
            f"{config.cp} (cp_ring={config.cp_ring}), tp={config.tp} and sequence_parallel={config.sequence_parallel} "
            f"cut {seq_len} tokens into runs of {broken[0]}: choose degrees for which {group} divides it"
        )
