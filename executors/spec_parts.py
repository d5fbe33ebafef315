"""Parts of the plain decoder that is built from a spec: norm, feed-forward layer, rotary positions, activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright import InputError
from meshwright.profiler.layers import MlpLayer

ROTARY_BASE = 10000.0
NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Written out, in float32 at least, as Hugging Face's models have it: a fused one keeps less for backward."""

    def __init__(self, hidden: int, *, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        """``weight * x / sqrt(mean(x^2))``."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype)
        return normed if self.weight is None else self.weight * normed


class Mlp(nn.Module):
    """A feed-forward layer, gated or not."""

    def __init__(self, layer: MlpLayer) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(layer.hidden, layer.ffn_size, bias=layer.bias) if layer.gated else None
        self.up_proj = nn.Linear(layer.hidden, layer.ffn_size, bias=layer.bias)
        self.down_proj = nn.Linear(layer.ffn_size, layer.hidden, bias=layer.bias)
        self.activation = layer.activation

    def forward(self, x: Tensor) -> Tensor:
        """Up, through the activation, and down."""
        up = self.up_proj(x)
        if self.gate_proj is None:
            inner = activate(up, self.activation)
        else:
            inner = activate(self.gate_proj(x), self.activation) * up
        out: Tensor = self.down_proj(inner)
        return out


def rotate(x: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on ``[batch, heads, sequence, head_dim]``."""
    sequence, head_dim = x.shape[-2], x.shape[-1]
    exponents = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim
    places = torch.arange(sequence, device=x.device) if position_ids is None else position_ids[0]
    angles = torch.outer(places.float(), ROTARY_BASE**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def activate(x: Tensor, name: str) -> Tensor:
    """The activation that a spec names. Raises ``InputError`` for one that is not known."""
    if name in ("silu", "swish"):
        return functional.silu(x)
    if name == "gelu_new":  # written out there too
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    if name.startswith("gelu"):
        return functional.gelu(x, approximate="none" if name == "gelu" else "tanh")
    if name == "relu":
        return functional.relu(x)
    raise InputError(f"activation {name!r} is not built from a spec: give the model itself")
