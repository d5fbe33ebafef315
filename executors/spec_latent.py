"""Latent attention of a spec (DeepSeek-V2, arXiv 2405.04434 section 2.1), as Hugging Face's DeepSeek-V3 computes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.executors.context_parallel import ContextParallel
from meshwright.executors.spec_parts import RMSNorm, rotate
from meshwright.profiler.layers import AttentionLayer


class LatentAttention(nn.Module):
    """Causal attention whose queries, keys and values are projected down, normed, and up again to each head.

    A head's key is ``head_dim`` wide without rotation, and ``rope_head_dim`` rotated, which all heads share.
    """

    context_parallel: ContextParallel | None = None  # the ranks that hold the rest of the sequence (attention_hooks)

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        self.head_dim, self.rope_head_dim, self.value_head_dim = (
            layer.head_dim,
            layer.rope_head_dim,
            layer.value_head_dim,
        )
        query_width = layer.num_heads * (layer.head_dim + layer.rope_head_dim)
        self.q_a_proj = nn.Linear(layer.hidden, layer.q_lora_rank, bias=layer.qkv_bias) if layer.q_lora_rank else None
        self.q_a_norm = RMSNorm(layer.q_lora_rank) if layer.q_lora_rank else None
        self.q_b_proj = nn.Linear(layer.q_lora_rank or layer.hidden, query_width, bias=False)
        self.kv_lora_rank = layer.kv_lora_rank
        self.kv_a_proj = nn.Linear(layer.hidden, layer.kv_lora_rank + layer.rope_head_dim, bias=layer.qkv_bias)
        self.kv_a_norm = RMSNorm(layer.kv_lora_rank)
        raised = layer.num_heads * (layer.head_dim + layer.value_head_dim)
        self.kv_b_proj = nn.Linear(layer.kv_lora_rank, raised, bias=False)
        self.o_proj = nn.Linear(layer.num_heads * layer.value_head_dim, layer.hidden, bias=layer.out_bias)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """``[batch, sequence, hidden]`` in and out."""
        batch, sequence, _ = x.shape
        down = x if self.q_a_proj is None or self.q_a_norm is None else self.q_a_norm(self.q_a_proj(x))
        q = self.q_b_proj(down).view(batch, sequence, -1, self.head_dim + self.rope_head_dim).transpose(1, 2)
        q_plain, q_rotated = q.split([self.head_dim, self.rope_head_dim], dim=-1)
        latent, k_shared = self.kv_a_proj(x).split([self.kv_lora_rank, self.rope_head_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_norm(latent))
        kv = kv.view(batch, sequence, -1, self.head_dim + self.value_head_dim).transpose(1, 2)
        k_plain, v = kv.split([self.head_dim, self.value_head_dim], dim=-1)
        k_rotated = rotate(k_shared.unsqueeze(1), position_ids).expand(-1, k_plain.shape[1], -1, -1)
        q = torch.cat((q_plain, rotate(q_rotated, position_ids)), dim=-1)
        k = torch.cat((k_plain, k_rotated), dim=-1)
        if self.context_parallel is not None:
            mixed = self.context_parallel.attend(q, k, v, causal=True)
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, sequence, -1))
        return out
