"""Malformed files through the real command line: one sentence and exit code 2, never a traceback; whole files load."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.cli import main
from meshwright.cost_models.workload import Workload
from meshwright.planner.search import make_plan
from meshwright.profiler import artifact
from meshwright.profiler.cluster import CollectiveCurve, LinkMatrix, Provenance, Source, load_cluster
from meshwright.profiler.environment import Environment, Setting
from meshwright.profiler.model import load_model
from meshwright.profiler.steps import RankMeasurement, StepMeasurement

ENVIRONMENT = Environment(
    meshwright="0.1.0", python="3.11", hosts=("a",), settings=(Setting(name="NCCL_ALGO", value="Ring"),)
)


def real_artifacts() -> dict[str, str]:
    """JSON text of one real artifact of each kind, with all its optional parts."""
    from dataclasses import replace

    source = Source(provenance=Provenance.MEASURED, reference="meshwright profile")
    curve = CollectiveCurve(
        op="all_reduce",
        num_ranks=16,
        ranks_per_node=8,
        message_bytes=(1024.0, 2048.0),
        seconds=(1e-5, 2e-5),
        spread=(0.1, 0.1),
        source=source,
    )
    rates = tuple(tuple(0.0 if i == j else 1e9 for j in range(16)) for i in range(16))
    delays = tuple(tuple(0.0 if i == j else 1e-6 for j in range(16)) for i in range(16))
    cluster = replace(
        load_cluster("h100-sxm:2"),
        collectives=(curve,),
        link_matrix=LinkMatrix(latency_s=delays, bytes_per_s=rates),
        environment=ENVIRONMENT,
        measured_at="2026-11-20T00:00:00Z",
        notes=("slow link",),
    )
    model = load_model("mixtral-8x7b")
    dense = load_model("gpt2")
    plan = make_plan(dense, Workload(seq_len=1024, global_batch_size=64), cluster, top=3)
    step = StepMeasurement(
        plan_digest=plan.digest,
        framework="meshwright",
        config=plan.config.describe(),
        step_s=1.0,
        step_s_spread=0.1,
        predicted_step_s=1.1,
        predicted_peak_bytes=10,
        losses=(5.0, 4.9),
        ranks=(RankMeasurement(rank=0, host="a", device="cpu", step_s=(1.0, 1.1), peak_bytes=None),),
        environment=ENVIRONMENT,
        measured_at="2026-11-20T00:00:00Z",
    )
    every = {"cluster": cluster, "model": model, "plan": plan, "step-measurement": step}
    return {kind: artifact.to_json(value) for kind, value in every.items()}


TEXTS = real_artifacts()
KINDS = tuple(TEXTS)

# fields without a default: a file that lacks one is malformed
REQUIRED = {
    "cluster": [("name",), ("devices",), ("tiers",), ("devices", 0, "memory_bytes"), ("tiers", 0, "latency_s")],
    "model": [("name",), ("blocks",), ("blocks", 0, "kind"), ("blocks", 1, "layers"), ("max_seq_len",)],
    "plan": [("framework",), ("config",), ("stages", 0, "chunk"), ("workload", "seq_len"), ("cost", "tp_s")],
    "step-measurement": [("step_s",), ("ranks",), ("ranks", 0, "host"), ("environment", "python"), ("losses",)],
}


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf that is not null, with its path."""
    if isinstance(tree, dict | list):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(item, (*path, key))
    elif tree is not None:
        yield path, tree


def branches(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every object and array, with its path."""
    if isinstance(tree, dict | list):
        yield path, tree
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from branches(item, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: tuple[Any, ...], value: Any) -> str:
    at(tree, path[:-1])[path[-1]] = value
    return json.dumps(tree)


def numbers(tree: Any) -> list[tuple[Any, ...]]:
    kinds = (int, float)
    return [path for path, leaf in leaves(tree) if isinstance(leaf, kinds) and not isinstance(leaf, bool)]


Mutation = Callable[[random.Random, str, str], "str | bytes"]


def truncated(draw: random.Random, kind: str, text: str) -> str:
    return text[: draw.randrange(1, len(text) - 1)]


def a_leaf_of_another_type(draw: random.Random, kind: str, text: str) -> str:
    tree = json.loads(text)
    path, leaf = draw.choice(list(leaves(tree)))
    wrong: list[Any] = [[], {}, {"value": leaf}, [leaf]]
    wrong.append(7.5 if isinstance(leaf, str) else str(leaf))
    return put(tree, path, draw.choice(wrong))


def a_branch_of_another_type(draw: random.Random, kind: str, text: str) -> str:
    tree = json.loads(text)
    path, branch = draw.choice([item for item in branches(tree) if item[0]])
    return put(tree, path, draw.choice(["word", 5, True, {"0": 1} if isinstance(branch, list) else [1]]))


def an_unknown_field(draw: random.Random, kind: str, text: str) -> str:
    tree = json.loads(text)
    _, branch = draw.choice([item for item in branches(tree) if isinstance(item[1], dict)])
    branch[draw.choice(["extra", "", "Tp", "latency_ms", "__class__"])] = 1
    return json.dumps(tree)


def a_missing_field(draw: random.Random, kind: str, text: str) -> str:
    tree = json.loads(text)
    path = draw.choice(REQUIRED[kind])
    del at(tree, path[:-1])[path[-1]]
    return json.dumps(tree)


def a_wrong_version(draw: random.Random, kind: str, text: str) -> str:
    return put(json.loads(text), ("schema_version",), draw.choice([0, 2, 99, -1, "1", 1.0, 1.5, None, True, [1], {}]))


def another_kind(draw: random.Random, kind: str, text: str) -> str:
    others: list[Any] = [other for other in KINDS if other != kind]
    return put(json.loads(text), ("artifact",), draw.choice([*others, "Plan", "", None, 3, ["plan"]]))


def not_a_number(draw: random.Random, kind: str, text: str) -> str:
    tree = json.loads(text)
    return put(tree, draw.choice(numbers(tree)), draw.choice([math.nan, math.inf, -math.inf]))


def a_number_too_large(draw: random.Random, kind: str, text: str) -> str:
    tree = json.loads(text)
    changed = put(tree, draw.choice(numbers(tree)), "HERE")
    return changed.replace('"HERE"', draw.choice(["1e999", "9" * 30, "9" * 5000, "-" + "9" * 25]))


def nested_deeply(draw: random.Random, kind: str, text: str) -> str:
    tree = json.loads(text)
    path, _ = draw.choice(list(leaves(tree)))
    depth = draw.choice([300, 5_000, 200_000])
    left, right = draw.choice([("[", "]"), ('{"a":', "}")])
    return put(tree, path, "HERE").replace('"HERE"', left * depth + "1" + right * depth)


def a_field_twice(draw: random.Random, kind: str, text: str) -> str:
    tree = json.loads(text)
    name = draw.choice(list(tree))
    return json.dumps(tree)[:-1] + f', "{name}": {json.dumps(tree[name])}}}'


def not_json(draw: random.Random, kind: str, text: str) -> str | bytes:
    tree = json.loads(text)
    broken: list[str | bytes] = [
        b"",
        b"  \n\t",
        draw.randbytes(200),
        text.encode("utf-16"),
        b"\xef\xbb\xbf" + b"\xff" + text.encode(),
        text.replace(":", "=", 1),
        text.replace('"', "'"),
        text + text,
        text + ",",
        "// a comment\n" + text,
        json.dumps([tree]),
        json.dumps(text),
        "null",
        "true",
        "17",
        repr(tree),
    ]
    return draw.choice(broken)


MUTATIONS: tuple[Mutation, ...] = (
    truncated,
    a_leaf_of_another_type,
    a_branch_of_another_type,
    an_unknown_field,
    a_missing_field,
    a_wrong_version,
    another_kind,
    not_a_number,
    a_number_too_large,
    nested_deeply,
    a_field_twice,
    not_json,
)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def command(kind: str, path: Path) -> list[object]:
    """The command that reads such a file in earnest; ``check`` where that would start ranks."""
    sizes = ["--global-batch", 64, "--seq-len", 1024, "--quiet"]
    if kind == "cluster":
        return ["plan", "gpt2", "--cluster", path, *sizes]
    if kind == "model":
        return ["plan", path, "--cluster", "h100-sxm:8", *sizes]
    return ["check", path]


def refused(code: int, out: str, err: str) -> bool:
    one_sentence = err.startswith("meshwright: ") and err.count("\n") == 1 and len(err) < 1000
    return code == 2 and out == "" and one_sentence and "Traceback" not in err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("seed", range(6))
def test_a_malformed_file_is_refused_with_one_sentence(
    kind: str, mutation: Mutation, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = mutation(random.Random(f"{kind} {mutation.__name__} {seed}"), kind, TEXTS[kind])
    path = tmp_path / f"{kind}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for args in ([*command(kind, path)], ["check", path]):
        found = run(capsys, *args)
        assert refused(*found), found


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_still_loads(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "whole.json"
    path.write_text(TEXTS[kind])
    assert run(capsys, "check", path) == (0, f"{path}: a valid {kind}\n", "")
    code, out, err = run(capsys, *command(kind, path))
    assert (code, err) == (0, "") and out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_absurd_numbers_of_the_right_type_never_end_in_a_traceback(
    kind: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zero, negative and huge values may be refused, infeasible or harmless, by what the field means."""
    draw = random.Random(f"{kind} {seed}")
    tree = json.loads(TEXTS[kind])
    path = draw.choice(numbers(tree))
    value = draw.choice([0, -1, 10**12, 2**62, 3])
    file = tmp_path / "absurd.json"
    file.write_text(put(tree, path, value))
    code, _, err = run(capsys, *command(kind, file))
    assert code in (0, 2, 3), (path, value)
    assert err.count("\n") == (code != 0)


def test_what_is_not_a_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("cluster", "plan"):
        for path in (tmp_path, tmp_path / "none.json", tmp_path / "no" / "none.json"):
            found = run(capsys, *command(kind, path))
            assert refused(*found), found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "secret.json"
    path.write_text(TEXTS["plan"])
    path.chmod(0)
    found = run(capsys, "check", path)
    assert refused(*found) and "Permission denied" in found[2]


def test_the_plan_under_test_has_what_a_plan_can_have() -> None:
    # otherwise mutations would not reach it
    tree = json.loads(TEXTS["plan"])
    assert tree["search"]["runners_up"] and tree["search"]["pareto"] and tree["assumptions"] and tree["environment"]
