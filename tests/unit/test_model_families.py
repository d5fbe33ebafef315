"""Windows, rotation, experts and norms of models whose layers are not all alike, and parts that are left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright import InputError
from meshwright.cost_models.strategy import REASONS, ConfigBatch, ParallelConfig, Reason, legal
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload
from meshwright.planner.reasons import why_illegal
from meshwright.profiler.hf_config import BUILDERS, TEXT_PARTS
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MlpLayer, MoeLayer
from meshwright.profiler.model import HeadLayer, ModelSpec, load_model
from meshwright.profiler.prediction import predicted_tokens, with_prediction


def per_layer(model: ModelSpec, kind: type) -> list[Any]:
    """The layer of that kind of each decoder block, in order; ``None`` where a block has none."""
    found = []
    for block in model.decoder_blocks:
        layer = next((layer for layer in block.layers if isinstance(layer, kind)), None)
        found += [layer] * block.repeat
    return found


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("gemma-7b", [0] * 28),
        ("gemma2-2b", [4096, 0] * 13),
        ("gemma3-1b", [512, 512, 512, 512, 512, 0] * 4 + [512, 512]),
        ("gpt-oss-20b", [128, 0] * 12),
        ("phi-3-mini", [2047] * 32),
        ("phi-4", [0] * 40),
        ("llama4-scout", [8192, 8192, 8192, 0] * 12),
    ],
)
def test_windows(name: str, windows: list[int]) -> None:
    assert [layer.window for layer in per_layer(load_model(name), AttentionLayer)] == windows


def test_llama4_interleaves_experts_and_layers_without_rotation() -> None:
    model = load_model("llama4-maverick")
    assert [layer.rotary for layer in per_layer(model, AttentionLayer)] == [True, True, True, False] * 12
    experts = per_layer(model, MoeLayer)
    assert [layer is not None for layer in experts] == [False, True] * 24
    assert (experts[1].num_experts, experts[1].top_k, experts[1].shared_ffn_size) == (128, 1, 8192)
    assert {layer.ffn_size for layer in per_layer(model, MlpLayer) if layer} == {16384}
    assert any("chunks of 8,192 tokens" in note for note in model.notes)


def test_norms_around_each_half_from_gemma_2_on() -> None:
    kinds = [layer.kind for layer in load_model("gemma2-9b").decoder_blocks[0].layers]
    assert kinds == ["norm", "attention", "norm", "norm", "mlp", "norm"]


@pytest.mark.parametrize("model_type", ["gemma3", "llama4"])
def test_of_several_modalities_the_text_part_is_read(model_type: str) -> None:
    text = {"num_hidden_layers": 4, "vocab_size": 1000}
    whole = load_model({"model_type": model_type, "text_config": text, "vision_config": {"hidden_size": 7}})
    part = load_model({"model_type": {"gemma3": "gemma3_text", "llama4": "llama4_text"}[model_type], **text})
    assert whole.digest == part.digest
    assert any("text part" in note for note in whole.notes)
    with pytest.raises(InputError, match="text_config: expected an object, found 7"):
        load_model({"model_type": model_type, "text_config": 7})
    with pytest.raises(InputError, match="config: text_config: vocab_size: expected an integer"):
        load_model({"model_type": model_type, "text_config": {"vocab_size": "many"}})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "expected a causal decoder"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types: expected 26"),
        ({"model_type": "llama4_text", "layer_types": ["sliding_attention"] * 48}, "layer_types: expected 48"),
        ({"model_type": "llama4_text", "no_rope_layers": [1]}, r"no_rope_layers: expected 48 .*found 1"),
        ({"model_type": "gpt_oss", "router_aux_loss_coef": -1}, "router_aux_loss_coef: expected a number of at least"),
        ({"model_type": "qwen3_next"}, 'model_type "qwen3_next" is not supported'),
    ],
)
def test_what_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_model(fields)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe", "llama4_text"])
def test_the_auxiliary_loss_is_the_configs_where_it_trains_with_it(model_type: str) -> None:
    """transformers adds ``router_aux_loss_coef`` times the loss only where router logits are put out."""
    assert load_model({"model_type": model_type}).moe.aux_loss == 0.0  # type: ignore[union-attr]
    trained = load_model({"model_type": model_type, "output_router_logits": True, "router_aux_loss_coef": 0.02})
    assert trained.moe is not None
    assert trained.moe.aux_loss == 0.02


def unlike_heads() -> ModelSpec:
    """Two layers of 8 heads (4 for keys and values), then two of 12 (3), each 16 wide."""
    model = load_model({"model_type": "llama", "hidden_size": 96, "num_attention_heads": 8, "num_hidden_layers": 4})
    blocks = []
    for heads, kv_heads in ((8, 4), (12, 3)):
        attention = replace(
            model.attention,
            attention_kind=AttentionKind.GQA,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=16,
            value_head_dim=16,
        )
        norm, _, _, mlp = model.decoder_blocks[0].layers
        blocks.append(replace(model.decoder_blocks[0], layers=(norm, attention, norm, mlp), repeat=2))
    return replace(model, blocks=(model.blocks[0], *blocks, model.blocks[-1]))


def test_rules_ask_all_layers() -> None:
    """11,008 wide: tp 2 divides 8 and 12 heads, but 3 key/value heads neither divide it nor are divided by it."""
    model = unlike_heads()
    assert model.head_counts == ((8, 4), (12, 3))
    workload = Workload(seq_len=4096, global_batch_size=8)
    verdicts = legal(ConfigBatch.from_columns({"tp": [1, 2, 3, 4, 8], "vocab_parallel": False}, 5), model, workload)
    reasons = [REASONS[verdict] if verdict >= 0 else None for verdict in verdicts]
    assert reasons == [None, Reason.KV_HEADS, Reason.HEADS, Reason.KV_HEADS, Reason.HEADS]
    said = why_illegal(ParallelConfig(tp=8, vocab_parallel=True), model, workload, framework_named("megatron-lm"))
    assert said == "tp=8 does not divide 12 heads"
    said = why_illegal(ParallelConfig(tp=2, vocab_parallel=True), model, workload, framework_named("megatron-lm"))
    assert said == "tp=2 does not divide 3 key/value heads, nor they tp"


@pytest.mark.parametrize(
    ("name", "ffn_size", "windows"),
    [
        ("deepseek-v3", 2048, ()),  # three dense layers of 18,432 and 58 shared experts of 2,048
        ("deepseek-v2-lite", 64, ()),  # 10,944 and 2,816
        ("llama4-maverick", 8192, (8192,)),
        ("gpt-oss-20b", 0, (128,)),  # routed experts alone
        ("qwen2-57b-a14b", 20480, ()),
    ],
)
def test_widths_and_windows_of_all_layers(name: str, ffn_size: int, windows: tuple[int, ...]) -> None:
    model = load_model(name)
    assert model.ffn_size == ffn_size
    assert model.windows == windows


def test_the_page_on_models_names_every_kind() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()
    assert all(f"`{model_type}`" in page for model_type in (*BUILDERS, *TEXT_PARTS))


class TestPrediction:
    def test_one_block_more_and_the_head_once_more(self) -> None:
        plain = load_model("deepseek-v3")
        trained = with_prediction(plain)
        assert (plain.num_layers, trained.num_layers) == (61, 62)
        assert [layer.kind for layer in trained.blocks[-2].layers] == [
            "norm", "norm", "mlp", "norm", "attention", "norm", "moe", "norm"
        ]  # fmt: skip
        heads = [layer for layer in trained.blocks[-1].layers if isinstance(layer, HeadLayer)]
        assert [head.tied for head in heads] == [False, True]
        assert trained.head is heads[0] and not trained.tied
        assert (predicted_tokens(plain), predicted_tokens(trained)) == (0, 1)
        # the checkpoint's 685 billion hold embedding and head of the module once more (its model card: 671 + 14)
        assert (trained.params + 2 * 129280 * 7168) / 1e9 == pytest.approx(685, abs=0.6)
        assert not any("not counted" in note for note in trained.notes)

    def test_depth_must_be_one_at_least(self) -> None:
        with pytest.raises(InputError, match="found 0"):
            with_prediction(load_model("deepseek-v3"), 0)

    def test_two_heads_of_their_own_are_no_model(self) -> None:
        model = load_model("llama3-8b")
        last = replace(model.blocks[-1], layers=(*model.blocks[-1].layers, model.head))
        with pytest.raises(InputError, match="a model needs one HeadLayer, found 2"):
            replace(model, blocks=(*model.blocks[:-1], last))
