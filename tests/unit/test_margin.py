"""What is kept free beyond predicted memory: the rule, where a target's share is from, and what helps a tight plan."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshwright import InputError
from meshwright.cost_models.estimate import KINDS, MOMENTS, MemoryBreakdown, Moment
from meshwright.cost_models.margin import MemoryMargin, margin_of, needed_bytes
from meshwright.cost_models.margin_fit import MIN_PEAKS, RELATIVES, derive_margins, write_margins
from meshwright.cost_models.scorecard import validate
from meshwright.cost_models.scorecard_rows import RowScore
from meshwright.cost_models.strategy import ParallelConfig, Recompute, Schedule
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.targets import FRAMEWORKS, MARGINS
from meshwright.cost_models.workload import Workload
from meshwright.planner.plan import Plan
from meshwright.planner.search import plan_for
from meshwright.planner.summary import needed_of, summarize
from meshwright.planner.tight import LEVERS, TIGHT, largest_kind, what_helps
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import load_model
from meshwright.terminal.memory_view import KIND_WORDS, MOMENT_WORDS, fit_words, show_memory

TABLE = Path(os.environ.get("MESHWRIGHT_VALIDATION", Path(__file__).parents[3] / "shared" / "validation")) / "dev.csv"
CLUSTER = load_cluster("h100-sxm:2")


class TestRule:
    def test_needed_is_tensors_and_fragmentation_and_a_share_of_both(self) -> None:
        peak, on_top = np.array([100, 200]), np.array([10, 0])
        found = needed_bytes(peak, on_top, MemoryMargin(share=0.5, source=""))
        assert found.tolist() == pytest.approx([165.0, 300.0])
        assert needed_bytes(peak, on_top, MemoryMargin(share=0.0, source="")).tolist() == [110.0, 200.0]
        assert needed_bytes(peak, on_top, None).tolist() == [100.0, 200.0]

    def test_a_target_has_a_margin_and_another_may_be_asked_for(self) -> None:
        target = replace(MESHWRIGHT, memory=replace(MESHWRIGHT.memory, margin=0.07, margin_source="peaks"))
        assert margin_of(target) == MemoryMargin(share=0.07, source="peaks")
        assert margin_of(target, 0.2) == MemoryMargin(share=0.2, source="asked for")
        assert margin_of(target, 0.0) is None
        with pytest.raises(InputError, match=r"a share from 0 up to 1, found -0\.1"):
            margin_of(target, -0.1)


def rows(framework: str, exceeding: list[float], status: str = "ok") -> list[RowScore]:
    """Runs whose measured peak is ``1 + exceeding`` times the predicted one."""
    return [
        RowScore(
            row_id=f"{framework}-{index}",
            family="f",
            framework=framework,
            peak_error=1.0 / (1.0 + each) - 1.0,
            status=status,
        )
        for index, each in enumerate(exceeding)
    ]


class TestDerived:
    def test_the_smallest_share_that_nine_of_ten_do_not_exceed(self) -> None:
        found = derive_margins(rows("nanotron", [0.5] * 10 + [0.0301] + [-0.2] * 89), FRAMEWORKS)["nanotron"]
        assert found.margin == pytest.approx(0.031)  # rounded up: the 90th of 100 exceeds by 3.01 %
        assert found.source == "90% of 100 published peaks of nanotron stay within it"

    def test_never_below_zero(self) -> None:
        assert derive_margins(rows("nanotron", [-0.3] * 20), FRAMEWORKS)["nanotron"].margin == 0.0

    def test_versions_are_one_target(self) -> None:
        found = derive_margins(rows("nanotron", [0.0] * 10) + rows("nanotron-2024", [0.2] * 10), FRAMEWORKS)
        assert found["nanotron"] == found["nanotron-2024"]
        assert found["nanotron"].margin == pytest.approx(0.2)

    def test_few_peaks_are_widened_to_those_of_relatives(self) -> None:
        many = rows("megatron-lm", [0.02] * 40)
        few = derive_margins(many + rows("megatron-bridge", [0.1] * (MIN_PEAKS - 1)), FRAMEWORKS)
        assert few["megatron-bridge"].margin == pytest.approx(0.1)
        assert few["nemo"] == few["megatron-bridge"]
        assert few["megatron-lm"].margin == pytest.approx(0.02)
        assert few["megatron-deepspeed"].margin == pytest.approx(0.1)  # has none of its own
        narrow = derive_margins(many + rows("megatron-bridge", [-0.1] * (MIN_PEAKS - 1)), FRAMEWORKS)
        assert narrow["megatron-bridge"].margin == pytest.approx(0.02)
        own = derive_margins(many + rows("megatron-bridge", [-0.1] * MIN_PEAKS), FRAMEWORKS)
        assert own["megatron-bridge"].margin == 0.0

    def test_our_own_is_what_torchtitan_shows(self) -> None:
        found = derive_margins(rows("torchtitan", [0.05] * 11), FRAMEWORKS)
        assert found["meshwright"].margin == pytest.approx(0.05)
        assert "11 published peaks of torchtitan" in found["meshwright"].source
        assert "nanotron" not in found

    def test_runs_that_failed_say_nothing(self) -> None:
        assert derive_margins(rows("nanotron", [0.5] * 20, status="oom"), FRAMEWORKS) == {}

    def test_written_as_targets_read_it(self, tmp_path: Path) -> None:
        found = derive_margins(rows("nanotron", [0.05] * 20), FRAMEWORKS)
        write_margins(found, tmp_path / "margins.json")
        written = json.loads((tmp_path / "margins.json").read_text(encoding="utf-8"))
        assert written["nanotron"] == {"margin": 0.05, "source": found["nanotron"].source}

    def test_relatives_are_targets(self) -> None:
        named = [name for family in RELATIVES for name in family]
        assert len(named) == len(set(named)) and set(named) <= set(FRAMEWORKS)
        assert not [name for name in named if FRAMEWORKS[name].version_of]


def test_every_target_has_a_margin_that_names_its_peaks() -> None:
    for name, target in FRAMEWORKS.items():
        assert 0.0 <= target.memory.margin < 1.0, name
        assert "published peaks of" in target.memory.margin_source, name


@pytest.mark.skipif(not TABLE.is_file(), reason="the table of published runs is not here")
def test_the_stored_margins_are_those_that_the_published_peaks_give() -> None:
    stored = json.loads(MARGINS.read_text(encoding="utf-8"))
    derived = derive_margins(validate(TABLE).rows, FRAMEWORKS)
    again = "the memory model changed: python benchmarks/memory_margin.py"
    assert stored == {name: {"margin": each.margin, "source": each.source} for name, each in derived.items()}, again


def priced(config: ParallelConfig, target: str = "meshwright", **kinds: int) -> Plan:
    """A plan with a device of 100 bytes, 10 of them reserved, and that memory at its peak."""
    plan = plan_for(config, load_model("llama3-8b"), Workload(seq_len=4096, global_batch_size=64), CLUSTER)
    assert plan.memory is not None
    given: dict[str, Any] = {f"{kind}_bytes": kinds.get(kind, 0) for kind in (*KINDS, "fragmentation")}
    memory: MemoryBreakdown = replace(plan.memory, capacity_bytes=100, reserved_bytes=10, **given)
    return replace(plan, framework=target, memory=memory, memory_margin=MemoryMargin(share=0.1, source="peaks"))


class TestTight:
    def test_the_largest_kind_where_little_is_left(self) -> None:
        assert TIGHT == 0.9  # 81 of 90 bytes, a margin of a tenth included
        assert largest_kind(priced(ParallelConfig(dp=16), params=33, activations=40)) is None
        assert largest_kind(priced(ParallelConfig(dp=16), params=34, activations=40)) == "activations"
        assert largest_kind(replace(priced(ParallelConfig(dp=16)), memory=None)) is None

    @pytest.mark.parametrize(
        ("kind", "config", "target", "changes"),
        [
            ("activations", ParallelConfig(dp=16), "meshwright", ("recompute selective or full", "more cp", "more tp")),
            (
                "activations",
                ParallelConfig(tp=2, dp=8, micro_batch_size=2, recompute=Recompute.FULL, vocab_parallel=True),
                "meshwright",
                ("a smaller micro batch", "sequence parallelism", "more cp"),
            ),
            ("activations", ParallelConfig(dp=16), "nanotron", ("recompute full", "more tp")),
            ("activations", ParallelConfig(dp=16), "torchtitan", ("recompute selective or full", "more cp", "more tp")),
            ("activations", ParallelConfig(dp=16, recompute=Recompute.FULL), "deepspeed", ("more cp",)),
            ("optimizer", ParallelConfig(dp=16), "megatron-lm", ("ZeRO 1", "more pp", "more tp")),
            ("optimizer", ParallelConfig(dp=16, dp_shard=16, zero_stage=1), "megatron-lm", ("more pp", "more tp")),
            ("grads", ParallelConfig(dp=16, dp_shard=16, zero_stage=1), "meshwright", ("ZeRO 2", "more pp", "more tp")),
            ("params", ParallelConfig(dp=16), "llm-foundry", ("ZeRO 3",)),
            ("params", ParallelConfig(tp=16, vocab_parallel=True), "meshwright", ("more pp", "more tp")),
        ],
    )
    def test_changes_are_open_to_the_plan_and_its_target(
        self, kind: str, config: ParallelConfig, target: str, changes: tuple[str, ...]
    ) -> None:
        plan = replace(priced(ParallelConfig(dp=16)), framework=target)
        changed = replace(
            plan,
            config=config,
            micro_batches_per_data_rank=(64 // config.dp // config.micro_batch_size,) * config.dp,
        )
        assert what_helps(changed, kind) == changes

    def test_backward_that_is_split_is_not_recomputed(self) -> None:
        config = ParallelConfig(pp=2, dp=8, vpp=2, schedule=Schedule.ZBV)
        plan = plan_for(config, load_model("llama3-8b"), Workload(seq_len=4096, global_batch_size=64), CLUSTER)
        assert what_helps(plan, "activations") == ("more cp", "more tp")

    def test_a_target_of_ones_own_has_no_levers(self) -> None:
        plan = replace(priced(ParallelConfig(dp=16), activations=80), framework="my-trainer")
        assert what_helps(plan, "activations") == ()
        assert TestShown().shown(plan).rstrip().endswith("tight: most of it is activations")

    def test_a_model_made_whole_is_not_sharded(self) -> None:
        plan = priced(ParallelConfig(dp=16), params=80)
        assert plan.memory is not None
        built = replace(plan, memory=replace(plan.memory, moment=Moment.BUILD))
        assert what_helps(plan, "params") == ("ZeRO 3", "more pp", "more tp")
        assert what_helps(built, "params") == ("more pp", "more tp")

    def test_every_kind_has_levers_and_words(self) -> None:
        assert set(LEVERS) == set(KIND_WORDS) == set(KINDS)


NEEDS = "with fragmentation and a margin of 10.0% it needs"


class TestShown:
    def shown(self, plan: Plan) -> str:
        from rich.console import Console

        assert plan.memory is not None
        console = Console(width=120, record=True, file=io.StringIO())
        show_memory(plan, plan.memory, console)
        return console.export_text()

    def test_every_moment_has_words(self) -> None:
        assert set(MOMENT_WORDS) == {moment.value for moment in MOMENTS}

    def test_everything_on_the_device_adds_up(self) -> None:
        text = self.shown(priced(ParallelConfig(dp=16), params=20, activations=30, fragmentation=10))
        lines = {
            line.split("  ")[1].strip(): line
            for line in text.splitlines()
            if "%" in line and not line.startswith("  of ")
        }
        shares = {words: float(line.split("%")[0].split()[-1]) for words, line in lines.items()}
        assert shares == {
            "parameters": 20.0, "activations": 30.0, "fragmentation": 10.0, "margin": 6.0,
            "context, others": 10.0, "free": 24.0,
        }  # fmt: skip
        assert sum(shares.values()) == 100.0
        assert "margin of 10.0%: peaks" in text
        assert "tight" not in text

    def test_a_tight_plan_says_what_would_help(self) -> None:
        text = self.shown(priced(ParallelConfig(dp=16), params=20, activations=60))
        assert (
            "tight: most of it is activations; less of it with recompute selective or full, more cp or more tp" in text
        )

    @pytest.mark.parametrize(
        ("activations", "asked", "words"),
        [
            (70, True, f"recommended: {NEEDS} 77 B"),
            (85, True, f"NOT RECOMMENDED, though it fits: {NEEDS} 94 B, 4 B too much"),
            (95, True, "DOES NOT FIT, 5 B too much"),
            (85, False, "fits; no margin was asked for"),
        ],
    )  # fmt: skip
    def test_whether_it_fits_and_is_recommended_in_words(self, activations: int, asked: bool, words: str) -> None:
        plan = priced(ParallelConfig(dp=16), activations=activations)
        if not asked:
            plan = replace(plan, memory_margin=None)
        assert fit_words(summarize(plan, CLUSTER), plan) == words
        assert plan.memory is not None
        assert needed_of(plan.memory, None) == activations
