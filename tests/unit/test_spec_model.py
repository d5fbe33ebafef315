"""A plain decoder of any spec: exactly its parameters, and it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from meshwright import InputError
from meshwright.executors.spec_model import build_spec_model
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import load_model

SMALL: list[dict[str, Any]] = [
    {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True},
    {"model_type": "mistral", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 4},
    {"model_type": "qwen3", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16},
    {"model_type": "gpt2", "vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    {"model_type": "gpt_neox", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "intermediate_size": 64},
    {"model_type": "mixtral", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 4},
    {"model_type": "qwen2_moe", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
     "shared_expert_intermediate_size": 24},
    {"model_type": "gpt_oss", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "num_local_experts": 4, "sliding_window": 4},
    {"model_type": "deepseek_v3", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
     "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 12, "kv_lora_rank": 10,
     "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8},
]  # fmt: skip


@pytest.mark.parametrize("fields", SMALL, ids=lambda fields: fields["model_type"])
def test_runs_and_has_the_parameters_of_its_spec(fields: dict[str, Any]) -> None:
    spec = load_model(fields)
    model = build_spec_model(spec)
    assert sum(weight.numel() for weight in model.parameters()) == spec.params
    logits = model(torch.zeros((2, 8), dtype=torch.int64))
    assert logits.shape == (2, 8, 60)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_tokens_after_do_not_matter_and_a_window_forgets() -> None:
    torch.manual_seed(0)
    model = build_spec_model(load_model(SMALL[1])).double()  # two layers of a window of 4: the last sees 7 tokens
    tokens = torch.arange(10)[None]
    whole = model(tokens)
    later, earlier = tokens.clone(), tokens.clone()
    later[0, 5], earlier[0, 2] = 50, 50
    assert torch.equal(model(later)[0, :5], whole[0, :5])
    assert torch.allclose(model(earlier)[0, 9], whole[0, 9], rtol=0, atol=1e-14)
    assert not torch.allclose(model(earlier)[0, 8], whole[0, 8], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["llama3-8b", "gpt2", "opt-125m", "gpt-neox-20b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"]
)
def test_presets_on_meta(name: str) -> None:
    with torch.device("meta"):
        build_spec_model(load_model(name))  # raises unless the parameters agree


def test_experts_with_a_capacity_and_unexplained_parameters_are_refused() -> None:
    spec = load_model(SMALL[5])
    for changed in ({"capacity_factor": 1.0, "group_tokens": 4}, {"extra_params": 7}):
        blocks = tuple(
            replace(
                block,
                layers=tuple(
                    replace(layer, **changed) if isinstance(layer, MoeLayer) else layer for layer in block.layers
                ),
            )
            for block in spec.blocks
        )
        with torch.device("meta"), pytest.raises(InputError, match="give the model itself"):
            build_spec_model(replace(spec, blocks=blocks))
