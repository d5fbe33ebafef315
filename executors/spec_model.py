"""A plain torch decoder for any ``ModelSpec``, so that a plan can be run and measured without its real model.

Its operators, and what they keep for backward, are those of Hugging Face's models (``cost_models/eager.py``). The
layers of each block run in the order the spec names them, each with its residual addition; a norm applies to the
input of the layer after it (at the end of a block: to the block's output). What decides time and memory is the spec's:
sizes, heads, biases, norms, activation, rotary or learned positions, sliding windows, tied head. What does not is not
reproduced: initial values, how a router chooses (``spec_experts``), scaled embeddings, softcaps, the exact rotary
frequencies, parallel residuals.
"""

from __future__ import annotations

from itertools import chain, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright import InputError
from meshwright.executors.context_parallel import ContextParallel
from meshwright.executors.ring_attention import Attention as WholeAttention
from meshwright.executors.ring_attention import ring_attention
from meshwright.executors.spec_experts import Moe
from meshwright.executors.spec_latent import LatentAttention
from meshwright.executors.spec_parts import Mlp, RMSNorm, rotate
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.model import Block, ModelSpec

INITIAL_STD = 0.02
HALF_TYPES = (torch.bfloat16, torch.float16)


def build_spec_model(spec: ModelSpec) -> nn.Module:
    """A causal language model with exactly ``spec.params`` parameters: tokens ``[batch, sequence]`` to logits.

    Build it under ``torch.device("meta")`` to take no memory.
    Raises ``InputError`` for parameters that its layers do not explain, and experts with a capacity.
    """
    model = SpecModel(spec)
    found = sum(weight.numel() for weight in model.parameters())
    if found != spec.params:
        raise InputError(f"{spec.name} has {spec.params:,} parameters, its layers explain {found:,}: give its model")
    return model


class Attention(nn.Module):
    """Causal self-attention over ``[batch, sequence, hidden]``, with grouped key and value heads."""

    context_parallel: ContextParallel | None = None  # the ranks that hold the rest of the sequence (attention_hooks)

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        self.head_dim, self.value_head_dim = layer.head_dim, layer.value_head_dim
        self.rotary, self.window = layer.rotary, layer.window
        widths = (layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim)
        self.q_proj = nn.Linear(layer.hidden, widths[0], bias=layer.qkv_bias)
        self.k_proj = nn.Linear(layer.hidden, widths[1], bias=layer.qkv_bias)
        self.v_proj = nn.Linear(layer.hidden, layer.num_kv_heads * layer.value_head_dim, bias=layer.qkv_bias)
        self.o_proj = nn.Linear(layer.num_heads * layer.value_head_dim, layer.hidden, bias=layer.out_bias)
        per_head = layer.qk_norm_params == 2 * layer.head_dim
        self.q_norm = RMSNorm(layer.head_dim) if per_head else nn.Identity()
        self.k_norm = RMSNorm(layer.head_dim) if per_head else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(layer.num_heads)) if layer.extra_params == layer.num_heads else None

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Causal attention, within the window if there is one: ``[batch, sequence, hidden]`` in and out."""
        batch, sequence, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, sequence, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, sequence, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, sequence, -1, self.value_head_dim).transpose(1, 2)
        if self.rotary:
            q, k = rotate(q, position_ids), rotate(k, position_ids)
        if self.context_parallel is not None:
            mixed = self.context_parallel.attend(q, k, v, causal=True, window=self.window, sinks=self.sinks)
        elif self.sinks is not None:
            window = self.window if self.window < sequence else 0
            here = WholeAttention(ring=None, causal=True, window=window, scale=self.head_dim**-0.5)
            mixed = ring_attention(q, k, v, here, self.sinks)
        else:
            mixed = self._attend(q, k, v)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, sequence, -1))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over a sequence that is all here, heads second."""
        sequence = q.shape[2]
        windowed = 0 < self.window < sequence
        mask = _window_mask(sequence, self.window, q.device) if windowed else None
        grouped = q.shape[1] != k.shape[1]
        if grouped and (
            windowed or q.dtype not in HALF_TYPES
        ):  # the flash kernel alone takes grouped heads as they are
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
            grouped = False
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not windowed, enable_gqa=grouped
        )


class Decoder(nn.Module):
    """One block: norms before (or after) the layers they belong to, residual additions around the layers."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.order = [f"{layer.kind}_{index}" for index, layer in enumerate(block.layers)]
        for name, layer in zip(self.order, block.layers, strict=True):
            self.add_module(name, _build(layer))

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """``x + layer(norm(x))`` for each layer."""
        normed = x
        for layer in map(self.get_submodule, self.order):
            if isinstance(layer, Attention | LatentAttention):
                normed = x = x + layer(normed, position_ids)
            elif isinstance(layer, Mlp | Moe):
                normed = x = x + layer(normed)
            else:
                normed = layer(normed)
        return normed


class SpecModel(nn.Module):
    """Embedding, decoder blocks, final norms, head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        first, last = spec.blocks[0], spec.blocks[-1]
        self.embed = nn.Embedding(spec.embedding.vocab_size, spec.embedding.hidden)
        positions = spec.embedding.num_positions
        self.positions = nn.Embedding(positions, spec.embedding.hidden) if positions else None
        self.embedding_norms = nn.Sequential(*(_build(layer) for layer in first.layers if layer is not spec.embedding))
        blocks = chain.from_iterable(repeat(block, block.repeat) for block in spec.decoder_blocks)
        self.blocks = nn.ModuleList(Decoder(block) for block in blocks)
        self.norms = nn.Sequential(*(_build(layer) for layer in last.layers if layer is not spec.head))
        self.head = nn.Linear(spec.hidden, spec.vocab_size, bias=spec.head.bias)
        if spec.tied:
            self.head.weight = self.embed.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=INITIAL_STD)

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Tokens ``[batch, sequence]`` to logits ``[batch, sequence, vocab_size]``.

        ``position_ids`` ``[1, sequence]`` say where tokens stand, where they are not a whole sequence in order.
        """
        x = self.embed(tokens)
        if self.positions is not None:
            places = torch.arange(tokens.shape[1], device=tokens.device) if position_ids is None else position_ids[0]
            x = x + self.positions(places)
        x = self.embedding_norms(x)
        for block in self.blocks:
            x = block(x, position_ids)
        logits: Tensor = self.head(self.norms(x))
        return logits


def _window_mask(sequence: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(sequence, device=device)[:, None] - torch.arange(sequence, device=device)
    return (distance >= 0) & (distance < window)


def _build(layer: LayerSpec) -> nn.Module:
    if isinstance(layer, NormLayer):
        kind = RMSNorm if layer.norm_kind is NormKind.RMS else nn.LayerNorm
        return kind(layer.hidden, elementwise_affine=layer.affine)
    if isinstance(layer, AttentionLayer):
        return LatentAttention(layer) if layer.attention_kind is AttentionKind.MLA else Attention(layer)
    if isinstance(layer, MlpLayer):
        return Mlp(layer)
    if isinstance(layer, MoeLayer):
        return Moe(layer)
    raise InputError(f"a layer of kind {layer.kind!r} is not built from a spec: give the model itself")
