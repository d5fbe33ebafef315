"""The matrices of a spec are those that run: torch's own FLOP counter on transformers' modules, nothing computed."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.profiler.model import AttentionLayer, HeadLayer, MlpLayer, ModelSpec, load_model

SEQ = 16
SMALL = {"vocab_size": 301, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2, "intermediate_size": 100, "head_dim": 20}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    ("gpt2", {}),
    ("opt", {"ffn_dim": 100}),
    ("gpt_neox", {"intermediate_size": 100}),
    ("deepseek_v2", {"first_k_dense_replace": 3, "num_experts_per_tok": 2, "q_lora_rank": 24, "kv_lora_rank": 20}),
    ("deepseek_v3", {"first_k_dense_replace": 3, "q_lora_rank": None, "v_head_dim": 40, "num_key_value_heads": 4}),
]


def forward_flops(spec: ModelSpec) -> int:
    """2 for each weight and token, and 2 for each entry of scores and of mixed values (the counter ignores masks)."""
    flops = 0
    for block in spec.blocks:
        for layer in block.layers:
            macs = 0
            if isinstance(layer, AttentionLayer):
                macs = sum(inputs * outputs for inputs, outputs in layer.matmuls)
                macs += SEQ * layer.num_heads * (layer.head_dim + layer.rope_head_dim + layer.value_head_dim)
            elif isinstance(layer, MlpLayer):
                macs = (3 if layer.gated else 2) * layer.hidden * layer.ffn_size
            elif isinstance(layer, HeadLayer):
                macs = layer.hidden * layer.vocab_size
            flops += 2 * SEQ * macs * block.repeat
    return flops


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_counted_flops(model_type: str, changes: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **changes, **ids})
    with FakeTensorMode(), torch.no_grad():
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with FlopCounterMode(display=False) as counter:
            module(torch.zeros(1, SEQ, dtype=torch.long), use_cache=False)
    assert counter.get_total_flops() == forward_flops(load_model(config))
