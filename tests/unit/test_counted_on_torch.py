"""The models' counts against torch itself: bytes that autograd keeps, and time that a virtual device charges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.cost_models.saved import block_bytes
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import ModelSpec, load_model
from meshwright.profiler.virtual import virtual_device

SEQUENCE, SEQUENCES, VIRTUAL = 128, 2, "virtual:h100/1000/50"
BATCH = ConfigBatch.from_configs([ParallelConfig(micro_batch_size=SEQUENCES)])


def llama(dtype: torch.dtype) -> tuple[nn.Module, ModelSpec]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=512, max_position_embeddings=SEQUENCE, use_cache=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(dtype), load_model(config.to_dict())


RECIPE_OF = {torch.float32: "fp32", torch.bfloat16: "bf16-pure"}
DTYPES = pytest.mark.parametrize("dtype", list(RECIPE_OF), ids=str)


def gpt2(dtype: torch.dtype) -> tuple[nn.Module, ModelSpec]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=512, n_embd=256, n_layer=2, n_head=8, n_positions=SEQUENCE, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(dtype), load_model(config.to_dict())


def mixtral(dtype: torch.dtype) -> tuple[nn.Module, ModelSpec]:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=512, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=SEQUENCE,
        use_cache=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(dtype), load_model(config.to_dict())


@DTYPES
@pytest.mark.parametrize(
    ("build", "name"), [(llama, "model.layers.1"), (gpt2, "transformer.h.1"), (mixtral, "model.layers.1")]
)
def test_bytes_that_autograd_keeps_of_a_block(build: Any, name: str, dtype: torch.dtype) -> None:
    model, spec = build(dtype)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}
    inside = False

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, so that no address is used again
        return tensor

    block = model.get_submodule(name)
    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.zeros(SEQUENCES, SEQUENCE, dtype=torch.int64))
    assert output.logits.requires_grad
    workload = Workload(seq_len=SEQUENCE, global_batch_size=SEQUENCES, recipe=RECIPES[RECIPE_OF[dtype]])
    expected = block_bytes(spec.blocks[1], workload, MESHWRIGHT, BATCH).saved[0]
    # rotary tables, statistics of norms, indices of routed rows
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.015)


@DTYPES
def test_time_that_a_virtual_device_charges_a_step(dtype: torch.dtype) -> None:
    model, spec = llama(dtype)
    tokens = torch.zeros(SEQUENCES, SEQUENCE, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters())
    with virtual_device(VIRTUAL) as device:
        for _ in range(2):
            logits = model(tokens).logits.flatten(0, 1)
            logits = logits.float() if dtype is torch.bfloat16 else logits
            nn.functional.cross_entropy(logits, tokens.flatten(), reduction="sum").backward()
        optimizer.step()
    cluster = load_cluster("h100-sxm")
    nodes = (replace(cluster.node_groups[0], device=device.device.kind),)
    cluster = replace(cluster, devices=(device.device,), node_groups=nodes)
    recipe = RECIPES[RECIPE_OF[dtype]]
    workload = Workload(seq_len=SEQUENCE, global_batch_size=2 * SEQUENCES, recipe=recipe)
    found = estimate_batch(spec, workload, cluster, MESHWRIGHT, BATCH)
    # rotary tables are left out
    assert found.step_s[0] == pytest.approx(device.charged_s, rel=0.01)
