"""The commands plan, estimate and schema, and how the command line answers what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.cli import main
from meshwright.planner.plan import load_plan
from meshwright.profiler import artifact
from meshwright.profiler.cluster import load_cluster

Run = Callable[..., tuple[int, str, str]]

PROBLEM = ["llama3-8b", "--cluster", "h100-sxm:2", "--global-batch", "64", "--seq-len", "4096"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, standard output, standard error."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_the_first_ten_lines_answer_what_how_fast_and_whether_it_fits(run: Run, tmp_path: Path) -> None:
    code, out, err = run("plan", *PROBLEM, "-o", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    first = "\n".join(out.splitlines()[:10])
    plan = load_plan(tmp_path / "plan.json")
    assert plan.search is not None
    assert "16 x H100" in first and f"{plan.search.num_legal:,} legal configs" in first
    for word in (plan.config.describe(), "step", "tokens", "a device", "MFU", "memory", "free", "bubble", "fit"):
        assert word in first
    assert "recommended: with fragmentation and a margin of" in first
    for heading in ("What came next", "Where the step goes", "Memory of stage", "Not taken"):
        assert heading in out
    for each in plan.search.rejected:
        assert f"{each.count:,}" in out and each.reason.value in out
    assert f"written: {tmp_path / 'plan.json'}" in out
    assert "\x1b" not in out, "no colours in a pipe"
    assert max(len(line) for line in out.splitlines() if not line.startswith("written")) <= 120


def test_json_is_the_plan_and_nothing_else(run: Run, tmp_path: Path) -> None:
    code, out, err = run("plan", *PROBLEM, "--json", "--top", "2", "--quiet", "-o", tmp_path / "plan.json")
    printed, saved = json.loads(out), json.loads((tmp_path / "plan.json").read_text())
    assert (code, err) == (0, "")
    assert printed == saved and len(printed["search"]["runners_up"]) == 1


def test_quiet_is_one_line(run: Run) -> None:
    code, out, err = run("plan", *PROBLEM, "--quiet", "--fix", "tp=2", "--fix", "zero_stage=1", "--gpus", "8")
    assert (code, err) == (0, "") and len(out.splitlines()) == 1
    assert out.startswith("tp2 ") and "zero1" in out and "a step" in out


def test_emit_writes_ranked_plans(run: Run, tmp_path: Path) -> None:
    code, _, _ = run("plan", *PROBLEM, "--emit", tmp_path / "plans", "--count", "5", "-o", tmp_path / "plan.json")
    paths = sorted((tmp_path / "plans").iterdir())
    assert code == 0 and [path.name for path in paths] == [f"plan-{place:03d}.json" for place in range(1, 6)]
    plans = [load_plan(path) for path in paths]
    assert plans[0].digest == load_plan(tmp_path / "plan.json").digest
    assert len({plan.digest for plan in plans}) == 5


def test_estimate_prices_one_config(run: Run, tmp_path: Path) -> None:
    options = ["--tp", 4, "--pp", 2, "--zero-stage", 1, "--sp", "--recompute", "full", "--micro-batch", 2]
    code, out, err = run("estimate", *PROBLEM, *options, "-o", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    config = load_plan(tmp_path / "plan.json").config
    assert config.describe() == "tp4 pp2 dp2 1f1b zero1 mbs2 sp vocab recompute-full"
    assert config.describe() in out and "Where the step goes" in out and "Not taken" not in out


def test_the_pick_estimated_again_takes_the_same_time(run: Run, tmp_path: Path) -> None:
    run("plan", *PROBLEM, "--fix", "tp=2", "--fix", "pp=2", "--fix", "schedule=1f1b", "-o", tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    config = plan.config
    options = ["--tp", 2, "--pp", 2, "--micro-batch", config.micro_batch_size, "--zero-stage", config.zero_stage]
    options += ["--recompute", config.recompute.value, "--sp" if config.sequence_parallel else "--no-sp"]
    code, out, _ = run("estimate", *PROBLEM, *options, "--json")
    assert code == 0 and plan.cost is not None
    assert json.loads(out)["cost"]["compute_s"] == plan.cost.compute_s


def test_estimate_says_whether_it_fits_and_whether_it_is_recommended(run: Run) -> None:
    config = ["--zero-stage", 2, "--micro-batch", 1]
    code, out, err = run("estimate", *PROBLEM, *config, "--memory-margin", 0.5)
    assert (code, err) == (0, "") and "DOES NOT FIT" not in out
    assert "NOT RECOMMENDED, though it fits: with fragmentation and a margin of 50.0% it needs" in out
    assert "tight: most of it is " in out and "margin of 50.0%, as asked for" in out
    code, out, _ = run("estimate", *PROBLEM, *config, "--memory-margin", 0.5, "-q")
    assert code == 0 and out.endswith(" a step, fits but is not recommended\n")
    code, out, _ = run("estimate", *PROBLEM, *config, "--memory-margin", 0)
    assert code == 0 and "fits; no margin was asked for" in out and "no margin kept" in out
    code, out, _ = run("estimate", *PROBLEM, *config, "--memory-margin", 0.5, "--json")
    plan = json.loads(out)
    assert code == 0 and plan["memory_margin"] == {"share": 0.5, "source": "asked for"}
    assert {"moment", "fragmentation_bytes", "working_bytes"} <= plan["memory"].keys()


def test_what_fits_but_for_the_margin_is_counted_apart(run: Run) -> None:
    code, out, _ = run("plan", *PROBLEM, "--memory-margin", 0.3)
    assert code == 0 and "predicted memory fits, but not with the margin" in out and "MEMORY_MARGIN" in out
    code, out, _ = run("plan", *PROBLEM, "--memory-margin", 0)
    assert code == 0 and "MEMORY_MARGIN" not in out and "fits; no margin was asked for" in out


def test_nothing_recommended_says_how_to_take_what_fits(run: Run) -> None:
    fixed = ["--fix", "dp=16", "--fix", "zero_stage=2", "--fix", "recompute=none", "--fix", "micro_batch_size=1"]
    code, out, err = run("plan", *PROBLEM, *fixed, "--memory-margin", 0.9)
    assert (code, out) == (3, "") and err.count("\n") == 1
    assert "nothing is recommended, though 1 config fits: nearest is dp16 zero2 mbs1, which needs" in err
    share = err.partition("--memory-margin ")[2].split()[0]
    assert run("plan", *PROBLEM, *fixed, "--memory-margin", share, "-q")[0] == 0


def test_estimate_of_what_does_not_fit_is_printed_and_exits_with_3(run: Run) -> None:
    code, out, err = run("estimate", *PROBLEM)
    assert code == 3 and "DOES NOT FIT" in out
    assert err.startswith("meshwright: dp16 mbs1 does not fit: stage 0 needs ") and err.endswith("too much\n")
    code, out, _ = run("estimate", *PROBLEM, "-q")
    assert code == 3 and out.endswith(" a step, does not fit\n")


BAD_INPUT = [
    (["plan", "llama3-9b", *PROBLEM[1:]], 2, "llama3-8b"),
    (["plan", "llama3-8b", "--cluster", "h100-sxn:2", *PROBLEM[3:]], 2, "h100-sxm"),
    (["plan", "llama3-8b", "--cluster", "h100-sxm:0", *PROBLEM[3:]], 2, "h100-sxm:0"),
    (["plan", "llama3-8b", "--cluster", "h100-sxm:x", *PROBLEM[3:]], 2, "h100-sxm:x"),
    (["plan", *PROBLEM, "--framework", "pytorch"], 2, "unknown framework 'pytorch': expected one of meshwright"),
    (["plan", *PROBLEM, "--dtype-recipe", "int4"], 2, "unknown dtype recipe 'int4': expected one of bf16"),
    (["plan", *PROBLEM, "--optimizer", "lion"], 2, "unknown optimizer 'lion': expected one of adamw, sgd"),
    (["plan", *PROBLEM, "--fix", "tp=3"], 2, "tp=3 is not possible here: it can be 1, 2, 4, 8, 16"),
    (["plan", *PROBLEM, "--fix", "tensor=3"], 2, "a config has no field 'tensor'"),
    (["plan", *PROBLEM, "--gpus", "12"], 2, "12 devices do not fill whole nodes of h100-sxm:2: take 8 or 16"),
    (["plan", *PROBLEM, "--memory-margin", "1.5"], 2, "a share from 0 up to 1, found 1.5"),
    (["plan", *PROBLEM, "-o", "/no/such/folder/plan.json"], 2, "cannot write /no/such/folder/plan.json"),
    (["plan", *PROBLEM, "--fix", "dp=16", "--fix", "micro_batch_size=64"], 3, "no legal way to split llama3-8b"),
    (["plan", "gpt3-175b", "--cluster", "h100-sxm:1", "--global-batch", "8", "--seq-len", "2048"], 3, "nothing fits"),
    (["estimate", *PROBLEM, "--tp", "3"], 2, "tp=3 does not divide 16 devices"),
    (["estimate", *PROBLEM, "--tp", "3", "--gpus", "3"], 2, "tp=3 does not divide 32 heads"),
    (["estimate", *PROBLEM, "--schedule", "1b1f"], 2, "unknown schedule '1b1f': expected one of gpipe"),
    (["estimate", *PROBLEM, "--tp", "2", "--dp", "4"], 2, "8 ranks, not 16 devices"),
    (["schema", "plam"], 2, "unknown artifact 'plam' (did you mean plan?)"),
    (["plan"], 2, "Missing argument 'MODEL'"),
    (["plan", "llama3-8b"], 2, "Missing option '--cluster'"),
    (["plan", *PROBLEM, "--tpo", "4"], 2, "--tpo"),
    (["plan", *PROBLEM[:-1], "many"], 2, "--seq-len"),
    (["plan", *PROBLEM[:-1], "0"], 2, "--seq-len"),
    (["plan", *PROBLEM, "extra"], 2, "extra"),
    (["plna"], 2, "plna"),
]


@pytest.mark.parametrize(("args", "code", "sentence"), BAD_INPUT, ids=[row[2] for row in BAD_INPUT])
def test_bad_input_is_answered_with_one_sentence(run: Run, args: list[str], code: int, sentence: str) -> None:
    found, out, err = run(*args)
    assert (found, out) == (code, "")
    assert err.startswith("meshwright: ") and sentence in err
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("name", ["plan", "cluster", "model", "step-measurement", "topology"])
def test_schemas_are_printed(run: Run, name: str) -> None:
    code, out, _ = run("schema", name)
    schema = json.loads(out)
    assert code == 0 and schema["additionalProperties"] is False
    assert schema["properties"]["artifact"]["const"] == name
    assert schema["properties"]["schema_version"]["type"] == "integer"


def test_a_saved_cluster_plans_as_its_preset_does(run: Run, tmp_path: Path) -> None:
    artifact.save(load_cluster("h100-sxm:2"), tmp_path / "cluster.json")
    by_name, by_file = (
        run("plan", *PROBLEM[:2], source, *PROBLEM[3:], "-q") for source in ("h100-sxm:2", tmp_path / "cluster.json")
    )
    assert by_name == by_file


@pytest.mark.parametrize("command", ["plan", "estimate", "schema"])
def test_help_shows_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and f"Example: meshwright {command}" in " ".join(out.split())


@pytest.mark.parametrize("command", ["plan", "estimate", "profile", "measure", "dry-run"])
def test_help_says_every_default(run: Run, command: str) -> None:
    # what stands in square brackets is markup to rich, and gone
    _, out, _ = run(command, "--help")
    words = " ".join(out.replace("│", " ").split())
    assert " ." not in words and "(default: " in words


def test_version_and_bare_command(run: Run) -> None:
    assert run("--version")[:2] == (0, "meshwright 0.1.0\n")
    code, out, _ = run()
    assert code == 2 and "Commands" in out


def test_a_terminal_that_knows_only_ascii_still_gets_its_answer() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshwright.cli", "plan", *PROBLEM],
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"") and b"Where the step goes" in done.stdout
