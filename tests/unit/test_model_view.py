"""``meshwright model show`` and ``model presets``: what people see, what scripts read, the sentences for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright import cli
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import load_model
from meshwright.profiler.model_presets import model_presets
from meshwright.terminal.model_view import describe_layer, describe_places


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["model", *args])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_show_says_size_layers_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", "deepseek-v3")
    assert code == 0
    assert "671 B parameters (671,026,404,352), 37.6 B active per token" in out
    assert "8 of 256 experts, 7,168 x 2,048, shared 2,048" in out
    assert "mla, 128 heads of 128+64, latents 1536 and 512" in out
    assert "huggingface.co/deepseek-ai/DeepSeek-V3" in out
    assert "note: 1 multi-token prediction layer(s) are not counted" in out
    shares = [float(word[:-1]) for line in out.splitlines() for word in line.split() if word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_equal_blocks_are_shown_once_with_their_places(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "show", "gpt-oss-120b")[1]
    assert "64 heads in 36 layers (18 with a window of 128, all of experts)" in out
    assert "0, 2, ... 34     18  norm" in out and "1, 3, ... 35     18  norm" in out
    assert out.count("4 of 128 experts") == 2
    assert "61 layers (58 of experts)" in run(capsys, "show", "deepseek-v3")[1]


def test_places_in_words() -> None:
    for places, words in (
        ([], ""),
        ([7], "7"),
        ([0, 1, 2, 4], "0-2, 4"),
        ([0, 2, 4], "0, 2, 4"),
        ([0, 1, 3, 4, 6, 8], "0-1, 3-4, ... 8"),
    ):
        assert describe_places(places) == words


def test_a_capacity_is_told() -> None:
    layer = MoeLayer(hidden=8, num_experts=4, top_k=2, expert_ffn_size=16, capacity_factor=1.25, group_tokens=2048)
    assert describe_layer(layer) == "2 of 4 experts, 8 x 16, capacity 1.25 in groups of 2,048"


def test_json_is_a_model_file_and_output_writes_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "show", "gpt2", "--json", "--output", str(tmp_path / "model.json"))
    assert code == 0
    (tmp_path / "printed.json").write_text(out)
    spec = load_model("gpt2")
    assert load_model(tmp_path / "printed.json") == load_model(tmp_path / "model.json") == spec


def test_quiet_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "show", "gpt2", "--quiet")[1] == "gpt2-small (gpt2): 124 M parameters (124,439,808)\n"
    names = run(capsys, "presets", "--quiet")[1].splitlines()
    assert names == [preset.name for preset in model_presets()]


def test_presets_in_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "presets", "qwen3-30b")
    assert code == 0 and "qwen3-30b-a3b" in out
    assert "30.5 B  3.35 B  8 of 128" in out and "gqa 32/4" in out
    listed = json.loads(run(capsys, "presets", "--json")[1])
    assert len(listed) == len(model_presets())
    assert all(load_model(entry["config"]).digest == load_model(entry["name"]).digest for entry in listed)


def test_mistakes_are_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for args, sentence in (
        (("show", "lama3-8b"), "nearest presets are llama3-8b"),
        (("presets", "nothing-like-it"), "no preset's name contains 'nothing-like-it'"),
        (("show", "gpt2", "-o", "/nowhere/at/all.json"), "cannot write /nowhere/at/all.json"),
    ):
        code, out, err = run(capsys, *args)
        assert code == 2 and out == ""
        assert sentence in err and err.count("\n") == 1


def test_every_layer_of_every_preset_has_words() -> None:
    for preset in model_presets():
        assert all(describe_layer(layer) for layer in load_model(preset.name).layers())
    window = load_model("mistral-7b").attention
    assert describe_layer(window) == "gqa, 32 heads of 128, 8 key/value heads, window 4,096"
    assert describe_layer(load_model("opt-125m").embedding) == "50,272 tokens, 2,050 positions x 768"
