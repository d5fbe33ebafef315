"""A model on the screen: its size in a line, its layers with theirs in a table; and the list of presets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    LayerSpec,
    MlpLayer,
    MoeLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.model import Block, ModelSpec
from meshwright.profiler.model_presets import ModelPreset
from meshwright.profiler.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Console

BF16_BYTES = 2
NORM_WORDS = {NormKind.RMS: "RMSNorm", NormKind.LAYER: "LayerNorm"}


def show_model(model: ModelSpec, preset: ModelPreset | None, console: Console) -> None:
    """Print a model: what it is in three lines, its layers in a table (equal blocks once), its source and notes."""
    from rich.table import Table
    from rich.text import Text

    _line(console, model_line(model))
    attention = f"{model.attention.num_heads} heads in {model.num_layers} layers{_unlike(model)}"
    _line(console, f"  hidden {model.hidden:,}, {attention}, up to {model.max_seq_len:,} tokens")
    _line(console, f"  weights in bf16: {format_bytes(BF16_BYTES * model.params)}; {model.digest}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("block", "layers"):
        table.add_column(title)
    table.add_column("times", justify="right")
    table.add_column("layer")
    table.add_column("sizes", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for block, places in _different_blocks(model):
        times = max(len(places), 1)
        for index, layer in enumerate(block.layers):
            first = index == 0
            share = layer.params * times / model.params
            table.add_row(
                block.kind.value if first else "",
                describe_places(places) if first else "",
                str(times) if first else "",
                layer.kind,
                Text(describe_layer(layer)),
                f"{layer.params:,}",
                f"{share:.1%}",
            )
    console.print()
    console.print(table)
    if preset is not None:
        _line(console, f"\nsource: {preset.source}" + (f"; huggingface.co/{preset.hub}" if preset.hub else ""))
    for note in model.notes:
        _line(console, f"note: {note}")


def _different_blocks(model: ModelSpec) -> list[tuple[Block, list[int]]]:
    """Each different block with the decoder layers that are such a block; embedding and head have no such number."""
    found: list[tuple[Block, list[int]]] = [(model.blocks[0], [])]
    first = 0
    for block in model.decoder_blocks:
        places = next((places for known, places in found[1:] if known.layers == block.layers), None)
        if places is None:
            places = list[int]()
            found.append((block, places))
        places += range(first, first + block.repeat)
        first += block.repeat
    return [*found, (model.blocks[-1], [])]


def describe_places(places: Sequence[int]) -> str:
    """Positions in words: ``3-60``, ``0, 2, ... 34``, ``0-2, 4-6, ... 44-46``."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words if len(words) < 4 else [*words[:2], f"... {words[-1]}"])


def _unlike(model: ModelSpec) -> str:
    """How many layers have experts or a window, where not all are alike: `` (58 of experts)``."""
    said = []
    for size, count in _windows(model).items():
        said.append(f"{count if count < model.num_layers else 'all'} with a window of {size:,}")
    sparse = _count(model, MoeLayer)
    said += [f"{sparse if sparse < model.num_layers else 'all'} of experts"] if sparse else []
    return f" ({', '.join(said)})" if said else ""


def _windows(model: ModelSpec) -> dict[int, int]:
    """Layers by the size of their window, those without one left out."""
    found: dict[int, int] = {}
    for block in model.decoder_blocks:
        for layer in block.layers:
            if isinstance(layer, AttentionLayer) and layer.window:
                found[layer.window] = found.get(layer.window, 0) + block.repeat
    return found


def _count(model: ModelSpec, kind: type) -> int:
    return sum(block.repeat for block in model.decoder_blocks if any(isinstance(layer, kind) for layer in block.layers))


def model_line(model: ModelSpec) -> str:
    """``llama3-8b (llama): 8.03 B parameters (8,030,261,248)``, and how many are active where that differs."""
    line = f"{model.name} ({model.architecture}): {format_count(model.params)} parameters ({model.params:,})"
    if model.active_params != model.params:
        line += f", {format_count(model.active_params)} active per token"
    return line


def describe_layer(layer: LayerSpec) -> str:
    """The sizes of a layer in words."""
    if isinstance(layer, EmbeddingLayer):
        positions = f", {layer.num_positions:,} positions" if layer.num_positions else ""
        return f"{layer.vocab_size:,} tokens{positions} x {layer.hidden:,}"
    if isinstance(layer, AttentionLayer):
        return _describe_attention(layer)
    if isinstance(layer, MlpLayer):
        gated = f"gated {layer.activation}" if layer.gated else layer.activation
        return f"{layer.hidden:,} x {layer.ffn_size:,}, {gated}" + (", biases" if layer.bias else "")
    if isinstance(layer, MoeLayer):
        shared = f", shared {layer.shared_ffn_size:,}" if layer.shared_ffn_size else ""
        capacity = f", capacity {layer.capacity_factor:g} in groups of {layer.group_tokens:,}"
        experts = f"{layer.top_k} of {layer.num_experts} experts, {layer.hidden:,} x {layer.expert_ffn_size:,}{shared}"
        return experts + (capacity if layer.capacity_factor else "")
    if isinstance(layer, NormLayer):
        return f"{NORM_WORDS[layer.norm_kind]} over {layer.hidden:,}"
    return f"{layer.hidden:,} x {layer.vocab_size:,}" + (", tied to the embedding" if layer.tied else "")


def _describe_attention(layer: AttentionLayer) -> str:
    heads = f"{layer.num_heads} heads"
    if layer.attention_kind is AttentionKind.MLA:
        latents = f"latents {layer.q_lora_rank} and {layer.kv_lora_rank}" if layer.q_lora_rank else "latent of keys"
        words = [f"mla, {heads} of {layer.head_dim}+{layer.rope_head_dim}", f"{latents}"]
    else:
        keys = f", {layer.num_kv_heads} key/value heads" if layer.num_kv_heads != layer.num_heads else ""
        words = [f"{layer.attention_kind.value}, {heads} of {layer.head_dim}{keys}"]
    words += ["norms on queries and keys"] if layer.qk_norm_params else []
    words += [f"window {layer.window:,}"] if layer.window else []
    words += ["biases"] if layer.qkv_bias else []
    return ", ".join(words)


def show_presets(presets: Sequence[tuple[ModelPreset, ModelSpec]], console: Console) -> None:
    """Print a table of presets, a family after the other."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("preset", no_wrap=True)
    for title in ("parameters", "active", "experts", "layers", "hidden"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("attention", no_wrap=True)
    for title in ("window", "vocabulary", "tokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for preset, model in presets:
        attention = model.attention
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        table.add_row(
            preset.name,
            format_count(model.params),
            format_count(model.active_params) if model.active_params != model.params else "",
            f"{model.moe.top_k} of {model.moe.num_experts}" if model.moe else "",
            str(model.num_layers),
            f"{model.hidden:,}",
            f"{attention.attention_kind.value} {heads}" + (f"/{kv_heads}" if kv_heads != heads else ""),
            ", ".join(f"{size:,} in {count}" for size, count in _windows(model).items()),
            f"{model.vocab_size:,}",
            f"{model.max_seq_len:,}",
        )
    console.print(table)


def preset_json(presets: Sequence[ModelPreset]) -> str:
    """The presets as a JSON list: name, family, hub, source, notes and the config's fields."""
    listed = [
        {
            "name": preset.name,
            "family": preset.family,
            "hub": preset.hub or None,
            "source": preset.source,
            "notes": list(preset.notes),
            "config": preset.config(),
        }
        for preset in presets
    ]
    return json.dumps(listed, indent=2)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
