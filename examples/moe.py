"""A small mixture of experts in plain torch: the example model with experts. Nothing in it knows of Meshwright.

Attention and norms are those of ``llama.py``. Each block has a router and stacked experts (their parameters are
``[experts, ...]``, they are called as those of transformers 5), and may have a shared expert, which all tokens take.

With a ``capacity_factor`` an expert takes at most ``ceil(capacity_factor * group_tokens * top_k / num_experts)``
choices of each group of ``group_tokens`` neighbouring tokens of one sequence: all first choices before all second
choices, among them the earlier token first (as in GShard, arXiv 2006.16668, section 2.2). What an expert has no room
for contributes nothing; the residual connection carries the token on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from llama import Llama, LlamaConfig, Mlp
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class MoeConfig(LlamaConfig):
    num_experts: int = 8
    top_k: int = 2
    expert_ffn_size: int = 64
    ffn_size: int = 0  # of the shared expert; 0: none
    capacity_factor: float = 0.0  # 0: nothing is dropped
    group_tokens: int = 0
    router_aux_loss_coef: float = 0.0

    @property
    def capacity(self) -> int:
        """How many choices an expert takes of a group."""
        return math.ceil(self.capacity_factor * self.group_tokens * self.top_k / self.num_experts)


class Router(nn.Module):
    """Tokens ``[tokens, hidden]`` to logits ``[tokens, experts]``, chosen weights and experts ``[tokens, k]``."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x, self.weight)
        weights, index = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), index


class Experts(nn.Module):
    """Adds up each token's chosen experts by their weights; a choice equal to the number of experts is nobody's."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        width = config.expert_ffn_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, config.hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden, width))
        self.act_fn = functional.silu

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.gate_up_proj.shape[0]):
            token, choice = torch.where(index == expert)
            gate, up = functional.linear(x[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            found = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out = out.index_add(0, token, found * weights[token, choice, None])
        return out


class MoeMlp(nn.Module):
    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = Mlp(config) if config.ffn_size else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        _, weights, index = self.router(tokens)
        if self.config.capacity_factor:
            index = drop(index.view(*x.shape[:2], -1), self.config).flatten(0, 1)
        out = self.experts(tokens, index, weights).view_as(x)
        return out if self.shared is None else out + self.shared(x)


def drop(index: Tensor, config: MoeConfig) -> Tensor:
    """Choices ``[batch, sequence, k]`` with those over an expert's capacity set to ``num_experts``."""
    batch, sequence, top_k = index.shape
    if sequence % config.group_tokens:
        raise ValueError(f"{sequence} tokens of a sequence are not whole groups of {config.group_tokens}")
    in_order = index.view(-1, config.group_tokens, top_k).transpose(1, 2).flatten(1)  # first choices first
    taken = functional.one_hot(in_order, config.num_experts).cumsum(1)
    place = taken.gather(2, in_order.unsqueeze(2)).squeeze(2)
    kept = in_order.masked_fill(place > config.capacity, config.num_experts)
    return kept.view(-1, top_k, config.group_tokens).transpose(1, 2).reshape(batch, sequence, top_k)


class Moe(Llama):
    """The example Llama with experts in every block."""

    config: MoeConfig

    def __init__(self, config: MoeConfig) -> None:
        super().__init__(config, MoeMlp)


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What the routers did with one batch: a row a layer."""

    load: Tensor  # [layers, experts]: tokens that chose an expert
    dropped: Tensor  # [layers]: choices that found no room
    auxiliary_loss: Tensor  # [layers], with its coefficient


def run_with_routing(model: Moe, tokens: Tensor) -> tuple[Tensor, Routed]:
    """Logits of one batch, and what its routers did; a training loss adds ``auxiliary_loss.sum()``.

    The auxiliary loss of a layer is ``coef * experts * sum_e f_e * P_e``: ``f_e`` the choices of expert ``e`` over the
    number of tokens, ``P_e`` the mean of its probability (Switch Transformer, arXiv 2101.03961, equations 4 to 6).
    """
    config, load, dropped, losses = model.config, [], [], []

    def count(index: Tensor) -> Tensor:
        return torch.bincount(index.flatten(), minlength=config.num_experts + 1)

    def after_router(router: nn.Module, given: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, index = output
        chosen = count(index)[: config.num_experts]
        share, probability = chosen / logits.shape[0], logits.softmax(dim=-1).mean(0)
        load.append(chosen)
        losses.append(config.router_aux_loss_coef * config.num_experts * (share * probability).sum())

    def before_experts(experts: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> None:
        dropped.append(count(given[1])[config.num_experts])

    hooks = []
    for part in model.modules():
        if isinstance(part, Router):
            hooks.append(part.register_forward_hook(after_router))
        elif isinstance(part, Experts):
            hooks.append(part.register_forward_pre_hook(before_experts))
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits, Routed(load=torch.stack(load), dropped=torch.stack(dropped), auxiliary_loss=torch.stack(losses))
