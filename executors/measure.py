"""Plan files in, measurement files out: what ``meshwright measure`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from meshwright.executors.checks import check_cluster
from meshwright.executors.hf_model import HuggingFaceModel
from meshwright.executors.run import UnfinishedRun, measure_plans
from meshwright.executors.spec_model import build_spec_model
from meshwright.planner.plan import load_plan
from meshwright.profiler import artifact
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.peers import launcher_ranks
from meshwright.profiler.steps import StepMeasurement


def measure_files(
    plans: Sequence[Path],
    *,
    model: Path | None = None,
    cluster: str | None = None,
    steps: int = 10,
    warmup: int = 3,
    device: str = "auto",
    timeout_s: float = 600.0,
    output: Path | None = None,
    on_progress: Callable[[float, str], None] = lambda share, text: None,
) -> tuple[StepMeasurement, ...]:
    """Measure the plans in the files ``plans``; empty on ranks other than 0 among a launcher's.

    ``model`` is a Hugging Face config to build the model from. Measurements are kept in ``output`` after each round: a
    file for one plan, a folder of files named after the plans for several. ``cluster`` is the profile (or preset) of
    the machines that this runs on.

    Raises:
        InputError: a plan was made for another cluster than ``cluster``; as ``load_plan`` and ``measure_plans`` do, or
            ``output`` cannot be written.
        UnfinishedRun: a rank died or hung; the message says which, and where what was measured is.
    """
    loaded = [load_plan(path) for path in plans]
    if cluster:
        profile = load_cluster(cluster)
        for plan in loaded:
            check_cluster(plan, profile)
    joined = launcher_ranks()
    is_told = not joined or joined[0] == 0
    if output and len(plans) == 1 and is_told:
        artifact.check_writable(output)

    def keep(measurements: tuple[StepMeasurement, ...]) -> None:
        on_progress(len(measurements[0].losses) / steps, f"step {len(measurements[0].losses)} of {steps}")
        if output and len(plans) == 1:
            artifact.save(measurements[0], output)
        elif output:
            output.mkdir(parents=True, exist_ok=True)
            for path, measurement in zip(plans, measurements, strict=True):
                artifact.save(measurement, output / path.name)

    build = HuggingFaceModel(model) if model else build_spec_model
    try:
        found = measure_plans(
            loaded,
            build_model=build,
            steps=steps,
            warmup=warmup,
            device=device,
            timeout_s=timeout_s,
            on_step=keep,
        )
    except UnfinishedRun as error:
        if output is None or not error.measurements:
            raise
        kept = f"; the {len(error.measurements[0].losses)} steps measured before are in {output}"
        raise UnfinishedRun(f"{error}{kept}", error.measurements) from None
    return found if is_told else ()
