"""Model FLOPs: what the mathematics of a step asks for, whoever runs it and however it is split."""

from __future__ import annotations

from meshwright.cost_models.workload import Workload
from meshwright.profiler.model import AttentionLayer, HeadLayer, LayerSpec, MlpLayer, ModelSpec, MoeLayer


def model_flops(model: ModelSpec, workload: Workload, *, halves_causal: bool = False) -> float:
    """FLOPs of one training step, as model FLOPs utilization counts them (PaLM, arXiv 2204.02311, appendix B).

    A multiply and an add are 2 FLOPs; the backward pass does every matmul twice (by input and by weight), so each
    weight that a token meets costs 6. Attention scores and their product with the values cost
    ``2 * heads * (query_dim + value_dim) * seq_len`` a token forward and three times that in all.

    Conventions: a causal mask does not halve attention (as in PaLM; a sliding window does limit it), recomputation does
    not count, a token meets ``top_k`` experts, and the lookup in the token table is free. Who ``halves_causal`` counts
    only the scores that a causal mask keeps (Megatron-LM since March 2025, ``training/training.py:
    num_floating_point_operations``). Norms, activations and
    softmax are left out: below 1 % for hidden sizes of thousands.
    """
    per_token = sum(
        block.repeat * (6.0 * _weights_met(layer) + 3.0 * _attention(layer, workload.seq_len, halves_causal))
        for block in model.blocks
        for layer in block.layers
    )
    return per_token * workload.tokens_per_step


def _weights_met(layer: LayerSpec) -> int:
    """Matmul weights that one token is multiplied with."""
    match layer:
        case AttentionLayer():
            return sum(inputs * outputs for inputs, outputs in layer.matmuls)
        case MlpLayer():
            return (3 if layer.gated else 2) * layer.hidden * layer.ffn_size
        case MoeLayer():
            width = layer.top_k * layer.expert_ffn_size + layer.shared_ffn_size
            return (3 if layer.gated else 2) * layer.hidden * width + layer.num_experts * layer.hidden
        case HeadLayer():
            return layer.hidden * layer.vocab_size
        case _:
            return 0


def _attention(layer: LayerSpec, seq_len: int, halves_causal: bool) -> float:
    """Forward FLOPs of one token's scores and of their product with the values."""
    if not isinstance(layer, AttentionLayer):
        return 0.0
    keys: float = min(seq_len, layer.window) if layer.window else seq_len
    if halves_causal and layer.causal and keys == seq_len:
        keys = seq_len / 2
    return 2.0 * layer.num_heads * (layer.head_dim + layer.rope_head_dim + layer.value_head_dim) * keys
