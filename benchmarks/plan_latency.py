"""How long ``meshwright plan`` takes, start of Python included: the median of some runs in fresh processes.

Run it with ``python benchmarks/plan_latency.py [PROBLEM ...]``. Targets: 1.5 s for dense models on a few nodes, and
3 s for each of the large problems, in which all dimensions are searched, on two cores of a laptop.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

PROBLEMS = {
    "llama3-8b, 64 x H100": ("llama3-8b", "h100-sxm:8", 512, 8192),
    "llama3-70b, 256 x H100": ("llama3-70b", "h100-sxm:32", 1024, 8192),
    "mixtral-8x22b, 128 x H100": ("mixtral-8x22b", "h100-sxm:16", 256, 4096),
    "llama3.1-405b at 131,072 tokens, 16,384 x H100": ("llama3.1-405b", "h100-sxm:2048", 16, 131072),
    "deepseek-v3, 2,048 x H800": ("deepseek-v3", "h800-sxm:256", 15360, 4096),
}
RUNS = 5


def main(*chosen: str) -> None:
    for title, (model, cluster, batch, seq_len) in PROBLEMS.items():
        if chosen and not any(word in title for word in chosen):
            continue
        options = ["--cluster", cluster, "--global-batch", str(batch), "--seq-len", str(seq_len), "--json"]
        command = [sys.executable, "-m", "meshwright.cli", "plan", model, *options]
        seconds, found = [], ""
        for _ in range(RUNS):
            started = time.perf_counter()
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds.append(time.perf_counter() - started)
        report = json.loads(found)["search"]
        print(
            f"{title}: median {statistics.median(seconds):.2f} s, fastest {min(seconds):.2f} s of {RUNS}; "
            f"search {report['seconds']:.2f} s, {report['method']}: {report['num_legal']:,} legal configs, "
            f"{report['num_scored']:,} scored, ruled out by bounds {report['num_too_slow']:,} as too slow and "
            f"{report['num_too_large']:,} as too large"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
