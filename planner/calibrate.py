"""Measured steps of plans -> a cluster whose predictions agree with them: what ``meshwright calibrate`` does.

A handful of steps corrects what a profile cannot see: what the target's Python costs between kernels, how much slower
kernels run inside a step than alone, and how much communication hides. The constants are those of
``cost_models/constants.py``: of the devices, and of the target that was measured; links stay as profiled. They go into
``ClusterProfile.calibrated``, and every prediction on that cluster uses them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.cost_models.calibration import fit
from meshwright.cost_models.constants import Value, on_cluster, on_framework, value_on
from meshwright.cost_models.estimate import step_seconds
from meshwright.cost_models.step import batch_seconds
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.cost_models.targets import framework_named
from meshwright.planner.plan import PLAN_SCHEMA_VERSION, Plan, default_stages, load_plan
from meshwright.profiler import artifact
from meshwright.profiler.cluster import CalibratedConstant, ClusterProfile, Provenance, Source
from meshwright.profiler.record import record
from meshwright.profiler.steps import StepMeasurement, load_measurement

FloatArray = NDArray[np.float64]

# What is fitted, and how far (a factor) it may plausibly lie from what was assumed: Python between kernels is the least
# known, what a target overlaps is a fact about its code. Norms and the like are corrected as the device's memory rate
# alone, since one target on one device does not tell the two apart.
DEVICE = {"matmul_factor": 1.2, "attention_factor": 1.15, "memory_factor": 1.25, "communication_slowdown": 1.2}
TARGET = {
    "host.launch_factor": 5.0,
    "host.collective_s": 3.0,
    "host.microbatch_s": 3.0,
    "host.step_s": 5.0,
    "dp_factor": 1.25,
    "overlap_dp_reduce": 1.3,
    "overlap_dp_gather": 1.3,
    "overlap_tp": 1.3,
}
STARTS = {"host.collective_s": 1e-5, "host.microbatch_s": 1e-4, "host.step_s": 5e-3}  # where the target assumes none
MODEL_ERROR = 0.02  # what no constant mends
ROBUST = 1.0  # every measurement counts, however far off the prediction was before
MIN_TOLD = 0.25  # of ``Fit.told``: constants that the steps say less of stay as they are
LAUNCHES = (1.0, 4.0, 12.0)  # factors on the assumed cost of launches that searches start from
AGREE = 1.25  # two measurements of one plan may differ by this factor


@record
class MeasuredPlan:
    """A plan and its measured step; ``spread`` is (p90 - p10) / median."""

    plan: Plan
    step_s: float
    spread: float
    steps: int
    where: str


@record
class CalibratedPlan:
    """One measured plan with its predictions."""

    config: str
    framework: str
    measured_s: float
    before_s: float
    after_s: float


@record
class ChangedConstant:
    """A constant before and after; ``told`` is what the steps say of it, 1 as much as what was assumed before."""

    owner: str
    of: str
    name: str
    meaning: str
    before: float
    after: float
    told: float


@record
class Calibration:
    """The calibrated cluster, what changed, and how far predictions were off before and are after."""

    cluster: ClusterProfile
    plans: tuple[CalibratedPlan, ...]
    constants: tuple[ChangedConstant, ...]
    notes: tuple[str, ...]


def calibrate(cluster: ClusterProfile, measured: Sequence[MeasuredPlan]) -> Calibration:
    """Fit the constants of ``cluster`` and of the measured targets to the measured steps.

    An earlier calibration of the cluster for the same devices and targets is replaced, not refined. With fewer plans
    than constants, those that the steps do not tell apart share the correction, held back by how far each may
    plausibly lie from what was assumed.
    Raises ``InputError`` for no measurement, one of another cluster, or ones that contradict each other.
    """
    _check(cluster, measured)
    targets = sorted({each.plan.framework for each in measured})
    replaced = {("device", device.kind) for device in cluster.devices} | {("target", name) for name in targets}
    kept = tuple(each for each in cluster.calibrated if (each.owner, each.of) not in replaced)
    start = replace(cluster, calibrated=kept)
    priors = tuple(_priors(start, targets))
    seconds = np.array([each.step_s for each in measured])

    groups = _groups([each.plan for each in measured])

    def predicted(values: tuple[Value, ...]) -> FloatArray:
        return _predicted_s(groups, on_cluster(start, values), values)

    spreads = [(DEVICE | TARGET)[each.name] for each in priors]
    weights = np.array([(ROBUST / _uncertainty(each)) ** 2 for each in measured])
    # where kernels hide all launches no slope leads to launches that show: searched from several
    found = min(
        (
            fit(
                predicted,
                seconds,
                priors,
                weights,
                spreads=spreads,
                start=_with_launches(priors, factor),
                max_evaluations=20,
                robust=ROBUST,
            )
            for factor in LAUNCHES
        ),
        key=lambda each: each.loss,
    )
    changed = tuple(
        ChangedConstant(
            owner=after.owner,
            of=after.of,
            name=after.name,
            meaning=after.constant.meaning,
            before=before.value,
            after=float(f"{after.value:.4g}"),
            told=float(told),
        )
        for before, after, told in zip(priors, found.values, found.told, strict=True)
        if told >= MIN_TOLD
    )
    source = Source(provenance=Provenance.MEASURED, reference=_reference(measured))
    calibrated = replace(
        start,
        calibrated=(
            *kept,
            *(
                CalibratedConstant(owner=each.owner, of=each.of, name=each.name, value=each.after, source=source)  # type: ignore[arg-type]
                for each in changed
            ),
        ),
    )
    plans = tuple(
        CalibratedPlan(
            config=each.plan.config.describe(),
            framework=each.plan.framework,
            measured_s=each.step_s,
            before_s=float(before),
            after_s=float(after),
        )
        for each, before, after in zip(
            measured, _predicted_s(groups, start), _predicted_s(groups, calibrated), strict=True
        )
    )
    return Calibration(cluster=calibrated, plans=plans, constants=changed, notes=tuple(_notes(measured, changed)))


def read_measured(measurements: Iterable[str | Path], plans: Iterable[str | Path] = ()) -> tuple[MeasuredPlan, ...]:
    """Measurements of ``meshwright measure`` with their plans: the one inside, else one of the files ``plans``.

    Raises ``InputError`` for a file that is no measurement or no plan, a measurement whose plan is not there, or one
    whose figures contradict each other.
    """
    by_digest = {plan.digest: plan for plan in map(load_plan, plans)}
    return tuple(_read(load_measurement(path), by_digest, str(path)) for path in measurements)


def _read(measurement: StepMeasurement, plans: dict[str, Plan], where: str) -> MeasuredPlan:
    if measurement.plan is not None:
        text = json.dumps(measurement.plan)
        plan = artifact.loads(Plan, text, artifact="plan", schema_version=PLAN_SCHEMA_VERSION, where=f"{where}: plan")
    elif measurement.plan_digest in plans:
        plan = plans[measurement.plan_digest]
    else:
        raise InputError(
            f"{where} does not hold the plan that it measured ({measurement.plan_digest}, {measurement.config}): "
            "name the plan's file with --plan"
        )
    if plan.digest != measurement.plan_digest or plan.framework != measurement.framework:
        raise InputError(
            f"{where} measured plan {measurement.plan_digest} with {measurement.framework}, but the plan in it is "
            f"{plan.digest} for {plan.framework}"
        )
    steps = min((len(rank.step_s) for rank in measurement.ranks), default=0)
    if not steps or measurement.step_s <= 0:
        raise InputError(f"{where} holds no measured step: step_s is {measurement.step_s}, of {steps} steps")
    slowest = float(np.median([max(rank.step_s[step] for rank in measurement.ranks) for step in range(steps)]))
    if not slowest / 1.01 <= measurement.step_s <= slowest * 1.01:
        raise InputError(
            f"{where} contradicts itself: step_s is {measurement.step_s:.6g} s, but the slowest rank took "
            f"{slowest:.6g} s (median of {steps} steps)"
        )
    return MeasuredPlan(
        plan=plan, step_s=measurement.step_s, spread=measurement.step_s_spread, steps=steps, where=where
    )


def _check(cluster: ClusterProfile, measured: Sequence[MeasuredPlan]) -> None:
    if not measured:
        raise InputError("nothing to calibrate on: name measurements, as meshwright measure writes them")
    kinds = {device.kind for device in cluster.devices}
    first: dict[str, MeasuredPlan] = {}
    for each in measured:
        plan = each.plan
        if other := {stage.device for stage in plan.stages} - kinds:
            raise InputError(
                f"{each.where} was measured on {', '.join(sorted(other))}, cluster {cluster.name} has "
                f"{', '.join(sorted(kinds))}"
            )
        if plan.cluster_digest != cluster.digest:
            raise InputError(
                f"{each.where} is of a plan for cluster {plan.cluster_name} ({plan.cluster_digest}), not of "
                f"{cluster.name} ({cluster.digest}): calibrate the cluster that its plan was made on"
            )
        if plan.stages != default_stages(plan.model, plan.config, plan.stages[0].device):
            raise InputError(
                f"{each.where}: the stages of its plan are not the default ones, which alone are predicted"
            )
        before = first.setdefault(plan.digest, each)
        low, high = sorted((before.step_s, each.step_s))
        if high > AGREE * low:
            raise InputError(
                f"{before.where} and {each.where} measured the same plan ({plan.config.describe()}) at "
                f"{before.step_s:.4g} s and {each.step_s:.4g} s: leave out the one that something else held up"
            )


def _priors(cluster: ClusterProfile, targets: Sequence[str]) -> Iterable[Value]:
    for device in cluster.devices:
        for name in DEVICE:
            yield Value(owner="device", of=device.kind, name=name, value=value_on("device", name, device))
    for target in targets:
        framework = framework_named(target)
        for name in TARGET:
            value = value_on("target", name, framework)
            yield Value(owner="target", of=target, name=name, value=value or STARTS.get(name, 0.0))


def _uncertainty(each: MeasuredPlan) -> float:
    """Of the logarithm of a step: the median's, of steps that vary (1.25 / 2.56 of p90 - p10 if normal), and ours."""
    return float(np.hypot(MODEL_ERROR, 0.49 * each.spread / np.sqrt(each.steps)))


def _with_launches(priors: Sequence[Value], factor: float) -> list[float]:
    return [each.value * (factor if each.name == "host.launch_factor" else 1.0) for each in priors]


def _groups(plans: Sequence[Plan]) -> list[tuple[Plan, NDArray[np.int64], ConfigBatch]]:
    """Plans that differ in their config alone: the first, where all of them are, and their configs."""
    first: list[tuple[Plan, list[int]]] = []
    for place, plan in enumerate(plans):
        for other, places in first:
            if all(
                getattr(plan, name) == getattr(other, name) for name in ("framework", "model", "workload", "placement")
            ):
                places.append(place)
                break
        else:
            first.append((plan, [place]))
    return [
        (plan, np.array(places), ConfigBatch.from_configs(plans[place].config for place in places))
        for plan, places in first
    ]


def _predicted_s(
    groups: Sequence[tuple[Plan, NDArray[np.int64], ConfigBatch]],
    cluster: ClusterProfile,
    values: tuple[Value, ...] = (),
) -> FloatArray:
    result = np.zeros(sum(len(places) for _, places, _ in groups))
    for plan, places, batch in groups:
        framework = on_framework(framework_named(plan.framework), values)
        result[places] = step_seconds(
            batch_seconds(plan.model, plan.workload, cluster, framework, batch, plan.placement, tells_waits=False)
        )
    return result


def _reference(measured: Sequence[MeasuredPlan]) -> str:
    steps, plans = sum(each.steps for each in measured), len({each.plan.digest for each in measured})
    return f"{steps} steps of {plans} {'plan' if plans == 1 else 'plans'}: meshwright calibrate"


def _notes(measured: Sequence[MeasuredPlan], changed: Sequence[ChangedConstant]) -> Iterable[str]:
    plans = len({each.plan.digest for each in measured})
    if plans == 1:
        yield (
            "one plan tells how far its own step is off, not why: all constants shared the correction, and plans that "
            "differ much from it may be no better predicted; measure three or four that differ in tp, pp, micro batch"
        )
    elif plans < len(changed):
        yield f"{plans} plans tell at most {plans} constants apart; the {len(changed)} below share the correction"
    for each in measured:
        if each.spread > 0.2:
            yield f"{each.where}: its steps differ by {each.spread:.0%} (p10 to p90), so it counts less"
