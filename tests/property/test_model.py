"""Laws of model specs over random architectures, and malformed configs that always end in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import InputError
from meshwright.profiler.hf_config import BUILDERS
from meshwright.profiler.model import load_model, save_model
from meshwright.profiler.model_presets import model_presets

sizes = st.integers(1, 64)


@st.composite
def llama_fields(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, groups, head_dim = draw(sizes), draw(st.integers(1, 8)), draw(sizes)
    heads = kv_heads * groups
    return {
        "model_type": "llama",
        "vocab_size": draw(st.integers(1, 1000)),
        "hidden_size": heads * draw(sizes),
        "intermediate_size": draw(st.integers(1, 5000)),
        "num_hidden_layers": draw(st.integers(1, 200)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@given(llama_fields())
def test_llama_params_are_the_hand_formula(fields: dict[str, Any]) -> None:
    hidden, ffn, head_dim = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    q, kv = fields["num_attention_heads"] * head_dim, fields["num_key_value_heads"] * head_dim
    layer = hidden * q + 2 * hidden * kv + q * hidden + 3 * hidden * ffn + 2 * hidden
    layer += (q + 2 * kv + hidden) if fields["attention_bias"] else 0
    layer += (2 * ffn + hidden) if fields["mlp_bias"] else 0
    ends = fields["vocab_size"] * hidden * (1 if fields["tie_word_embeddings"] else 2) + hidden
    spec = load_model(fields)
    assert spec.params == fields["num_hidden_layers"] * layer + ends
    assert sum(spec.params_by_kind().values()) == spec.params == spec.active_params
    assert len(spec.blocks) == 3  # equal layers are folded


@given(st.data())
def test_expert_params_are_the_hand_formula(data: st.DataObject) -> None:
    hidden, ffn, expert, shared = (data.draw(sizes) for _ in range(4))
    layers, dense = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 20))
    experts, vocab = data.draw(st.integers(1, 16)), data.draw(sizes)
    top_k = data.draw(st.integers(1, experts))
    heads, nope, rope, value = (data.draw(st.integers(1, 8)) for _ in range(4))
    q_rank, kv_rank = data.draw(st.one_of(st.none(), sizes)), data.draw(sizes)
    spec = load_model(
        {
            "model_type": "deepseek_v3", "hidden_size": hidden, "intermediate_size": ffn, "vocab_size": vocab,
            "moe_intermediate_size": expert, "n_shared_experts": shared, "num_hidden_layers": layers,
            "first_k_dense_replace": dense, "n_routed_experts": experts, "num_experts_per_tok": top_k,
            "num_attention_heads": heads, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value,
            "q_lora_rank": q_rank, "kv_lora_rank": kv_rank,
        }
    )  # fmt: skip
    queries = hidden * heads * (nope + rope)
    if q_rank is not None:
        queries = hidden * q_rank + q_rank + q_rank * heads * (nope + rope)
    attention = (
        queries + hidden * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value) + heads * value * hidden
    )
    num_dense = min(dense, layers)
    moe = 3 * hidden * expert * experts + hidden * experts + 3 * hidden * expert * shared
    body = layers * (attention + 2 * hidden) + num_dense * 3 * hidden * ffn + (layers - num_dense) * moe
    assert spec.params == body + 2 * vocab * hidden + hidden
    idle = (layers - num_dense) * 3 * hidden * expert * (experts - top_k)
    assert spec.params - spec.active_params == idle


@settings(max_examples=30)
@given(llama_fields())
def test_a_saved_spec_comes_back_equal(fields: dict[str, Any]) -> None:
    spec = load_model(fields)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        save_model(spec, path)
        assert load_model(path) == spec
        assert load_model(path).digest == spec.digest


junk: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.sampled_from(
        [0, -1, 2**31, 2**63, "", "4096", "null", 4096.0, float("nan"), float("inf"), [], {}, [[]], [1, "a"]]
    ),
    st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FIELDS = sorted(
    {field for preset in model_presets() for field in preset.config()}
    | {"layer_types", "mlp_bias", "n_inner", "ffn_dim", "hidden_act", "use_sliding_window", "max_window_layers"}
    | {"qkv_bias", "enable_bias", "num_experts", "num_local_experts", "add_cross_attention", "activation_function"}
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(BUILDERS)), st.dictionaries(st.sampled_from(FIELDS), junk, max_size=4))
def test_a_malformed_config_is_a_model_or_one_sentence(model_type: str, changes: dict[str, Any]) -> None:
    try:
        spec = load_model({"num_experts_per_tok": 2, "num_hidden_layers": 3, **changes, "model_type": model_type})
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:  # junk that happens to be legal, or in a field the architecture does not have
        assert spec.params > 0 and spec.params == sum(spec.params_by_kind().values())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_malformed_file_is_one_sentence(data: st.DataObject) -> None:
    """A saved spec with one place overwritten, or cut short; equal only where the junk says what was there."""
    spec = load_model(data.draw(st.sampled_from(["llama3-8b", "deepseek-v3"])))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        save_model(spec, path)
        text = path.read_text()
        if data.draw(st.booleans()):
            path.write_text(text[: data.draw(st.integers(0, len(text) - 3))])
        else:
            tree = json.loads(text)
            place = tree
            while data.draw(st.integers(0, 4)) and isinstance(place, list | dict) and place:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = data.draw(st.sampled_from(keys))
                inner = place[key]
                if not isinstance(inner, list | dict) or not inner:
                    break
                place = inner
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
            place[key] = data.draw(junk)
            path.write_text(json.dumps(tree))
        try:
            changed = load_model(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert changed.params > 0


def test_no_layer_of_any_preset_is_empty() -> None:
    for preset in model_presets():
        spec = load_model(preset.name)
        assert all(layer.params > 0 for layer in spec.layers() if layer.kind != "head")


@pytest.mark.parametrize("model_type", sorted(BUILDERS))
def test_every_size_counts(model_type: str) -> None:
    """One more layer is one more layer's parameters, and a vocabulary of one more token one or two rows more."""
    base = {"model_type": model_type, "num_experts_per_tok": 2, "vocab_size": 500, "num_hidden_layers": 9}
    spec = load_model(base)
    deeper, wider = load_model({**base, "num_hidden_layers": 10}), load_model({**base, "vocab_size": 501})
    assert deeper.params - spec.params == spec.decoder_blocks[-1].params
    assert wider.params - spec.params == spec.hidden * (1 if spec.tied else 2) + spec.head.bias
