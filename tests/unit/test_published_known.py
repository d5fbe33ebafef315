"""Rows of well-known models: what has no column is the known model's."""

from __future__ import annotations

import pytest

from meshwright.cost_models.flops import model_flops
from meshwright.cost_models.published import run_of
from meshwright.cost_models.published_known import preset_named
from meshwright.cost_models.published_model import model_of
from meshwright.cost_models.published_rows import Row
from meshwright.cost_models.published_stages import uneven
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MlpLayer, MoeLayer
from meshwright.profiler.model import load_model

DEEPSEEK = {
    "id": "a-1", "family": "a", "gpu_type": "GB200", "gpus_per_node": "72", "num_gpus": "256", "framework": "NeMo",
    "interconnect": "NVL72 (4 GPU/tray)", "model": "deepseek-v3", "arch_family": "moe", "layers": "61",
    "hidden": "7168", "heads": "128", "kv_heads": "128", "ffn": "18432.0", "vocab": "129280", "experts": "256",
    "topk": "8", "moe_ffn": "2048", "params_b": "671", "seq_len": "4096", "precision": "bf16", "tp": "1", "pp": "4",
    "vpp": "4", "dp": "64", "cp": "1", "ep": "64", "etp": "1", "zero_stage": "1", "micro_batch": "1",
    "global_batch": "4096", "schedule": "1f1b/interleaved", "notes": "DeepSeekV3 (w/o MTP)", "status": "ok",
}  # fmt: skip


def row(**changes: str) -> Row:
    return Row(DEEPSEEK | changes, 2)


def test_latent_attention_and_shared_experts_come_from_the_known_model() -> None:
    model, notes = model_of(row())
    assert model.digest == load_model("deepseek-v3").digest
    assert notes == ("layers of deepseek-v3 by its public config",)


def test_recipes_train_the_layer_that_predicts_one_more_token() -> None:
    """Tables of Megatron-Bridge print 260 GFLOPs a token with it and 249 without: 1670 TFLOP/s over 6,422 tokens/s.

    Half of attention's FLOPs count there, as causal masks leave them; ours count all of it.
    """
    run, plain = run_of(row(notes="DeepSeekV3 (w/ MTP)")), load_model("deepseek-v3")
    last = plain.decoder_blocks[-1].params
    assert run.model.num_layers == 62
    assert run.model.params == plain.params + last + 3 * 7168 + 2 * 7168**2  # three norms and the projection
    for model, published in ((run.model, 1670 / 6.422), (plain, 782 / 3.139)):
        attention = model.num_layers * 6.0 * 128 * (128 + 64 + 128) * 4096
        per_token = model_flops(model, run.workload) / run.workload.tokens_per_step
        assert (per_token - attention / 2) / 1e9 == pytest.approx(published, rel=0.01)
    assert model_of(row(framework="HAI-LLM", notes=""))[0].digest == run.model.digest


def test_other_frameworks_do_not() -> None:
    assert model_of(row(framework="torchtitan (FSDP2)", notes=""))[0].num_layers == 61


def test_columns_win_and_differences_are_said() -> None:
    model, notes = model_of(row(layers="8", topk="4", ffn="2048"))  # a width of dense layers that repeats the experts'
    assert model.num_layers == 8
    assert {layer.ffn_size for layer in model.layers() if isinstance(layer, MlpLayer)} == {18432}
    assert {layer.top_k for layer in model.layers() if isinstance(layer, MoeLayer)} == {4}
    assert notes[1:] == (
        "8 of the 61 layers of deepseek-v3",
        "topk 4 as published, 8 in the config of deepseek-v3",
    )


def test_a_smaller_sister_is_the_model_that_has_its_sizes() -> None:
    """torchtitan's DeepSeek-V3 of 16B has the layers of DeepSeek-V2-Lite (models/deepseek_v3/__init__.py)."""
    sizes = {"layers": "27", "hidden": "2048", "heads": "16", "kv_heads": "16", "ffn": "10944", "vocab": "102400"}
    experts = {"experts": "64", "topk": "6", "moe_ffn": "1408", "framework": "torchtitan (FSDP2)"}
    model, notes = model_of(row(model="deepseek-v3-16b", notes="", **sizes, **experts))
    assert model.digest == load_model("deepseek-v2-lite").digest
    assert notes == ("layers of deepseek-v2-lite by its public config",)


@pytest.mark.parametrize(
    ("name", "changes", "kind", "windows", "shared", "params"),
    [
        ("Kimi_K2", {"layers": "61", "hidden": "7168", "heads": "64"}, AttentionKind.MLA, {0}, 2048, 1026.4),
        ("Moonlight-16B-A3B", {"layers": "27"}, AttentionKind.MLA, {0}, 2816, 15.96),
        ("Qwen2-57B-A14B", {"layers": "28", "ffn": ""}, AttentionKind.GQA, {0}, 20480, 57.4),
        ("gpt-oss-120b", {"layers": "36"}, AttentionKind.GQA, {0, 128}, 0, 116.8),
    ],
)
def test_models_that_columns_cannot_say(
    name: str, changes: dict[str, str], kind: AttentionKind, windows: set[int], shared: int, params: float
) -> None:
    blank = dict.fromkeys(("hidden", "heads", "kv_heads", "ffn", "vocab", "experts", "topk", "moe_ffn"), "")
    model, _ = model_of(row(**blank | {"model": name} | changes))
    attention = [layer for layer in model.layers() if isinstance(layer, AttentionLayer)]
    assert {layer.attention_kind for layer in attention} == {kind}
    assert {layer.window for layer in attention} == windows
    assert model.moe is not None
    assert model.moe.shared_ffn_size == shared
    assert model.params / 1e9 == pytest.approx(params, rel=0.001)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("DeepSeek_V3 671B", "deepseek-v3"),
        ("DeepSeekV3", "deepseek-v3"),
        ("deepseek-v2-lite", "deepseek-v2-lite"),
        ("deepseek-v3.2", None),
        ("llama", None),
        ("", None),
    ],
)
def test_names(name: str, preset: str | None) -> None:
    found = preset_named(name)
    assert (found.name if found else None) == preset


def test_a_finer_mixtral_is_mixtral_with_other_experts() -> None:
    """Mixtral-8x22B-G8T8 of arXiv 2504.14960: every expert cut in eight, eight times as many of them taken."""
    sizes = {"layers": "56", "hidden": "6144", "heads": "48", "kv_heads": "8", "ffn": "2048", "vocab": "32000"}
    model, notes = model_of(row(model="Mixtral-8x22B-G8T8", experts="64", topk="8", moe_ffn="2048", **sizes))
    assert model.params == load_model("mixtral-8x22b").params + 56 * 56 * 6144  # a wider router
    assert "experts 64 as published, 8 in the config of mixtral-8x22b" in notes


@pytest.mark.parametrize(
    ("target", "stages", "layers"),
    [
        ("megatron-bridge", 16, [4] * 15 + [1]),
        ("megatron-bridge-25.11", 8, [8] * 7 + [5]),
        ("megatron-bridge", 32, [1] + [2] * 30 + [0]),
        ("nemo", 16, [3] + [4] * 14 + [2]),
        ("nemo", 4, [15, 16, 16, 14]),
    ],
)
def test_stages_of_61_layers_in_nvidias_recipes(target: str, stages: int, layers: list[int]) -> None:
    assert uneven(61, stages, target) == layers


def test_the_layer_that_predicts_stands_on_the_last_stage() -> None:
    """Kinds: embedding, three dense layers, 58 of experts, the one that predicts, head; 16 stages on 4 ranks."""
    run = run_of(row(framework="Megatron-Core / Megatron-Bridge (NeMo)", notes=""))
    assert run.counts is not None
    assert run.counts[0] == ((1.0, 3.0, 1.0, 0.0, 0.0), *[(0.0, 0.0, 4.0, 0.0, 0.0)] * 3)
    assert run.counts[3][3] == (0.0, 0.0, 1.0, 1.0, 1.0)
    assert sum(sum(chunk) for rank in run.counts for chunk in rank) == 64
