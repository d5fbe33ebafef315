"""Meshwright: decide how a PyTorch model is split over a cluster, and apply the decision.

The story in one line, which is also the order of imports (they point left only)::

    facts            predictions        choice         action        words
    profiler   <--   cost_models   <--  planner  <--   executors <-- cli

* ``meshwright.profiler`` knows what the machines and the model *are* (measured, or from datasheets);
* ``meshwright.cost_models`` predicts what a way of splitting *would* cost in time and memory;
* ``meshwright.planner`` scores every legal way and chooses;
* ``meshwright.executors`` applies the choice to a torch model and runs it;
* ``meshwright.cli`` talks.

Importing this package imports neither torch nor numpy: the public names below are looked up when first used.

Errors::

    Error                    anything Meshwright says on purpose
    +-- InputError           a file, a name or a value that you gave is wrong (command line exit code 2)
    +-- InfeasibleError      a well-formed request that has no answer: nothing legal, nothing fits (exit code 3)
    +-- RunError             a real run went wrong: a rank died, hung, or ran out of memory (exit code 3)

Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


class Error(Exception):
    """Base of every error that Meshwright raises on purpose; ``str(error)`` is one clear sentence."""


class InputError(Error, ValueError):
    """A file, a name or a value given by the user is wrong; the message says which, and what was expected."""


class InfeasibleError(Error):
    """A well-formed request without an answer; the message says the nearest miss, with its numbers."""


class RunError(Error):
    """A real run failed: a rank died, hung or ran out of memory; the message names the rank."""


# public name -> the module that defines it
_PUBLIC = {
    "ClusterProfile": "meshwright.profiler.cluster",
    "load_cluster": "meshwright.profiler.cluster",
    "ModelSpec": "meshwright.profiler.model",
    "load_model": "meshwright.profiler.model",
    "save_model": "meshwright.profiler.model",
    "trace_model": "meshwright.profiler.trace",
    "StepMeasurement": "meshwright.profiler.steps",
    "Workload": "meshwright.cost_models.workload",
    "ParallelConfig": "meshwright.cost_models.strategy",
    "estimate": "meshwright.cost_models.step",
    "Plan": "meshwright.planner.plan",
    "load_plan": "meshwright.planner.plan",
    "make_plan": "meshwright.planner.search",
    "parallelize": "meshwright.executors.apply",
    "ParallelModel": "meshwright.executors.parallel_model",
    "DryRun": "meshwright.executors.dry_run",
    "dry_run": "meshwright.executors.dry_run",
}

__all__ = ["Error", "InfeasibleError", "InputError", "RunError", "__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used, so that ``import meshwright`` stays instant."""
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'meshwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
