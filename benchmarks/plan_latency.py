"""How long ``meshwright plan`` takes, start of Python included: the median of some runs in fresh processes.

Run it with ``python benchmarks/plan_latency.py``; the target is 1.5 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMAND = [
    *(sys.executable, "-m", "meshwright.cli", "plan", "llama3-8b", "--cluster", "h100-sxm:8"),
    *("--global-batch", "512", "--seq-len", "8192"),
]
RUNS = 7


def main() -> None:
    seconds = []
    scored = ""
    for _ in range(RUNS):
        started = time.perf_counter()
        done = subprocess.run(COMMAND, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        scored = next(line.strip() for line in done.stdout.splitlines() if line.startswith("scored"))
    print(" ".join(COMMAND[1:]))
    print(f"median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s of {RUNS}; {scored}")


if __name__ == "__main__":
    main()
