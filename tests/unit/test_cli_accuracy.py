from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from meshwright.cli import main
from meshwright.cost_models.scorecard import validate

RUN = {
    "id": "a-1", "family": "a", "gpu_type": "A100-80GB-SXM", "gpus_per_node": "8", "num_gpus": "4",
    "interconnect": "NVLink", "framework": "Megatron-DeepSpeed", "model": "gpt", "arch_family": "gpt",
    "layers": "12", "hidden": "1024", "heads": "16", "kv_heads": "16", "ffn": "4096", "vocab": "50257",
    "seq_len": "1024", "precision": "fp16", "tp": "1", "pp": "2", "vpp": "1", "dp": "2", "cp": "1", "ep": "1",
    "micro_batch": "2", "global_batch": "16", "recompute": "full", "schedule": "1f1b", "step_time_s": "0.2",
    "usable_for": "time", "status": "ok", "peak_mem_gb": "",
}  # fmt: skip
TABLE = Path(os.environ.get("MESHWRIGHT_VALIDATION", Path(__file__).parents[3] / "shared" / "validation")) / "dev.csv"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    rows = [
        RUN,
        RUN | {"id": "a-2", "tp": "2", "dp": "1", "step_time_s": ""},
        RUN | {"id": "b-1", "family": "b", "framework": "MaxText (JAX)"},
    ]
    path = tmp_path / "runs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(RUN))
        writer.writeheader()
        writer.writerows(rows)
    return path


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return int(exit_.value.code or 0)


def test_the_scorecard_on_the_screen(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("validate", str(runs)) == 0
    shown = capsys.readouterr()
    assert "Step time" in shown.out
    assert "no target for framework 'MaxText (JAX)'" in shown.out
    assert shown.err == ""


def test_json_and_nothing_else(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("validate", str(runs), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["id"] for row in rows] == ["a-1", "a-2", "b-1"]
    assert rows[0]["predicted_step_time_s"] > 0
    assert rows[0]["measured_step_time_s"] == 0.2
    assert rows[1]["predicted_step_time_s"] > 0  # its measured columns are blank
    assert rows[1]["measured_step_time_s"] is None
    assert rows[2]["predicted_step_time_s"] is None
    assert "no target" in rows[2]["skipped_reason"]
    assert {"id", "predicted_step_time_s", "predicted_peak_bytes", "fits", "skipped_reason"} <= rows[0].keys()


def test_one_family(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("validate", str(runs), "--family", "b", "--json") == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["b-1"]


def test_a_family_that_is_not_there(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("validate", str(runs), "--family", "c") == 2
    assert "no row of family 'c': there are a, b" in capsys.readouterr().err


def test_the_plot(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert code_of("validate", str(runs), "--plot", str(tmp_path / "accuracy.svg")) == 0
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "accuracy.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize("content", ["", "id,family\n1,a\n", "\x00\x01", 'id\n"'])
def test_a_file_that_is_no_table_is_one_sentence(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.csv").write_text(content, encoding="utf-8")
    assert code_of("validate", str(tmp_path / "bad.csv")) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("meshwright: ")
    assert shown.err.count("\n") == 1


@pytest.mark.skipif(not TABLE.is_file(), reason="the table of published runs is not here")
def test_every_published_run_is_predicted_or_has_a_reason() -> None:
    card = validate(TABLE)
    for row in card.rows:
        assert (row.predicted_step_s is None) == (row.skipped_reason is not None), row.row_id
        assert row.predicted_step_s is None or row.predicted_step_s > 0, row.row_id
    skipped = sum(row.skipped_reason is not None for row in card.rows)
    assert skipped < 0.1 * len(card.rows)
