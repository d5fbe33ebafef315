"""Parameters equal those of transformers' own modules, built on the meta device, and the counts that were published."""

from __future__ import annotations

import re
from typing import Any

import pytest

from meshwright.profiler.model import ModelSpec, load_model
from meshwright.profiler.model_presets import model_presets

PRESETS = {preset.name: preset for preset in model_presets()}

# Parameters as the hub counts each checkpoint's tensors, or as the cited paper's table prints them to the last digit.
PUBLISHED_EXACT = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
    "phi-3.5-moe": 41_873_153_344,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-neox-20b": 20_554_567_680,  # arXiv 2204.06745, section 2.1
    "pythia-70m": 70_426_624,  # this and the rest: arXiv 2304.01373, table 1
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
}

# Billions as the papers round them: arXiv 2005.14165 table 2.1, 2205.01068 table 1, 2412.19437 section 4.2, 2407.10671,
# 2508.10925 table 1 (gpt-oss), 2502.16982 (Moonlight), 2507.20534 table 2 (Kimi K2); Llama 4's model card.
PUBLISHED_ROUNDED = {
    "gpt3-125m": 0.125,
    "gpt3-350m": 0.356,
    "gpt3-760m": 0.760,
    "gpt3-1.3b": 1.3,
    "gpt3-2.7b": 2.65,
    "gpt3-6.7b": 6.7,
    "gpt3-13b": 12.85,
    "gpt3-175b": 174.6,
    "opt-125m": 0.125,
    "opt-1.3b": 1.3,
    "opt-2.7b": 2.7,
    "opt-6.7b": 6.7,
    "opt-13b": 13.0,
    "opt-30b": 30.0,
    "opt-66b": 66.0,
    "deepseek-v3": 671.0,
    "deepseek-r1": 671.0,
    "qwen2-57b-a14b": 57.4,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "moonlight-16b-a3b": 15.96,
    "kimi-k2": 1040.0,
    "llama4-scout": 109.0,
    "llama4-maverick": 400.0,
}

# Parameters per token, in billions: arXiv 2401.04088, 2505.09388 table 2, 2405.04434, 2412.19437, 2507.20534 table 2,
# 2404.14219 (Phi-3.5-MoE); Llama 4's model card; 2508.10925 table 1, which leaves the table of 0.58 out.
PUBLISHED_ACTIVE = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39.1,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22.2,
    "deepseek-v2": 21.4,
    "deepseek-v3": 37.6,
    "qwen2-57b-a14b": 14.2,
    "kimi-k2": 32.6,
    "gpt-oss-20b": 3.61 + 0.58,
    "gpt-oss-120b": 5.13 + 0.58,
    "phi-3.5-moe": 6.6,
    "llama4-scout": 17.0,
    "llama4-maverick": 17.0,
}

# fmt: off
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 100},
    "mistral": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 100},
    "mixtral": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3},
    "qwen2": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 100},
    "qwen3": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2_moe": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 5},
    "qwen3_moe": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 9},
    "deepseek_v2": {"hidden_size": 48, "num_attention_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 5},
    "deepseek_v3": {"hidden_size": 48, "num_attention_heads": 4, "n_group": 2, "n_routed_experts": 10},
    "gpt_oss": {
        "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 5,
        "intermediate_size": 20,
    },
    "gemma": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 100},
    "gemma2": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 100},
    "gemma3_text": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "phi": {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 100},
    "phi3": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    "phimoe": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3},
    "llama4_text": {
        "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3,
        "intermediate_size": 20, "intermediate_size_mlp": 100,
    },
    "opt": {"hidden_size": 48, "num_attention_heads": 4, "ffn_dim": 100},
    "gpt_neox": {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 100},
    "gpt2": {"n_embd": 48, "n_head": 4},
}
# fmt: on

# model_type, what differs from the small config: every switch that changes a shape
ODD: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 20, "num_key_value_heads": None}),
    ("mistral", {"head_dim": 8, "sliding_window": None}),
    ("mixtral", {"head_dim": 24, "sliding_window": 128}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", {"hidden_size": 50}),
    ("qwen3", {"attention_bias": True}),
    ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [1]}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"head_dim": 16, "attention_bias": True, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"num_experts": 0}),
    ("deepseek_v2", {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v2", {"mlp_bias": True, "first_k_dense_replace": 1}),
    ("deepseek_v3", {"attention_bias": True, "first_k_dense_replace": 1, "n_shared_experts": 3}),
    ("deepseek_v3", {"q_lora_rank": None, "v_head_dim": 40, "first_k_dense_replace": 99}),
    ("gpt_oss", {"attention_bias": False, "num_key_value_heads": 4, "sliding_window": None}),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"], "output_router_logits": True}),
    ("gemma", {"hidden_act": "gelu", "attention_bias": True, "head_dim": 16, "use_bidirectional_attention": None}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"], "head_dim": 16}),
    ("gemma3_text", {"sliding_window_pattern": 2, "attention_bias": True}),
    ("phi", {"qk_layernorm": True, "num_key_value_heads": 2}),
    ("phi3", {"sliding_window": 100, "num_key_value_heads": None}),
    ("phimoe", {"attention_bias": True, "lm_head_bias": True, "output_router_logits": True}),
    ("llama4_text", {"interleave_moe_layer_step": 2, "attention_bias": True, "attention_chunk_size": None}),
    ("llama4_text", {"moe_layers": [], "no_rope_layers": [0, 1], "head_dim": 24}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
    ("gpt2", {"n_inner": 100, "n_positions": 77}),
]


def build(fields: dict[str, Any]) -> tuple[Any, Any]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_type = fields["model_type"]
    if model_type == "kimi_k2":  # DeepSeek-V3's module, under a config class that is on the hub only
        model_type = "deepseek_v3"
    config = transformers.AutoConfig.for_model(**fields | {"model_type": model_type})
    with torch.device("meta"):
        return config, transformers.AutoModelForCausalLM.from_config(config)


def kind_of(name: str) -> str:
    """The layer kind that a parameter of a transformers module belongs to, by its name."""
    if name.startswith(("lm_head", "embed_out")):
        return "head"
    for kind, pattern in (
        ("attention", r"\.(self_attn|attn|attention)\."),
        ("mlp", r"\.(mlp|feed_forward|fc1|fc2)\."),
        ("norm", r"norm|\.ln_"),
        ("embedding", r"embed|\.wte|\.wpe"),
    ):
        if re.search(pattern, name):
            return kind
    raise AssertionError(name)


def check_equal(fields: dict[str, Any]) -> ModelSpec:
    config, module = build(fields)
    spec = load_model(fields)
    wanted: dict[str, int] = {}
    for name, weight in module.named_parameters():
        wanted[kind_of(name)] = wanted.get(kind_of(name), 0) + weight.numel()
    found = spec.params_by_kind()
    found["mlp"] = found.get("mlp", 0) + found.pop("moe", 0)
    assert {kind: count for kind, count in found.items() if count} == wanted
    assert spec.params == sum(weight.numel() for weight in module.parameters())
    if config.model_type == spec.architecture:  # the config object, with its own defaults filled in, says the same
        assert load_model(config).digest == spec.digest
    return spec


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_counts_as_transformers_does(name: str) -> None:
    spec = check_equal(PRESETS[name].config())
    assert spec.digest == load_model(name).digest


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", SMALL)
def test_small_models_tied_and_untied(model_type: str, tied: bool) -> None:
    spec = check_equal(
        {"model_type": model_type, "vocab_size": 301, "tie_word_embeddings": tied, "num_hidden_layers": 3}
        | SMALL[model_type]
        | ({"n_layer": 3} if model_type == "gpt2" else {})
    )
    assert spec.tied is tied
    assert spec.num_layers == 3


@pytest.mark.parametrize(("model_type", "changes"), ODD)
def test_every_switch_that_changes_a_shape(model_type: str, changes: dict[str, Any]) -> None:
    layers = {"n_layer": 2} if model_type == "gpt2" else {"num_hidden_layers": 2}
    check_equal({"model_type": model_type, "vocab_size": 301} | layers | SMALL[model_type] | changes)


@pytest.mark.parametrize("model_type", [name for name in SMALL if name != "deepseek_v2"])  # it has no default top-k
def test_defaults_of_absent_fields_are_those_of_the_config_class(model_type: str) -> None:
    check_equal({"model_type": model_type})


@pytest.mark.parametrize(("name", "params"), PUBLISHED_EXACT.items())
def test_published_counts_exact(name: str, params: int) -> None:
    assert load_model(name).params == params


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_ROUNDED.items())
def test_published_counts_rounded(name: str, billions: float) -> None:
    assert load_model(name).params / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_ACTIVE.items())
def test_published_active_counts(name: str, billions: float) -> None:
    assert load_model(name).active_params / 1e9 == pytest.approx(billions, rel=0.02)


def test_opt_350m_is_refused_with_a_sentence() -> None:
    """Its embeddings are narrower than its layers (arXiv 2205.01068; config.json of facebook/opt-350m)."""
    fields = {"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 512, "num_attention_heads": 16}
    with pytest.raises(ValueError, match=r"word_embed_proj_dim: 512 differs from hidden_size=1024"):
        load_model(fields)


def test_deepseek_v3_says_that_it_leaves_out_the_prediction_layer() -> None:
    """671,026,419,200 in the paper's checkpoint: the 58 * 256 routing corrections are buffers, not parameters."""
    spec = load_model("deepseek-v3")
    assert spec.params + 58 * 256 == 671_026_419_200
    assert any("multi-token prediction" in note for note in spec.notes)
