"""How fast the cost models score the whole legal space: ``python benchmarks/scoring.py [MODEL] [CLUSTER]``."""

from __future__ import annotations

import sys
import time

from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.workload import Workload
from meshwright.planner.space import legal_space
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import load_model

REPEATS = 5


def main(model_name: str = "llama3-8b", cluster_name: str = "h100-sxm:8") -> None:
    model, cluster = load_model(model_name), load_cluster(cluster_name)
    workload = Workload(seq_len=8192, global_batch_size=512)
    start = time.perf_counter()
    batch = legal_space(model, workload, cluster.num_devices, MESHWRIGHT).batch
    print(f"{model_name} on {cluster_name}: {len(batch)} legal configs found in {time.perf_counter() - start:.3f} s")
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        estimate_batch(model, workload, cluster, MESHWRIGHT, batch)
        times.append(time.perf_counter() - start)
    best = min(times)
    print(f"scored in {best:.3f} s (best of {REPEATS}): {len(batch) / best:,.0f} configs a second")


if __name__ == "__main__":
    main(*sys.argv[1:])
