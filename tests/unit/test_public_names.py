"""Every public name says what it is; every public name that meshwright promises is there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshwright

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("profiler", "cost_models", "planner", "executors", "terminal")
FILES = [
    ROOT / "__init__.py",
    *sorted(ROOT.glob("cli*.py")),
    *sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
]

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Documented]]:
    """Functions, classes and their methods without a leading underscore."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    bare = [name for name, node in public(tree.body) if not ast.get_docstring(node)]
    assert not bare, f"without a docstring in {path.relative_to(ROOT)}: {', '.join(bare)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_says_more_than_the_name(path: Path) -> None:
    empty = [
        name
        for name, node in public(ast.parse(path.read_text(encoding="utf-8")).body)
        if len(words(ast.get_docstring(node) or "") - words(node.name) - {"a", "the", "of"}) < 2
    ]
    assert not empty, f"nothing but its name in {path.relative_to(ROOT)}: {', '.join(empty)}"


def words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


@pytest.mark.parametrize("name", sorted(set(meshwright.__all__) - {"__version__"}))
def test_each_promised_name_is_there_and_documented(name: str) -> None:
    found = getattr(meshwright, name)
    text = inspect.getdoc(found) or ""
    assert len(text) > 20 and "." in text, name
    assert dataclasses.is_dataclass(found) or callable(found)


def test_dir_lists_the_promised_names_and_others_are_refused() -> None:
    assert dir(meshwright) == sorted(meshwright.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'paralelize'"):
        _ = meshwright.paralelize


def test_public_functions_name_the_errors_that_they_raise() -> None:
    # what a user calls first must say what can go wrong
    functions = [name for name in meshwright.__all__ if inspect.isfunction(getattr(meshwright, name))]
    assert len(functions) > 6
    for name in functions:
        assert re.search(r"[Rr]aises:?\s+(``)?In", inspect.getdoc(getattr(meshwright, name)) or ""), name


def test_the_example_that_plans_from_python_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "plan_from_python.py")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("a step", "tokens/s", "smallest of those", "nothing fits"):
        assert words in done.stdout


def test_modules_of_planning_import_one_by_one() -> None:
    for path in FILES:
        relative = path.relative_to(ROOT).with_suffix("")
        if relative.parts[0] in ("planner", "cost_models", "terminal"):
            importlib.import_module(".".join(("meshwright", *relative.parts)).removesuffix(".__init__"))
