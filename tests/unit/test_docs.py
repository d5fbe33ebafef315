"""What README and docs tell users to type exists: commands, options, files, imports, and the sentences of errors."""

from __future__ import annotations

import ast
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import meshwright
from meshwright import cli
from meshwright.cost_models.strategy import REASONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS_OPTIONS = {"--gpus-per-node", "--gpus-per-task"}  # Slurm's

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# -- reading pages --------------------------------------------------------------------------------------------------


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def typed_lines(page: Path) -> list[str]:
    """Lines of code blocks that are no Python, continued lines joined, prompts taken off."""
    text = re.sub(r"^```(?:python|json)\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\\\n\s*", " ", text)
    return [line.strip().removeprefix("$ ") for line in text.splitlines() if line.startswith("    ")]


def commands(page: Path) -> list[list[str]]:
    """The words after ``meshwright`` of each command that a user is told to type, launchers and all."""
    found = []
    for line in typed_lines(page):
        words = shlex.split(line, comments=True) if line.startswith(("meshwright ", "torchrun ", "srun ")) else []
        found += [words[index + 1 :] for index, word in enumerate(words) if word == "meshwright"]
    return found


def inline_code(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    return re.findall(r"`([^`]+)`", prose)


# -- the command line -----------------------------------------------------------------------------------------------


@lru_cache
def every_command() -> dict[str, Any]:
    """Each command by its words, groups followed: ``cluster show``."""
    found: dict[str, Any] = {}

    def add(prefix: str, command: Any) -> None:
        for name, child in getattr(command, "commands", {}).items():
            add(f"{prefix} {name}".strip(), child)
        if not hasattr(command, "commands"):
            found[prefix] = command

    add("", typer.main.get_command(cli.app))
    return found


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    for length in (2, 1):
        if " ".join(words[:length]) in every_command():
            return every_command()[" ".join(words[:length])], words[length:]
    raise AssertionError(f"no command 'meshwright {' '.join(words)}'")


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def parse(words: list[str]) -> None:
    """Read a command line as the real one would be, without running it."""
    if words in (["--help"], ["--version"]):
        return
    command, rest = resolve(words)
    command.make_context("meshwright", list(rest))


@by_page
def test_commands_to_type_are_ones_that_parse(page: Path) -> None:
    for words in commands(page):
        parse(words)


def test_pages_have_commands_to_check() -> None:
    named = {" ".join(words[:2]) for page in PAGES for words in commands(page)}
    assert {"plan llama3-8b", "profile -o", "measure plan.json", "emulate --topology", "model show"} <= named


@pytest.mark.parametrize(
    "words",
    ["plan llama3-8b --clutser x", "plam", "measure", "plan m --cluster c --global-batch many --seq-len 8", "check"],
)
def test_a_wrong_command_would_be_seen(words: str) -> None:
    with pytest.raises((AssertionError, cli._UsageError)):
        parse(words.split())


@by_page
def test_commands_and_options_in_prose_exist(page: Path) -> None:
    everywhere = OTHERS_OPTIONS | {"--help", "--version"}
    for command in every_command().values():
        everywhere |= options_of(command)
    for code in inline_code(page):
        words = code.split()
        if words[0] == "meshwright" and len(words) > 1 and not words[1].startswith("-"):
            command, words = resolve(words[1:])
            known = options_of(command)
        else:
            known = everywhere
        if code.startswith(("meshwright ", "--")):
            unknown = {word.partition("=")[0] for word in words if word.startswith("-")} - known
            assert not unknown, f"{page.name}: `{code}` has {unknown}"


@pytest.mark.parametrize("name", every_command())
def test_help_ends_with_an_example_that_parses(name: str) -> None:
    shown = CliRunner().invoke(cli.app, [*name.split(), "--help"])
    assert shown.exit_code == 0 and "Example: meshwright " + name in " ".join(shown.output.split())
    example = shlex.split(every_command()[name].epilog.removeprefix("Example: meshwright "))
    parse(example[: example.index(">")] if ">" in example else example)


def test_every_command_is_told_of() -> None:
    told = " ".join(code for page in PAGES for code in inline_code(page))
    told += " ".join("meshwright " + " ".join(words) for page in PAGES for words in commands(page))
    assert not [name for name in every_command() if f"meshwright {name}" not in told]


def test_every_reason_is_explained() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    assert not [reason for reason in REASONS if f"`{reason.value}`" not in page]


# -- links and files ------------------------------------------------------------------------------------------------


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


@by_page
def test_files_named_in_prose_exist(page: Path) -> None:
    rooms = [ROOT, page.parent, ROOT / "cost_models"]
    for code in inline_code(page):
        if re.fullmatch(r"[\w./-]+\.(py|md)", code):
            assert any((room / code).exists() for room in rooms), f"{page.name} names {code}"


@by_page
def test_scripts_to_run_exist(page: Path) -> None:
    for line in typed_lines(page):
        for script in re.findall(r"\bexamples/[\w.]+", line):
            assert (ROOT / script).exists(), f"{page.name}: {line}"


def test_every_page_is_on_the_map() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in readme]


# -- Python ---------------------------------------------------------------------------------------------------------


def source_of(module: str) -> Path | None:
    """The file of one of our modules, or of an example; None for others'."""
    if module == "meshwright":
        return ROOT / "__init__.py"
    path = ROOT.joinpath(*module.split(".")[1:])
    if not module.startswith("meshwright."):
        path = ROOT / "examples" / module
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


def names_in(path: Path) -> set[str]:
    """Names that a module defines or imports at its top level: read, not imported, since some import torch."""
    names = set(meshwright.__all__) if path == ROOT / "__init__.py" else set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return names


@lru_cache
def parallel_names() -> set[str]:
    tree = ast.parse((ROOT / "executors" / "parallel_model.py").read_text())
    (record,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ParallelModel")
    methods = {node.name for node in record.body if isinstance(node, ast.FunctionDef)}
    return methods | {node.attr for node in ast.walk(record) if isinstance(node, ast.Attribute)}


def unknown_names(block: str) -> set[str]:
    unknown = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module and (path := source_of(node.module)):
            unknown |= {alias.name for alias in node.names} - names_in(path)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("meshwright"):
            unknown.add(str(node.module))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            known = {"meshwright": set(meshwright.__all__), "parallel": parallel_names()}.get(node.value.id)
            if known is not None and node.attr not in known:
                unknown.add(f"{node.value.id}.{node.attr}")
    return unknown


@by_page
def test_python_compiles_and_names_what_exists(page: Path) -> None:
    for number, block in enumerate(python_blocks(page), start=1):
        compile(block, f"{page.name}, block {number}", "exec")
        assert not unknown_names(block), f"{page.name}, block {number}"


def test_a_wrong_name_would_be_seen() -> None:
    block = "import meshwright\nfrom llama import Lama\nfrom meshwright.planner.plans import x\n"
    assert unknown_names(block + "meshwright.paralelize(parallel.stepp)") == {
        "Lama", "meshwright.planner.plans", "meshwright.paralelize", "parallel.stepp",
    }  # fmt: skip


# -- sentences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("plan llama3-9b --cluster h100-sxm:1 --global-batch 8 --seq-len 2048", 2),
        ("plan llama3-8b --cluster h100-smx:8 --global-batch 8 --seq-len 2048", 2),
        ("plan llama3-8b --clutser x", 2),
        ("plan llama3-8b --cluster h100-sxm:8 --global-batch 512 --seq-len 8192 --gpus 12", 2),
        ("plan llama3-8b --cluster h100-sxm:8 --global-batch 512 --seq-len 8192 --fix tp=3", 2),
        ("estimate llama3-8b --cluster h100-sxm:8 --global-batch 512 --seq-len 8192 --cp 2 --framework llm-foundry", 2),
        ("plan gpt2-small --cluster h100-sxm:8 --global-batch 512 --seq-len 8192", 2),
        ("plan gpt3-175b --cluster h100-sxm:1 --global-batch 512 --seq-len 2048", 3),
    ],
)
def test_errors_are_those_of_the_page(line: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    said = " ".join(capsys.readouterr().err.split())
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    assert stopped.value.code == code
    assert re.sub(r"[\d.]+ GiB", "", said)[:75] in re.sub(r"[\d.]+ GiB", "", page), said
