"""A small Llama in plain torch: the example model of the demo and of the tests. Nothing in it knows of Meshwright."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    vocab_size: int = 256
    hidden: int = 64
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 176
    max_seq_len: int = 256
    tied: bool = False
    causal: bool = True


class RMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


def rotate(x: Tensor, position_ids: Tensor | None) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on ``[batch, heads, sequence, head_dim]``."""
    sequence, head_dim = x.shape[-2], x.shape[-1]
    if position_ids is None:
        position_ids = torch.arange(sequence, device=x.device)
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim)
    angles = position_ids.flatten()[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden // config.num_heads
        self.causal = config.causal
        self.q_proj = nn.Linear(config.hidden, config.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor | None) -> Tensor:
        batch, sequence, _ = x.shape
        q, k, v = (
            projection(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, position_ids), rotate(k, position_ids)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, sequence, -1))


class Mlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden)
        self.mlp = mlp

    def forward(self, x: Tensor, position_ids: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), position_ids)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Tokens ``[batch, sequence]`` to logits ``[batch, sequence, vocab_size]``.

    ``position_ids`` ``[1, sequence]`` say where tokens stand, where they are not a whole sequence in order.
    """

    def __init__(self, config: LlamaConfig, make_mlp: Callable[[Any], nn.Module] = Mlp) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(Block(config, make_mlp(config)) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, position_ids)
        return self.head(self.norm(x))
