"""Predicted, dry and real memory of one rank's share of larger plans, on the one device at hand.

    python benchmarks/memory_on_gpu.py                  # on a GPU: the table of docs/accuracy.md
    python benchmarks/memory_on_gpu.py --device cpu     # small models of the same plans, tensors counted one by one

A case is a plan for many GPUs; run is the rank that the prediction says is fullest, without its peers
(``executors/lone_rank.py``). On a GPU the peak is ``max_memory_allocated``, and the dry run counts what CUDA's kernels
save; on a CPU the dry run counts what the CPU's do, and the prediction, which is for a GPU, is only printed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from meshwright.cost_models.estimate import MemoryBreakdown
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute, Schedule
from meshwright.cost_models.targets import FRAMEWORKS
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.executors.dry_run import dry_run, stage_ranks
from meshwright.executors.lone_rank import run_alone
from meshwright.planner.plan import Plan, default_stages
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import ModelSpec, load_model
from meshwright.profiler.units import format_bytes


@dataclass(frozen=True)
class Case:
    """A plan for ``config.world_size`` GPUs; ``num_microbatches`` is of each data rank."""

    model: str
    config: ParallelConfig
    num_microbatches: int = 1
    seq_len: int = 4096
    recipe: str = "bf16"

    @property
    def name(self) -> str:
        """The model and what is split how."""
        return f"{self.model} {self.config.describe()}" + (f" {self.recipe}" if self.recipe != "bf16" else "")


def _case(model: str, num_microbatches: int = 1, seq_len: int = 4096, recipe: str = "bf16", **axes: Any) -> Case:
    tp, zero = axes.get("tp", 1), axes.get("zero_stage", 0)
    axes |= {"vocab_parallel": tp > 1, "dp_shard": axes.get("dp", 1) if zero else 1}
    return Case(model, ParallelConfig(**axes), num_microbatches, seq_len, recipe)


CASES = (
    # layers of a 70B model as 128 to 1,024 GPUs share them
    _case("llama3-70b", 16, tp=8, pp=8, dp=2, zero_stage=1, sequence_parallel=True),
    _case("llama3-70b", 16, tp=8, pp=16, dp=8, zero_stage=1, sequence_parallel=True),
    _case("llama3-70b", 8, tp=8, pp=8, dp=4, sequence_parallel=True, schedule=Schedule.GPIPE, recompute=Recompute.FULL),
    _case(
        "llama3-70b", 8, tp=8, pp=4, dp=8, zero_stage=1, vpp=2, schedule=Schedule.INTERLEAVED, sequence_parallel=True
    ),
    _case("llama3-70b", tp=8, dp=16, zero_stage=3, sequence_parallel=True, recompute=Recompute.FULL),
    _case("llama3-70b", 2, tp=8, dp=16, zero_stage=2, sequence_parallel=True, recompute=Recompute.FULL),
    _case("llama3-70b", dp=128, zero_stage=3, recompute=Recompute.FULL),
    # an 8B model whole, and in halves
    _case("llama3-8b", dp=64, zero_stage=3),
    _case("llama3-8b", 4, dp=8, zero_stage=1, recompute=Recompute.SELECTIVE),
    _case("llama3-8b", 4, dp=8, zero_stage=2, recompute=Recompute.FULL, micro_batch_size=2),
    _case("llama3-8b", 8, 8192, tp=2, pp=4, dp=2, zero_stage=1),
    _case("llama3-8b", 1, 32768, tp=4, dp=4, zero_stage=3, sequence_parallel=True, recompute=Recompute.FULL),
    # other shapes, recipes and schedules
    _case("gpt3-13b", 8, 2048, tp=4, pp=4, dp=2, zero_stage=1, sequence_parallel=True),
    _case("gpt2-xl", 4, 1024, dp=8, zero_stage=2, micro_batch_size=4),
    _case("llama3-8b", 4, 2048, "bf16-pure", dp=16, zero_stage=3),
    _case("qwen3-8b", 8, 2048, "fp32", tp=2, pp=8, dp=2),
    _case("llama3-8b", 16, pp=8, dp=2, schedule=Schedule.ZB_H1, recompute=Recompute.FULL),
    _case("llama3-8b", 8, tp=2, pp=4, dp=2, schedule=Schedule.ZBV, vpp=2, sequence_parallel=True),
)


def plan_of(case: Case, spec: ModelSpec | None = None, seq_len: int | None = None) -> Plan:
    """The case as a plan with its prediction on H200s."""
    config, spec = case.config, spec or load_model(case.model)
    workload = Workload(
        seq_len=seq_len or case.seq_len,
        global_batch_size=case.num_microbatches * config.micro_batch_size * config.dp,
        recipe=RECIPES[case.recipe],
    )
    cluster = load_cluster(f"h200-sxm:{max(8, config.world_size)}")
    batch = ConfigBatch.from_configs([config])
    found = estimate_batch(spec, workload, cluster, FRAMEWORKS["meshwright"], batch).estimate(0, batch)
    return Plan(
        framework="meshwright",
        model=spec,
        workload=workload,
        cluster_name=cluster.name,
        cluster_digest=cluster.digest,
        environment=None,
        config=config,
        placement=Placement(),
        stages=default_stages(spec, config, cluster.device.kind),
        micro_batches_per_data_rank=(case.num_microbatches,) * config.dp,
        cost=found.cost,
        memory=found.memory,
        search=None,
    )


def shrunk(case: Case) -> Plan:
    """The same plan of a model a thousandth the size: as many layers and heads a rank, all of them narrow."""
    spec, tp = load_model(case.model), case.config.tp
    layers = max(2 * case.config.num_stages, 2) if case.config.pp > 1 else 4
    heads, head_dim = max(4, tp), 16
    fields = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads * spec.attention.num_kv_heads // spec.attention.num_heads, 1),
        "intermediate_size": 16 * heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": spec.tied,
    }
    return plan_of(case, replace(load_model(fields), name=f"small {spec.name}"), seq_len=math.lcm(64, tp))


@dataclass(frozen=True)
class Compared:
    """One case's peaks in bytes; ``allocator_bytes`` is what the allocator took from the device, None on a CPU."""

    name: str
    memory: MemoryBreakdown
    dry_bytes: int
    measured_bytes: int
    allocator_bytes: int | None

    @property
    def predicted_error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.memory.peak_bytes / self.measured_bytes - 1

    @property
    def dry_error(self) -> float:
        """The dry run over measured, minus 1."""
        return self.dry_bytes / self.measured_bytes - 1


def compare(case: Case, device: str) -> Compared:
    """Predict, dry-run and run the rank of ``case`` that the prediction says is fullest; small models on a CPU."""
    plan = plan_of(case) if device == "cuda" else shrunk(case)
    assert plan.memory is not None
    rank = stage_ranks(plan)[plan.memory.stage]
    dry = dry_run(None, plan, rank, kernels="cuda" if device == "cuda" else "cpu", all_microbatches=True)
    real = run_alone(plan, rank, device=device)
    return Compared(case.name, plan.memory, dry.peak_bytes, real.peak_bytes, real.reserved_bytes)


def rows(cases: Iterable[Case], device: str) -> Iterator[str]:
    """A line of Markdown for each case."""
    yield "| plan | stage | predicted | dry run | measured | error | dry run's error | allocator's surplus |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases:
        found = compare(case, device)
        surplus = found.allocator_bytes and found.allocator_bytes / found.measured_bytes - 1
        yield (
            f"| {found.name} | {found.memory.stage} | {format_bytes(found.memory.peak_bytes)} "
            f"| {format_bytes(found.dry_bytes)} | {format_bytes(found.measured_bytes)} | {found.predicted_error:+.1%} "
            f"| {found.dry_error:+.1%} | {'-' if surplus is None else f'{surplus:+.1%}'} |"
        )


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    for line in rows([case for case in CASES if options.only in case.name], options.device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
