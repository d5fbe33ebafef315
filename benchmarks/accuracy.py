"""Predictions against published runs, beside what others reach on the same rows: python benchmarks/accuracy.py.

Reads the table of published runs (``MESHWRIGHT_VALIDATION``, a folder with ``dev.csv``; default
``../shared/validation``, or a path as argument), writes the scorecard between the two marks of ``docs/accuracy.md`` and
the picture beside it. The simple rules are worked out here, on the cells that we are scored on; figures of other tools
are quoted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from meshwright import InputError
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.published import PublishedRun, read_published
from meshwright.cost_models.scorecard import Part, Scorecard, validate
from meshwright.cost_models.scorecard_cells import Cell, CellScore
from meshwright.cost_models.strategy import ParallelConfig
from meshwright.cost_models.targets import FRAMEWORKS
from meshwright.terminal.accuracy_plot import save_accuracy_plot
from meshwright.terminal.cluster_view import progress_bar

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "accuracy.md"
PICTURE = ROOT / "docs" / "accuracy.png"
BEGIN, END = "<!-- scorecard: python benchmarks/accuracy.py -->", "<!-- end of scorecard -->"

# (family, part) -> what others reach there: Calculon (caa4b11, uncalibrated) and llm-analysis run on the same rows,
# vTrain (arXiv 2312.12391) as its paper claims for itself, with profiled kernels
PEERS: dict[tuple[str, str], str] = {
    ("vtrain_groundtruth", "single node"): "mean 39 % Calculon, 8.4 % vTrain; regret 1.09 Calculon",
    ("vtrain_groundtruth", "several nodes"): "mean 20 % Calculon, 14.7 % vTrain",
    ("nanotron_ultrascale", "dense"): "regret 1.59 Calculon, 1.96 llm-analysis (its figure: the whole set)",
    ("nanotron_ultrascale", "MFU >= 10 %"): "rank correlation 0.67 to 0.70 both",
}
# the same for memory: error of the peak, share of failures said not to fit; and for first choices that failed
MEMORY_PEERS: dict[tuple[str, str], str] = {
    ("nanotron_ultrascale", "dense"): "median 16 % to 31 %; 71 % to 74 % of failures (Calculon, llm-analysis)",
}
PICK_PEERS: dict[tuple[str, str], str] = {
    ("nanotron_ultrascale", "dense"): "54 % Calculon, 38 % Megatron's rules (the whole set)",
}

Rule = Callable[[ParallelConfig], tuple[float, ...]]
RULES: dict[str, Rule] = {
    "smallest tp, then smallest pp": lambda config: (config.tp, config.pp, -config.micro_batch_size),
    "tp up to 8, then pp": lambda config: (config.tp > 8, -min(config.tp, 8), config.pp, -config.micro_batch_size),
}


def main(arguments: Sequence[str]) -> None:
    path = Path(arguments[0]) if arguments else default_table()
    with progress_bar("accuracy") as on_progress:
        card = validate(path, on_progress=on_progress)
    save_accuracy_plot(card, PICTURE)
    configs = {run.row_id: run for run in read_published(path).runs}
    write_page(PAGE, "\n".join(tables(card, configs)))
    print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


def default_table() -> Path:
    folder = Path(os.environ.get("MESHWRIGHT_VALIDATION", ROOT.parent / "shared" / "validation"))
    if not (folder / "dev.csv").is_file():
        raise InputError(f"no dev.csv in {folder}: name the table, or set MESHWRIGHT_VALIDATION to its folder")
    return folder / "dev.csv"


def write_page(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def tables(card: Scorecard, runs: dict[str, PublishedRun]) -> Iterable[str]:
    yield from error_table(card.parts)
    yield ""
    yield from cell_table(card, runs)
    yield ""
    yield from memory_table(card.parts)
    yield ""
    yield from pick_table(card)
    yield ""
    yield from margin_table(FRAMEWORKS.values())
    yield ""
    yield from skipped_table(card)


def error_table(parts: Iterable[Part]) -> Iterable[str]:
    yield "| family | part | rows | predicted | scored | median error | mean error | bias | others |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|---|"
    for part in parts:
        errors = part.errors
        figures = ["0", "", "", ""]
        if errors is not None:
            figures = [str(errors.rows), *(f"{100 * value:.1f} %" for value in (errors.median, errors.mean))]
            figures.append(f"{100 * errors.bias:+.1f} %")
        others = PEERS.get((part.family, part.name), "")
        yield f"| {part.family} | {part.name} | {part.rows} | {part.predicted} | {' | '.join(figures)} | {others} |"


def cell_table(card: Scorecard, runs: dict[str, PublishedRun]) -> Iterable[str]:
    yield "| family | part | who picks | cells | plans | rank corr. | regret | worst | within 5 % | best of 3 |"
    yield "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"
    for part, cells in card.cells:
        head = f"| {part.family} | {part.name} "
        if part.cells is not None:
            yield f"{head}| Meshwright | {_cells(part.cells)} |"
        for name, rule in RULES.items():
            regrets = np.array([rule_regret(cell, runs, rule) for cell in cells])
            mean = np.exp(np.log(regrets).mean())
            close = f"{np.mean(regrets <= 1.05):.0%}"
            yield f"| | | rule: {name} | {len(cells)} | | | {mean:.3f} | {regrets.max():.2f} | {close} | |"


def _cells(score: CellScore) -> str:
    return (
        f"{score.cells} | {score.plans} | {score.spearman:.2f} | {score.regret:.3f} | {score.worst:.2f} | "
        f"{score.close:.0%} | {score.regret_of_three:.3f}"
    )


def rule_regret(cell: Cell, runs: dict[str, PublishedRun], rule: Rule) -> float:
    """Measured time of the plan that a rule puts first over the best; of plans the rule puts level, the median."""
    keys = [rule(runs[plan.row_ids[0]].config) for plan in cell.plans]
    measured = np.array([plan.measured_s for plan in cell.plans])
    first = np.array([key == min(keys) for key in keys])
    return float(np.median(measured[first]) / measured.min())


def memory_table(parts: Iterable[Part]) -> Iterable[str]:
    yield (
        "| family | part | peaks | median error | mean error | bias | ran, said not to fit | ran, not recommended "
        "| failed, said not to fit | failed, not recommended | oom, said not to fit | oom, not recommended | others |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    for part in parts:
        memory = part.memory
        if memory is None:
            continue
        peak = ["0", "", "", ""]
        if memory.peak is not None:
            errors = (f"{100 * value:.1f} %" for value in (memory.peak.median, memory.peak.mean))
            peak = [str(memory.peak.rows), *errors, f"{100 * memory.peak.bias:+.1f} %"]
        counts = (
            (memory.succeeded, memory.succeeded_called_out, memory.succeeded_recommended),
            (memory.failed, memory.failed_called_out, memory.failed_recommended),
            (memory.oom, memory.oom_called_out, memory.oom_recommended),
        )
        said = [
            text
            for rows, called_out, recommended in counts
            for text in ((f"{called_out} of {rows}", f"{rows - recommended} of {rows}") if rows else ("", ""))
        ]
        others = MEMORY_PEERS.get((part.family, part.name), "")
        yield f"| {part.family} | {part.name} | {' | '.join([*peak, *said, others])} |"


def pick_table(card: Scorecard) -> Iterable[str]:
    yield "| family | part | cells | candidates | picks | of them failed | regret of the rest | worst | others |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|---|"
    for part, _ in card.picks:
        picks = part.picks
        assert picks is not None
        share = f"{picks.failed} ({picks.failed / picks.picks:.0%})" if picks.picks else ""
        regret = f"{picks.regret:.3f} | {picks.worst:.2f}" if picks.regret is not None else " | "
        others = PICK_PEERS.get((part.family, part.name), "")
        yield (
            f"| {part.family} | {part.name} | {picks.cells} | {picks.candidates} | {picks.picks} | {share} | {regret} "
            f"| {others} |"
        )


def margin_table(targets: Iterable[Framework]) -> Iterable[str]:
    yield "| target | fragmentation, of tensors | margin | from |"
    yield "|---|--:|--:|---|"
    for target in targets:
        memory = target.memory
        if not target.version_of:
            fragmentation = "block by block" if memory.blocks else f"{100 * memory.fragmentation:.1f} %"
            yield f"| {target.name} | {fragmentation} | {100 * memory.margin:.1f} % | {memory.margin_source} |"


def skipped_table(card: Scorecard) -> Iterable[str]:
    yield "| family | rows skipped | reason |"
    yield "|---|--:|---|"
    for family, reason, rows in card.skipped:
        yield f"| {family} | {rows} | {reason} |"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
