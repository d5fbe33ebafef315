"""A layer of experts of a spec: router, stacked experts in the layout of Hugging Face's models, a shared expert.

Every router is softmax over all experts, the ``top_k`` largest, weights that sum to 1: what other routers do instead
(sigmoids, groups of experts, correction biases) costs as little and is not told by a spec.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright import InputError
from meshwright.executors.spec_parts import Mlp, activate
from meshwright.profiler.layers import MlpLayer, MoeLayer


class Router(nn.Module):
    """Tokens ``[tokens, hidden]`` to logits ``[tokens, experts]``, weights and chosen experts ``[tokens, k]``."""

    def __init__(self, layer: MoeLayer, *, bias: bool) -> None:
        super().__init__()
        self.top_k = layer.top_k
        self.weight = nn.Parameter(torch.empty(layer.num_experts, layer.hidden))
        self.bias = nn.Parameter(torch.zeros(layer.num_experts)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax over all experts, in float32; of it the largest, and their shares of what they sum to."""
        logits = functional.linear(x, self.weight, self.bias)
        weights, index = logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return logits, (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype), index


class Experts(nn.Module):
    """All routed experts, stacked: gate and up ``[experts, 2 * ffn, hidden]``, down ``[experts, hidden, ffn]``."""

    def __init__(self, layer: MoeLayer, *, bias: bool) -> None:
        super().__init__()
        experts, hidden, width = layer.num_experts, layer.hidden, layer.expert_ffn_size
        self.up = "gate_up_proj" if layer.gated else "up_proj"
        rows = width * (2 if layer.gated else 1)
        self.register_parameter(self.up, nn.Parameter(torch.empty(experts, rows, hidden)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        if bias:
            self.register_parameter(f"{self.up}_bias", nn.Parameter(torch.zeros(experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.act_fn = partial(activate, name=layer.activation)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Each token ``[tokens, hidden]`` through the experts it chose, one expert at a time, added up by weight."""
        up, up_bias = getattr(self, self.up), getattr(self, f"{self.up}_bias", None)
        down_bias = getattr(self, "down_proj_bias", None)
        out = torch.zeros_like(x)
        for expert in range(up.shape[0]):
            token, choice = torch.where(index == expert)
            inner = functional.linear(x[token], up[expert], None if up_bias is None else up_bias[expert])
            if self.up == "gate_up_proj":
                gate, inner = inner.chunk(2, dim=-1)
                inner = self.act_fn(gate) * inner
            else:
                inner = self.act_fn(inner)
            found = functional.linear(inner, self.down_proj[expert], None if down_bias is None else down_bias[expert])
            out = out.index_add(0, token, found * weights[token, choice, None])
        return out


class Moe(nn.Module):
    """Routed experts beside the shared ones.

    Raises ``InputError`` for a capacity, or parameters that nothing explains.
    """

    def __init__(self, layer: MoeLayer) -> None:
        super().__init__()
        if layer.capacity_factor:
            raise InputError("experts with a capacity are not built from a spec: give the model itself")
        hidden, shared, extra = layer.hidden, layer.shared_ffn_size, layer.extra_params
        expert_biases = layer.num_experts * (layer.expert_ffn_size * (2 if layer.gated else 1) + hidden + 1)
        shared_biases = shared * (2 if layer.gated else 1) + hidden
        gated = shared > 0 and extra == hidden  # a gate on the shared expert (Qwen2-MoE)
        if not (extra == 0 or gated or extra == expert_biases or (shared and extra == shared_biases)):
            raise InputError(
                f"{extra:,} extra parameters of a layer of experts are not explained: give the model itself"
            )
        self.router = Router(layer, bias=extra == expert_biases)
        self.experts = Experts(layer, bias=extra == expert_biases)
        self.shared = self.shared_gate = None
        if shared:
            mlp = MlpLayer(
                hidden=hidden,
                ffn_size=shared,
                gated=layer.gated,
                bias=not gated and extra == shared_biases,
                activation=layer.activation,
            )
            self.shared = Mlp(mlp)
        if gated:
            self.shared_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, sequence, hidden]`` in and out."""
        tokens = x.flatten(0, 1)
        _, weights, index = self.router(tokens)
        out: Tensor = self.experts(tokens, index, weights).view_as(x)
        if self.shared is None:
            return out
        beside: Tensor = self.shared(x)
        if self.shared_gate is not None:
            beside = self.shared_gate(x).sigmoid() * beside
        return out + beside
