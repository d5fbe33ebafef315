"""The arrows of the house: imports point left only, and planning starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# left to right; a file may import from its own room and from those before it
ROOMS = ("profiler", "cost_models", "planner", "executors", "terminal", "cli")

TORCH_FREE = ("cost_models", "planner", "terminal", "cli")  # not even inside a function


def sources() -> list[Path]:
    return [*sorted(path for room in ROOMS[:-1] for path in (ROOT / room).rglob("*.py")), *sorted(ROOT.glob("cli*.py"))]


def room_of(path: Path) -> str:
    return room_named(path.relative_to(ROOT).parts[0].removesuffix(".py"))


def room_named(name: str) -> str:
    return "cli" if name.startswith("cli_") else name


def imported(path: Path) -> list[str]:
    """Names of the modules that a file imports; type-checking blocks count as imports, they point left too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_every_file_is_looked_at() -> None:
    assert len(sources()) > 20
    assert {room_of(path) for path in sources()} == set(ROOMS)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    allowed = ROOMS[: ROOMS.index(room_of(path)) + 1]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in ROOMS, f"{path.name} imports {name}: say meshwright.{name}"
        if parts[0] == "meshwright" and len(parts) > 1 and room_named(parts[1]) in ROOMS:
            assert room_named(parts[1]) in allowed, (
                f"{path.name} is in {room_of(path)} and imports {name}, which is to its right"
            )


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_stays_where_it_belongs(path: Path) -> None:
    names = imported(path)
    if room_of(path) in TORCH_FREE:
        assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")]


LEAVES_TORCH_OUT = [
    "import meshwright",
    "import meshwright; meshwright.load_model('llama3-8b'); meshwright.load_cluster('h100-sxm:2')",
    "from meshwright.cli import main; main(['--help'])",
    "from meshwright.cli import main; main(['plan', '--help'])",
    "from meshwright.cli import main; main(['schema', 'plan'])",
    "from meshwright.cli import main; main('plan gpt2 --cluster h100-sxm:1 --global-batch 16 --seq-len 1024'.split())",
    "from meshwright.cli import main; "
    "main('estimate gpt2 --cluster h100-sxm:1 --global-batch 16 --seq-len 1024 --tp 4'.split())",
]


@pytest.mark.parametrize("statement", LEAVES_TORCH_OUT)
def test_planning_starts_without_torch(statement: str) -> None:
    code = f"""
import sys
try:
    {statement}
except SystemExit as end:
    assert not end.code, end.code
heavy = sorted({{"torch", "transformers", "matplotlib", "optuna", "networkx", "pulp"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, meshwright; assert not {'numpy', 'pydantic', 'rich', 'typer'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_writing_a_plan_needs_no_pydantic() -> None:
    # its import alone costs a good part of the time that a plan takes
    code = (
        "import sys; from meshwright.profiler.artifact import digest, to_json; "
        "from meshwright.cost_models.strategy import ParallelConfig; "
        "to_json(ParallelConfig()), digest(ParallelConfig()); assert 'pydantic' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_every_package_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    on_disk = {"meshwright"}
    for room in ROOMS[:-1]:
        for init in (ROOT / room).rglob("__init__.py"):
            on_disk.add(".".join(("meshwright", *init.parent.relative_to(ROOT).parts)))
    assert sorted(listed) == sorted(on_disk)


def test_without_torch_measuring_says_what_to_install() -> None:
    hidden = (
        "import sys; sys.modules['torch'] = None; from meshwright.cli import main; main(['profile', '-o', 'x.json'])"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "meshwright: measuring and running need torch: pip install torch (2.11 or newer)\n"
