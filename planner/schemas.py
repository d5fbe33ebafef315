"""The published JSON Schemas, by the artifact's name."""

from __future__ import annotations

import difflib
import json
from importlib import import_module

from meshwright import InputError
from meshwright.profiler.artifact import json_schema

# artifact -> the module and the record that defines it
ARTIFACTS = {
    "cluster": ("meshwright.profiler.cluster", "ClusterProfile"),
    "model": ("meshwright.profiler.model", "ModelSpec"),
    "plan": ("meshwright.planner.plan", "Plan"),
    "step-measurement": ("meshwright.profiler.steps", "StepMeasurement"),
    "topology": ("meshwright.profiler.emulate", "Topology"),
}


def schema_of(artifact: str) -> str:
    """JSON Schema of an artifact, as text. Raises ``InputError`` naming the known ones."""
    if artifact not in ARTIFACTS:
        near = difflib.get_close_matches(artifact, ARTIFACTS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"unknown artifact {artifact!r}{hint}: expected one of {', '.join(ARTIFACTS)}")
    module, record = ARTIFACTS[artifact]
    return json.dumps(json_schema(getattr(import_module(module), record)), indent=2)
