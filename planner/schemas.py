"""The artifacts by name: their JSON Schemas, and reading a file of any kind."""

from __future__ import annotations

import difflib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from meshwright import InputError
from meshwright.profiler import artifact

# artifact -> the module and the record that defines it
ARTIFACTS = {
    "cluster": ("meshwright.profiler.cluster", "ClusterProfile"),
    "model": ("meshwright.profiler.model", "ModelSpec"),
    "plan": ("meshwright.planner.plan", "Plan"),
    "step-measurement": ("meshwright.profiler.steps", "StepMeasurement"),
    "topology": ("meshwright.profiler.topology_file", "EmulatedTopology"),
}


def schema_of(name: str) -> str:
    """JSON Schema of an artifact, as text. Raises ``InputError`` naming the known ones."""
    return json.dumps(artifact.json_schema(_record(name)), indent=2)


def load_any(path: str | Path) -> tuple[str, Any]:
    """The kind of a file's artifact, and the artifact. Raises ``InputError`` as ``artifact.load`` does."""
    name = artifact.kind_of(path)
    record = _record(name)
    version = record.__dataclass_fields__["schema_version"].default
    return name, artifact.load(record, path, artifact=name, schema_version=version)


def _record(name: str) -> Any:
    if name not in ARTIFACTS:
        near = difflib.get_close_matches(name, ARTIFACTS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        shown = name if len(name) <= 40 else name[:37] + "..."
        raise InputError(f"unknown artifact {shown!r}{hint}: expected one of {', '.join(ARTIFACTS)}")
    module, record = ARTIFACTS[name]
    return getattr(import_module(module), record)
