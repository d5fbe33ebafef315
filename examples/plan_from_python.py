"""Plan from Python: choose, read the figures, price another way, and see what is said when nothing fits."""

from __future__ import annotations

import meshwright
from meshwright.planner.search import plan_for
from meshwright.planner.summary import summarize
from meshwright.profiler.units import format_bytes, format_count, format_seconds


def main() -> None:
    model = meshwright.load_model("llama3-8b")
    cluster = meshwright.load_cluster("h100-sxm:2")  # two nodes of a preset, or the path of a measured profile
    workload = meshwright.Workload(seq_len=8192, global_batch_size=128)

    plan = meshwright.make_plan(model, workload, cluster)
    figures = summarize(plan, cluster)
    print(f"run {plan.config.describe()}: {format_seconds(figures.step_s)} a step", end=", ")
    print(f"{format_count(figures.tokens_per_s)} tokens/s, {format_bytes(figures.headroom_bytes)} free")

    assert plan.search is not None
    print(f"{plan.search.num_legal:,} legal configs were searched, {plan.search.num_scored:,} of them scored")
    smallest = plan.search.pareto[-1]
    print(f"smallest of those nearly as fast: {smallest.config.describe()}", end=", ")
    print(f"{format_bytes(smallest.memory.peak_bytes)} in {format_seconds(smallest.cost.step_s)}")

    config = meshwright.ParallelConfig(tp=8, dp=2, zero_stage=1, dp_shard=2, vocab_parallel=True)
    priced = plan_for(config, model, workload, cluster)
    print(f"{config.describe()} would take {format_seconds(summarize(priced, cluster).step_s)} a step")

    short = meshwright.Workload(seq_len=2048, global_batch_size=128)
    try:
        meshwright.make_plan(meshwright.load_model("gpt3-175b"), short, cluster, gpus=8)
    except meshwright.Error as error:
        print(f"GPT-3 on 8 devices: {error}")


if __name__ == "__main__":
    main()
