"""Where a model may come from, and the sentence for each thing that is no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshwright import InputError
from meshwright.profiler.model import load_model, save_model
from meshwright.profiler.model_presets import PRESETS, model_presets

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}


def write(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_file_folder_text_dict_and_object_agree(tmp_path: Path) -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return TINY

    folder = tmp_path / "tiny"
    folder.mkdir()
    file = write(folder / "config.json", TINY)
    digest = load_model(TINY).digest
    sources = (file, folder, str(file), str(folder), Config(), load_model(TINY))
    assert [load_model(source).digest for source in sources] == [digest] * len(sources)
    assert load_model(folder).name == load_model(file).name == "tiny"
    assert load_model(write(tmp_path / "other.json", TINY)).name == "other"
    assert load_model({**TINY, "_name_or_path": "me/tiny"}).name == "me/tiny"


def test_saved_spec_comes_back_equal(tmp_path: Path) -> None:
    for preset in model_presets():
        spec = load_model(preset.name)
        save_model(spec, tmp_path / "model.json")
        assert load_model(tmp_path / "model.json") == spec


def test_a_name_is_found_by_preset_hub_and_case() -> None:
    for name in ("llama3-8b", "LLaMA3-8B", "meta-llama/Meta-Llama-3-8B", "Meta-Llama-3-8B"):
        assert load_model(name).name == "llama3-8b"
    assert load_model("gpt2").name == "gpt2-small"


def test_preset_names_are_unique_and_sourced() -> None:
    presets = model_presets()
    names = [preset.name for preset in presets] + [preset.hub for preset in presets if preset.hub]
    assert len(set(names)) == len(names)
    assert all(preset.source and preset.name == preset.name.lower() for preset in presets)
    assert len(presets) == sum(len(json.loads(file.read_text())["models"]) for file in PRESETS.glob("*.json"))


def test_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown model 'llama3-9b'.*nearest presets are llama3-8b") as caught:
        load_model("llama3-9b")
    assert "meshwright model presets" in str(caught.value)
    with pytest.raises(InputError, match="qwen3-8b"):
        load_model("Qwen/Qwen3-8b-typo")
    for name in ("", "?", "x" * 5000, "a\0b", "/"):
        with pytest.raises(InputError):
            load_model(name)


def test_unsupported_architecture_names_it_and_the_supported() -> None:
    with pytest.raises(InputError, match='model_type "mamba" is not supported; supported: llama, mistral, mixtral'):
        load_model({"model_type": "mamba"})
    with pytest.raises(InputError, match="model_type: missing"):
        load_model({"hidden_size": 64})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": "64"}, 'hidden_size: expected an integer from 1 to 1000000000, found "64"'),
        ({"hidden_size": 64.0}, "hidden_size: expected an integer .* found 64.0"),
        ({"hidden_size": True}, "hidden_size: expected an integer .* found true"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer from 1 to 100000, found 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected an integer from 1 to 100000"),
        ({"vocab_size": None}, "vocab_size: expected an integer .* found null"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads=4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads: 5 does not divide hidden_size=64"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings: expected true or false, found "yes"'),
        ({"hidden_act": 3}, "hidden_act: expected a word, found 3"),
        ({"model_type": "deepseek_v2"}, "num_experts_per_tok: missing"),
        ({"model_type": "deepseek_v3", "moe_layer_freq": 2}, "moe_layer_freq: only 1 is supported"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok: 9 is more than the 8 experts"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention: not supported"),
        ({"model_type": "gpt2", "n_embd": 32}, "two names of one field disagree: hidden_size=64 and n_embd=32"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types: expected 2 .* found 1",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": ["a"]}, "mlp_only_layers: expected a list of int"),
        (
            {"model_type": "qwen2", "num_attention_heads": 65, "num_key_value_heads": 65},
            "65 heads do not fit in hidden_size=64",
        ),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_model({**TINY, **changes})


def test_files_that_are_no_model(tmp_path: Path) -> None:
    for text, sentence in (
        (b"", "bad.json is empty"),
        (b'{"model_type": "llama"', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"artifact": "plan", "schema_version": 1}', 'expected "artifact": "model", found "plan"'),
        (b'{"artifact": "model", "schema_version": 99}', "schema_version is 99"),
    ):
        (tmp_path / "bad.json").write_bytes(text)
        with pytest.raises(InputError, match=sentence):
            load_model(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"cannot read .*missing.json: No such file"):
        load_model(tmp_path / "missing.json")
    with pytest.raises(InputError, match=r"cannot read .*config.json"):
        load_model(tmp_path)
    for thing in (3, None, object(), dict):
        with pytest.raises(InputError, match="cannot read a model from"):
            load_model(thing)


def test_a_wrong_layer_in_a_saved_spec_is_named(tmp_path: Path) -> None:
    save_model(load_model("mixtral-8x7b"), tmp_path / "model.json")
    tree = json.loads((tmp_path / "model.json").read_text())
    tree["blocks"][1]["layers"][3]["top_k"] = "two"
    with pytest.raises(InputError, match=r"blocks\.1\.layers\.3\.moe\.top_k: input should be a valid integer"):
        load_model(write(tmp_path / "model.json", tree))


def test_loading_a_model_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, meshwright; meshwright.load_model('gpt2'); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
