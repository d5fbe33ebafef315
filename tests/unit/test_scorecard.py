from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright import InputError
from meshwright.cost_models.published import Predictions, Published, PublishedRun
from meshwright.cost_models.published_measured import Measured, PeakKind
from meshwright.cost_models.scorecard import Part, Scorecard, score
from meshwright.cost_models.scorecard_cells import rank_correlation
from meshwright.cost_models.strategy import ParallelConfig
from meshwright.cost_models.workload import Workload
from meshwright.profiler.model import load_model
from meshwright.terminal.accuracy_plot import save_accuracy_plot
from meshwright.terminal.scorecard_view import scorecard_json, show_scorecard

MODEL = load_model("gpt2")


def run(name: str, measured_s: float | None, **changes: object) -> PublishedRun:
    made = PublishedRun(
        row_id=name,
        family="f",
        model=MODEL,
        workload=Workload(seq_len=1024, global_batch_size=16),
        cluster="h100-sxm:1",
        framework="meshwright",
        config=ParallelConfig(micro_batch_size=len(name)),
        num_gpus=8,
        measured=Measured(step_s=measured_s),
        cell=("f", "gpt2"),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def plans(*measured: float) -> list[PublishedRun]:
    return [
        run(f"p{index}", value, config=ParallelConfig(micro_batch_size=index + 1))
        for index, value in enumerate(measured)
    ]


def card(runs: list[PublishedRun], step_s: list[float], **changes: object) -> Scorecard:
    size = len(runs)
    predictions = Predictions(
        step_s=np.array(step_s, dtype=np.float64),
        peak_bytes=np.array(changes.get("peak", [10] * size), dtype=np.int64),
        fragmentation_bytes=np.array(changes.get("fragmentation", [0] * size), dtype=np.int64),
        fits=np.array(changes.get("fits", [True] * size), dtype=np.bool_),
        recommended=np.array(changes.get("recommended", [True] * size), dtype=np.bool_),
        reasons=tuple(None if np.isfinite(value) else "no rate" for value in step_s),
    )
    skipped = (("s1", "f", "no target"), ("s2", "g", "no target"))
    published = Published((*(one.row_id for one in runs), "s1", "s2"), tuple(runs), skipped)
    return score(published, predictions)


def only_part(found: Scorecard, name: str = "dense") -> Part:
    return next(part for part in found.parts if part.name == name)


class TestErrors:
    def test_median_mean_and_bias(self) -> None:
        errors = only_part(card(plans(1.0, 2.0, 4.0), [1.1, 1.6, 5.2])).errors
        assert errors is not None
        assert errors.rows == 3
        assert errors.median == pytest.approx(0.2)
        assert errors.bias == pytest.approx(0.1)
        assert errors.mean == pytest.approx(0.2)  # 10, 20 and 30 %

    def test_a_row_without_a_measurement_is_predicted_and_not_scored(self) -> None:
        found = card([run("a", None), run("bb", 1.0)], [3.0, 1.5])
        part = only_part(found)
        assert (part.rows, part.predicted) == (2, 2)
        assert part.errors is not None
        assert part.errors.rows == 1
        assert found.rows[0].predicted_step_s == 3.0

    def test_a_row_without_a_prediction_says_why(self) -> None:
        found = card([run("a", 1.0)], [float("nan")])
        assert (found.rows[0].predicted_step_s, found.rows[0].skipped_reason) == (None, "no rate")
        assert found.rows[0].fits is None
        assert only_part(found).predicted == 0
        assert only_part(found).errors is None

    def test_rows_keep_the_order_of_the_table_and_skipped_ones_are_counted(self) -> None:
        found = card(plans(1.0), [1.0])
        assert [row.row_id for row in found.rows] == ["p0", "s1", "s2"]
        assert sorted(found.skipped) == [("f", "no target", 1), ("g", "no target", 1)]

    def test_utilisation_is_scored_apart_and_the_other_way_round(self) -> None:
        utilised = run("a", None, measured=Measured(utilisation_step_s=1.0))
        found = card([utilised, run("bb", 1.0)], [2.0, 2.0])
        halved, doubled = only_part(found, "dense, utilisation").errors, only_part(found).errors
        assert halved is not None
        assert doubled is not None
        assert halved.bias == pytest.approx(-0.5)  # twice the time is half the utilisation
        assert doubled.bias == pytest.approx(1.0)

    def test_scopes_and_families_are_never_pooled(self) -> None:
        runs = [run("a", 1.0), run("bb", 1.0, scope="moe"), run("ccc", 1.0, family="g")]
        found = card(runs, [1.0, 2.0, 3.0])
        assert [(part.family, part.name) for part in found.parts] == [("f", "dense"), ("f", "MoE"), ("g", "dense")]

    def test_nanotron_is_scored_twice_and_vtrain_by_nodes(self) -> None:
        low, high = (
            run(name, 1.0, family="nanotron_ultrascale", measured=Measured(step_s=1.0, mfu=mfu))
            for name, mfu in (("a", 0.0999), ("bb", 0.10))
        )
        one, many = (
            run(name, 1.0, family="vtrain_groundtruth", cluster=cluster)
            for name, cluster in (("ccc", "a100-sxm:1"), ("dddd", "a100-sxm:2"))
        )
        found = card([low, high, one, many], [1.0] * 4)
        rows = {(part.family, part.name): part.rows for part in found.parts}
        assert rows["nanotron_ultrascale", "dense"] == 2
        assert rows["nanotron_ultrascale", "MFU >= 10 %"] == 1
        assert rows["vtrain_groundtruth", "single node"] == rows["vtrain_groundtruth", "several nodes"] == 1


class TestCells:
    def test_regret_is_measured_over_best_measured(self) -> None:
        found = card(plans(2.0, 1.0, 4.0, 8.0), [1.0, 2.0, 3.0, 4.0])
        cells = only_part(found).cells
        assert cells is not None
        assert (cells.cells, cells.plans) == (1, 4)
        assert cells.regret == pytest.approx(2.0)
        assert cells.worst == 2.0
        assert cells.close == 0.0
        assert cells.regret_of_three == pytest.approx(1.0)
        assert cells.spearman == pytest.approx(0.8)  # 1 - 6 * (1 + 1) / (4 * 15)

    def test_the_mean_over_cells_is_geometric(self) -> None:
        first = plans(4.0, 1.0, 5.0, 6.0)
        second = [replace(one, row_id="q" + one.row_id, cell=("f", "other")) for one in plans(1.0, 2.0, 3.0, 4.0)]
        cells = only_part(card(first + second, [1.0, 2.0, 3.0, 4.0] * 2)).cells
        assert cells is not None
        assert cells.regret == pytest.approx(2.0)  # of 4 and 1
        assert cells.close == 0.5

    def test_three_plans_are_no_cell(self) -> None:
        assert only_part(card(plans(1.0, 2.0, 3.0), [1.0, 2.0, 3.0])).cells is None

    def test_repeats_are_one_plan_that_takes_their_median(self) -> None:
        first = plans(1.0, 2.0, 3.0, 4.0)
        repeats = [replace(first[0], row_id=f"r{index}", measured=Measured(step_s=9.0)) for index in range(2)]
        found = card(first + repeats, [1.0, 2.0, 3.0, 4.0, 1.0, 1.0])
        cells = only_part(found).cells
        assert cells is not None
        assert cells.plans == 4
        assert cells.regret == pytest.approx(4.5)  # 9, the median of 1, 9 and 9, over 2
        errors = only_part(found).errors
        assert errors is not None
        assert errors.rows == 6

    def test_plans_that_only_the_source_tells_apart_are_two(self) -> None:
        first = plans(1.0, 2.0, 3.0)
        other = replace(first[0], row_id="other", plan="Vocab-2", measured=Measured(step_s=1.5))
        cells = only_part(card([*first, other], [1.0, 2.0, 3.0, 1.0])).cells
        assert cells is not None
        assert cells.plans == 4

    def test_equal_predictions_never_win_by_the_order_of_the_table(self) -> None:
        cells = only_part(card(plans(1.0, 2.0, 3.0, 4.0), [1.0] * 4)).cells
        assert cells is not None
        assert cells.regret == pytest.approx(4.0)
        assert cells.spearman == 0.0

    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ([1, 2, 3], [10, 20, 30], 1.0),
            ([1, 2, 3], [30, 20, 10], -1.0),
            ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # ranks 1, 2.5, 2.5, 4: 4.5 / sqrt(4.5 * 5)
            ([1, 1], [1, 2], 0.0),
        ],
    )
    def test_rank_correlation(self, first: list[float], second: list[float], expected: float) -> None:
        assert rank_correlation(first, second) == pytest.approx(expected)


class TestMemory:
    def test_peaks_and_who_is_said_not_to_fit(self) -> None:
        runs = [
            run("a", 1.0, measured=Measured(step_s=1.0, peak_bytes=100.0)),
            run("bb", 1.0),
            run("ccc", None, status="oom"),
            run("dddd", None, status="failed_unspecified"),
            run("eeeee", None, status="failed_unspecified"),
        ]
        found = card(
            runs,
            [1.0] * 5,
            peak=[90, 5, 5, 5, 5],
            fits=[True, False, False, True, True],
            recommended=[True, False, False, False, True],
        )
        memory = only_part(found).memory
        assert memory is not None
        assert memory.peak is not None
        assert memory.peak.bias == pytest.approx(-0.1)
        assert (memory.succeeded, memory.succeeded_called_out, memory.succeeded_recommended) == (2, 1, 1)
        assert (memory.failed, memory.failed_called_out, memory.failed_recommended) == (2, 0, 1)
        assert (memory.oom, memory.oom_called_out, memory.oom_recommended) == (1, 1, 0)

    @pytest.mark.parametrize(
        ("kind", "error"),
        [(PeakKind.ALLOCATED, -0.1), (PeakKind.UNSPECIFIED, -0.1), (PeakKind.RESERVED, 0.2)],
    )
    def test_peaks_are_compared_with_what_was_published(self, kind: PeakKind, error: float) -> None:
        measured = Measured(step_s=1.0, peak_bytes=100.0, peak_kind=kind)
        found = card([run("a", 1.0, measured=measured)], [1.0], peak=[90], fragmentation=[30])
        assert found.rows[0].peak_error == pytest.approx(error)

    def test_the_peak_of_a_run_that_failed_is_not_scored(self) -> None:
        failed = run("a", None, status="oom", measured=Measured(peak_bytes=100.0))
        memory = only_part(card([failed], [1.0])).memory
        assert memory is not None
        assert (memory.peak, memory.oom) == (None, 1)


def with_failures(measured: list[float | None]) -> list[PublishedRun]:
    """A cell of plans: a measured step each, ``None`` for one that failed."""
    return [
        run(
            f"p{index}",
            value,
            config=ParallelConfig(micro_batch_size=index + 1),
            status="ok" if value else "failed_unspecified",
        )
        for index, value in enumerate(measured)
    ]


class TestPicks:
    def test_the_fastest_recommended_is_the_pick_and_failures_are_candidates(self) -> None:
        runs = with_failures([None, 4.0, 2.0, None, 1.0])
        found = card(runs, [1.0, 2.0, 3.0, 4.0, 5.0], recommended=[False, True, True, True, True])
        (pick,) = found.picks[0][1]
        assert (pick.candidates, pick.failed, pick.recommended) == (5, 2, 4)
        assert (pick.row_ids, pick.pick_failed) == (("p1",), False)
        assert pick.regret == pytest.approx(4.0)  # over 1.0, the best that ran

    def test_a_pick_that_failed_has_no_regret(self) -> None:
        first = with_failures([None, 4.0, 2.0, 1.0])
        second = [
            replace(one, row_id="q" + one.row_id, cell=("f", "b")) for one in with_failures([2.0, None, 2.0, 1.0])
        ]
        third = [replace(one, row_id="r" + one.row_id, cell=("f", "c")) for one in with_failures([8.0, None, 2.0, 1.0])]
        picks = only_part(card(first + second + third, [1.0, 2.0, 3.0, 4.0] * 3)).picks
        assert picks is not None
        assert (picks.cells, picks.candidates, picks.picks, picks.failed) == (3, 12, 3, 1)
        assert picks.regret == pytest.approx(4.0)  # the geometric mean of 2 and 8
        assert picks.worst == pytest.approx(8.0)

    def test_where_nothing_is_recommended_there_is_no_pick(self) -> None:
        picks = only_part(card(with_failures([None, 1.0, 2.0, 3.0]), [1.0] * 4, recommended=[False] * 4)).picks
        assert picks is not None
        assert (picks.cells, picks.picks, picks.failed, picks.regret) == (1, 0, 0, None)

    def test_a_configuration_failed_when_none_of_its_repeats_ran(self) -> None:
        runs = with_failures([None, 1.0, 2.0, 3.0])
        again = replace(runs[0], row_id="again", status="ok", measured=Measured(step_s=1.5))
        picks = only_part(card([*runs, again], [1.0, 2.0, 3.0, 4.0, 1.0])).picks
        assert picks is None  # nothing failed
        twice = replace(runs[0], row_id="twice")
        picks = only_part(card([*runs, twice], [1.0, 2.0, 3.0, 4.0, 1.0])).picks
        assert picks is not None
        assert (picks.candidates, picks.failed) == (4, 1)

    def test_of_equal_predictions_the_one_that_failed_is_picked(self) -> None:
        picks = only_part(card(with_failures([1.0, 2.0, None, 3.0]), [1.0] * 4)).picks
        assert picks is not None
        assert picks.failed == 1

    def test_three_candidates_are_no_cell(self) -> None:
        assert only_part(card(with_failures([1.0, None, 3.0]), [1.0, 2.0, 3.0])).picks is None

    def test_they_are_shown(self) -> None:
        from rich.console import Console

        console = Console(width=160, record=True, file=io.StringIO())
        first = with_failures([None, 4.0, 2.0, 1.0])
        second = [
            replace(one, row_id="q" + one.row_id, cell=("f", "b")) for one in with_failures([2.0, None, 2.0, 1.0])
        ]
        found = card(first + second, [1.0, 2.0, 3.0, 4.0] * 2)
        show_scorecard(found, console, per_cell=True)
        text = console.export_text()
        assert "with the runs that failed as candidates" in text
        assert "50%" in text
        assert "mbs1 FAILED" in text
        assert "mbs1 regret 2.000" in text
        picks = json.loads(scorecard_json(found))["picks"]
        assert [pick["pick_failed"] for pick in picks] == [True, False]
        assert picks[1]["regret"] == pytest.approx(2.0)


class TestShowing:
    def test_tables_for_people(self) -> None:
        from rich.console import Console

        console = Console(width=160, record=True, file=io.StringIO())
        show_scorecard(card(plans(2.0, 1.0, 4.0, 8.0), [1.0, 2.0, 3.0, 4.0]), console, per_cell=True)
        text = console.export_text()
        assert "2.000" in text  # the regret
        assert "mbs1" in text
        assert "-50.0 %" in text
        assert "no target" in text

    def test_json_lists_every_row(self) -> None:
        found = json.loads(scorecard_json(card([run("a", 1.0), run("bb", 1.0)], [1.5, float("nan")])))
        first, second, *rest = found["rows"]
        assert first["id"] == "a"
        assert first["predicted_step_time_s"] == 1.5
        assert first["predicted_peak_bytes"] == 10
        assert first["fits"] is True
        assert first["skipped_reason"] is None
        assert second["predicted_step_time_s"] is None
        assert second["skipped_reason"] == "no rate"
        assert [row["skipped_reason"] for row in rest] == ["no target", "no target"]

    @pytest.mark.parametrize("ending", ["png", "svg"])
    def test_the_plot(self, tmp_path: Path, ending: str) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / f"accuracy.{ending}"
        save_accuracy_plot(card([*plans(2.0, 1.0), run("ccc", 3.0, family="g")], [1.0, 2.0, 3.0]), path)
        assert path.stat().st_size > 1000

    def test_a_plot_of_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nothing to draw"):
            save_accuracy_plot(card([run("a", None)], [1.0]), tmp_path / "accuracy.png")

    def test_a_plot_in_another_format(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"ends in \.png or \.svg"):
            save_accuracy_plot(card(plans(1.0), [1.0]), tmp_path / "accuracy.jpg")
