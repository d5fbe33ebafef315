"""Constants of devices, links and targets from published runs: python benchmarks/calibrate_presets.py [FILE.csv].

Reads the table of published runs (``MESHWRIGHT_VALIDATION``, a folder with ``dev.csv``; default
``../shared/validation``, or a path as argument), fits all constants at once (``cost_models/published_fit.py`` says
which, on which runs, from which priors), and prints errors of each family before and after, regret, and every constant
with its owner and the runs that inform it. ``--write`` puts them into ``cost_models/calibrated.json`` and
``profiler/presets/calibrated.json``; presets and targets themselves stay as assumed or measured alone, so that a new
run starts from the same priors, and the same table gives the same constants.

``--cross-validate`` leaves out a part of every family's models at once, fits everything again without them, and
compares the error on what was left out with the error of the whole fit on the same runs. Their searches start where
that fit ended, which saves half of the time; priors are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from meshwright.cost_models.constants import Value
from meshwright.cost_models.published import Predictions, Published, PublishedRun, grouped, predict, read_published
from meshwright.cost_models.published_fit import (
    MIN_RUNS,
    MIN_TOLD,
    Problem,
    expanded,
    fitted_on,
    joint_fit,
    polished,
    resolvers,
    uncalibrated_cluster,
)
from meshwright.cost_models.scorecard import Part, score
from meshwright.cost_models.targets import ASSUMED
from meshwright.cost_models.targets import CALIBRATED as TARGETS_FILE
from meshwright.profiler.cluster_presets import CALIBRATED as PRESETS_FILE
from meshwright.profiler.cluster_presets import uncalibrated_figure

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "benchmarks/calibrate_presets.py"
FACTOR, POINTS = 1.25, 0.01  # what leaving out may cost, of the median error
MANY_RUNS, MANY_MODELS = 40, 4  # families that are judged so


def main() -> None:
    """Fit, print and, if asked to, cross-validate and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    folder = Path(os.environ.get("MESHWRIGHT_VALIDATION", ROOT.parent / "shared" / "validation"))
    parser.add_argument("file", nargs="?", type=Path, default=folder / "dev.csv")
    parser.add_argument("--write", action="store_true", help="write the constants")
    parser.add_argument("--cross-validate", type=int, nargs="?", const=5, default=0, metavar="FOLDS")
    parser.add_argument("--evaluations", type=int, default=12, help="of all runs, at most, in each fit")
    parser.add_argument("--polish", type=int, default=2, help="rounds in which each owner's constants are fitted alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    published, progress = read_published(arguments.file), _progress(time.monotonic())
    runs = fitted_on(published.runs)
    values = _fitted(runs, arguments, progress)
    _report(published, values)
    if arguments.write:
        _write(values, runs)
    if arguments.cross_validate:
        _cross_validate(runs, values, arguments, progress)


def _progress(start: float) -> Callable[[str], None]:
    return lambda text: print(f"[{time.monotonic() - start:5.0f} s] {text}", flush=True)


def _fitted(
    runs: Sequence[PublishedRun],
    arguments: argparse.Namespace,
    progress: Callable[[str], None],
    start: tuple[Value, ...] = (),
) -> tuple[Value, ...]:
    """Constants fitted on ``runs``; printed where the search does not start from those of another fit."""
    problem = Problem(runs, min_runs=MIN_RUNS)
    progress(f"{len(runs)} runs, {len(problem.priors)} constants")
    found = joint_fit(
        problem,
        start=start,
        num_workers=arguments.workers,
        max_evaluations=arguments.evaluations // (2 if start else 1),
        on_progress=progress,
    )
    values = found.values
    for _ in range(arguments.polish):
        values = polished(problem, values, on_progress=progress)
    if start:
        return values
    print(f"\n{'owner':<8} {'of':<22} {'constant':<28} {'before':>10} {'fitted':>10} {'told':>8} {'runs':>5}  families")
    priors = {_key(prior.value): (prior.value.value, place) for place, prior in enumerate(problem.priors)}
    for value, told in sorted(zip(values, found.told, strict=True), key=lambda pair: _key(pair[0])):
        if told < MIN_TOLD:
            continue
        before, place = priors[_key(value)]
        members = [problem.runs[at] for group in problem.touched[place] for at in group.positions]
        families = ", ".join(sorted({run.family for run in members}))
        print(
            f"{value.owner:<8} {value.of:<22} {value.name:<28} {before:>10.4g} {value.value:>10.4g} {told:>8.1f} "
            f"{len(members):>5}  {families}"
        )
    return values


def _key(value: Value) -> tuple[str, str, str]:
    return value.owner, value.of, value.name


def _priced(runs: Sequence[PublishedRun], values: tuple[Value, ...]) -> Predictions:
    return predict(grouped(runs), *resolvers(values, uncalibrated_cluster))


def _report(published: Published, values: tuple[Value, ...]) -> None:
    before, after = (score(published, _priced(published.runs, chosen)).parts for chosen in ((), values))
    print(f"\n{'family':<26} {'part':<22} {'rows':>5} {'median':>15} {'mean':>15} {'bias':>15} {'regret':>15}")
    for first, second in zip(before, after, strict=True):
        if second.errors and first.errors:
            columns = [
                f"{getattr(first.errors, name):6.1%} > {getattr(second.errors, name):6.1%}"
                for name in ("median", "mean", "bias")
            ]
            print(
                f"{first.family:<26} {first.name:<22} {second.errors.rows:>5} {' '.join(columns)} "
                f"{_regret(first)} > {_regret(second)}"
            )


def _regret(part: Part) -> str:
    return f"{part.cells.regret:.3f}" if part.cells else "  -  "


def _write(values: tuple[Value, ...], runs: Sequence[PublishedRun]) -> None:
    families: dict[str, dict[str, int]] = {}
    for run in runs:
        for target in {run.framework, ASSUMED[run.framework].version_of} - {""}:
            counts = families.setdefault(target, {})
            counts[run.family] = counts.get(run.family, 0) + 1
    targets: dict[str, dict[str, object]] = {}
    presets: dict[str, dict[str, dict[str, float]]] = {"device": {}, "link": {}}
    for value in sorted(expanded(values), key=_key):
        if value.owner == "target":
            on = ", ".join(f"{family} ({count})" for family, count in sorted(families.get(value.of, {}).items()))
            entry = targets.setdefault(value.of, {"fitted_on": f"{on}: {SCRIPT}", "values": {}})
            entry["values"][value.name] = value.value  # type: ignore[index]
        elif value.value != float(f"{uncalibrated_figure(value.owner, value.of, value.name):.4g}"):
            presets[value.owner].setdefault(value.of, {})[value.name] = value.value
    source = {
        "provenance": "measured",
        "reference": f"calibrated on step times of {len(runs)} published runs: {SCRIPT}",
    }
    TARGETS_FILE.write_text(json.dumps(targets, indent=1) + "\n", encoding="utf-8")
    PRESETS_FILE.write_text(json.dumps({"source": source, **presets}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {TARGETS_FILE.relative_to(ROOT)} and {PRESETS_FILE.relative_to(ROOT)}")


def _cross_validate(
    runs: Sequence[PublishedRun],
    values: tuple[Value, ...],
    arguments: argparse.Namespace,
    progress: Callable[[str], None],
) -> None:
    """Folds leave out whole (family, model) groups: fold ``k`` every ``FOLDS``-th model of each family."""
    folds = arguments.cross_validate
    models: dict[str, list[str]] = {}
    for run in runs:
        if _model(run) not in models.setdefault(run.family, []):
            models[run.family].append(_model(run))
    fold_of = {
        (family, name): place % folds for family, names in models.items() for place, name in enumerate(sorted(names))
    }
    fold = np.array([fold_of[run.family, _model(run)] for run in runs])
    measured = np.array([run.measured.step_s for run in runs], dtype=np.float64)
    whole = _priced(runs, values).step_s / measured - 1.0
    left = np.full(len(runs), np.nan)
    for number in range(folds):
        progress(f"fold {number + 1} of {folds}: {int((fold == number).sum())} runs left out")
        kept = [run for run, place in zip(runs, fold, strict=True) if place != number]
        out = np.flatnonzero(fold == number)
        again = _fitted(kept, arguments, progress, values)
        left[out] = _priced([runs[int(at)] for at in out], again).step_s / measured[out] - 1.0
    print(f"\n{'family':<26} {'rows':>5} {'models':>6} {'fitted':>8} {'left out':>9} {'bound':>8}")
    for family, names in sorted(models.items()):
        members = np.array([run.family == family for run in runs])
        if members.sum() >= MANY_RUNS and len(names) >= MANY_MODELS:
            fitted, out_of = (float(np.median(np.abs(errors[members]))) for errors in (whole, left))
            bound = FACTOR * fitted + POINTS
            verdict = "" if out_of <= bound else "  over"
            print(
                f"{family:<26} {int(members.sum()):>5} {len(names):>6} {fitted:>8.1%} {out_of:>9.1%} {bound:>8.1%}"
                f"{verdict}"
            )


def _model(run: PublishedRun) -> str:
    return run.cell[1]


if __name__ == "__main__":
    main()
