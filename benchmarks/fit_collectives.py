"""Fit the links of the cluster presets to measured collectives: ``python benchmarks/fit_collectives.py``.

Inside a node: NCCL tables of PyPI's ``aiconfigurator-core`` (Apache-2.0; NVIDIA's nccl-tests runs, sizes of 512 bytes
to 512 MB over 2, 4 and 8 devices): ``pip install 'meshwright[presets]'``, or name the unpacked package's folder. Fitted
are launch, latency of a hop, rate, ramp, a device's own chunk and, where the switch reduces, that rate: six constants a
kind of links, by a robust loss on logarithms; all_to_all only from 1 MB on, below which NCCL changes protocols in a way
that the form does not have.

Between nodes: one real cluster (H100, AWS EFA) from 1 to 64 nodes, ``aux/hf_cluster_collective_bandwidth_256MB.csv``
of the folder of published runs (``MESHWRIGHT_VALIDATION``). Its "GBps" are bus bandwidths of 256 MiB: one node's
all_reduce has 436, the NCCL table 430 at this size. Its all_gather and reduce_scatter take lists of tensors, which
torch copies into one buffer or out of it: a read and a write of the whole, priced by the device's memory; with it one
node's 250 is met without being fitted. Fitted are step of a ring, rate and congestion.

Printed are errors by operation; ``--write`` puts the constants into ``profiler/presets/links``.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.collectives import Groups, seconds
from meshwright.profiler.cluster import ClusterProfile, LinkTier, load_cluster
from meshwright.profiler.cluster_presets import LINK_FOLDER

FloatArray = NDArray[np.float64]

TABLES = {  # a kind of links, a preset that has it, and the tables below systems/data
    "nvlink3": ("a100-sxm", ("a100_sxm/comm/nccl/2.27.3",)),
    "nvlink4": ("h100-sxm", ("h100_sxm/comm/nccl/2.29.2", "h200_sxm/comm/nccl/2.29.2")),
    "nvlink5": ("b200-sxm", ("b200_sxm/comm/nccl/2.29.2", "b300_sxm/comm/nccl/2.29.2")),
    "nvlink5-nvl72": ("gb200-nvl72", ("gb200/comm/nccl/2.29.2", "gb300/comm/nccl/2.29.2")),
    "pcie5": ("l40s", ("rtx_pro_6000_server/comm/nccl/2.29.2",)),
}
OPS = {  # as the tables write them
    "all_reduce": "all_reduce",
    "AllReduce": "all_reduce",
    "all_gather": "all_gather",
    "AllGather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "ReduceScatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
SMALLEST_EXCHANGE = 1e6
MESSAGE_BYTES = 2.0**28  # of the EFA cluster's file
AUX = "aux/hf_cluster_collective_bandwidth_256MB.csv"
NODE_FIELDS = ("launch_s", "latency_s", "bytes_per_s", "half_bytes", "copy_hops", "reduction_bytes_per_s")
NETWORK_FIELDS = ("step_s", "bytes_per_s", "congestion")


@dataclass(frozen=True, slots=True)
class Samples:
    """Measured calls: arrays of one length. ``ranks_inside`` is how many of ``num_ranks`` are on one node."""

    op: NDArray[np.str_]
    num_ranks: FloatArray
    ranks_inside: FloatArray
    num_bytes: FloatArray
    seconds: FloatArray

    def take(self, rows: NDArray[np.bool_]) -> Samples:
        """Those rows alone."""
        return Samples(*(getattr(self, name)[rows] for name in self.__slots__))


def main() -> None:
    """Fit, print and, if asked to, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--package", type=Path, help="folder of an unpacked aiconfigurator_core")
    parser.add_argument("--write", action="store_true", help="write the constants into the presets")
    arguments = parser.parse_args()
    folder = _tables(arguments.package)
    for name, (preset, tables) in TABLES.items():
        fields = tuple(
            field for field in NODE_FIELDS if field != "reduction_bytes_per_s" or name in ("nvlink4", "nvlink5")
        )
        # over 4 devices a ring is quicker than the switch: what is not fitted must not stand in its way
        cluster = _with(load_cluster(preset), 0, {"reduction_bytes_per_s": None})
        samples = nccl_samples(folder / table for table in tables)
        fitted = fit(cluster, 0, fields, samples, [1e-6, 1e-7, 1e9, 1e3, 1e-2, 1e9], [1e-4, 1e-5, 1e12, 1e8, 1.0, 1e12])
        report(name, fitted.tiers[0], fields, samples, predicted(fitted, samples))
        if arguments.write:
            _write(name, fitted.tiers[0], fields)
    path = Path(os.environ.get("MESHWRIGHT_VALIDATION", "../shared/validation")) / AUX
    cluster, samples = load_cluster("h100-efa:64"), efa_samples(path)
    across = samples.take(samples.num_ranks > samples.ranks_inside)
    fitted = fit(cluster, 1, NETWORK_FIELDS, across, [1e-6, 1e9, 1e-3], [1e-3, 5e10, 2.0], listed=True)
    report("efa-32x100", fitted.tiers[1], NETWORK_FIELDS, across, predicted(fitted, across, listed=True))
    every = predicted(fitted, samples, listed=True) / samples.seconds - 1.0
    for op in sorted(set(samples.op)):
        rows = samples.op == op
        errors = ", ".join(f"{n / 8:.0f}: {e:+.0%}" for n, e in zip(samples.num_ranks[rows], every[rows], strict=True))
        print(f"    {op} by nodes: {errors}")
    if arguments.write:
        _write("efa-32x100", fitted.tiers[1], NETWORK_FIELDS)


def nccl_samples(folders: Iterable[Path]) -> Samples:
    """The 16-bit rows of ``nccl_perf.parquet``: ``message_size`` counts elements, ``latency`` milliseconds.

    The size is that of nccl-tests: the whole buffer, for all_gather the output and for reduce_scatter the input.
    """
    rows = []
    for folder in folders:
        table = import_module("pyarrow.parquet").read_table(folder / "nccl_perf.parquet").to_pydict()
        columns = (table[name] for name in ("nccl_dtype", "op_name", "num_gpus", "message_size", "latency"))
        rows += [
            (OPS[op], float(ranks), 2.0 * size, 1e-3 * latency)
            for dtype, op, ranks, size, latency in zip(*columns, strict=True)
            if dtype == "half"
        ]
    ops, ranks, sizes, times = zip(*rows, strict=True)
    return Samples(np.array(ops), np.array(ranks), np.array(ranks), np.array(sizes), np.array(times))


def efa_samples(path: Path) -> Samples:
    """Means of bus bandwidth, as seconds of a call on whole nodes of eight."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    op = np.array([OPS[row["collective"]] for row in rows])
    ranks = 8.0 * np.array([float(row["nodes"]) for row in rows])
    rounds = np.where(op == "all_reduce", 2.0, 1.0) * (ranks - 1.0) / ranks
    rate = 1e9 * np.array([float(row["GBps_mean"]) for row in rows])
    sizes = np.full(len(rows), MESSAGE_BYTES)
    return Samples(op, ranks, np.full(len(rows), 8.0), sizes, rounds * sizes / rate)


def predicted(cluster: ClusterProfile, samples: Samples, *, listed: bool = False) -> FloatArray:
    """Seconds of each call by the cost model; ``listed`` adds torch's copy between a list of tensors and one buffer."""
    result = np.zeros(len(samples.op))
    for op in set(samples.op):
        rows = samples.op == op
        ranks, inside = samples.num_ranks[rows], samples.ranks_inside[rows]
        tiers = np.stack([inside, ranks]) if len(cluster.tiers) > 1 else ranks[None]
        groups = Groups(ranks, tiers, inside.astype(np.int64))
        result[rows] = seconds(cluster, str(op), groups, samples.num_bytes[rows])
        if listed and op != "all_reduce":
            result[rows] += 2.0 * samples.num_bytes[rows] / cluster.device.memory_bytes_per_s
    return result


def fit(
    cluster: ClusterProfile,
    place: int,
    fields: tuple[str, ...],
    samples: Samples,
    low: list[float],
    high: list[float],
    *,
    listed: bool = False,
) -> ClusterProfile:
    """The cluster with those fields of tier ``place`` that fit best, found in logarithms between bounds."""
    used = samples.take((samples.op != "all_to_all") | (samples.num_bytes >= SMALLEST_EXCHANGE))
    bounds = np.log(low[: len(fields)]), np.log(high[: len(fields)])

    def at(point: FloatArray) -> ClusterProfile:
        return _with(cluster, place, dict(zip(fields, np.exp(point).tolist(), strict=True)))

    def errors(point: FloatArray) -> FloatArray:
        return np.log(predicted(at(point), used, listed=listed) / used.seconds)

    least_squares = import_module("scipy.optimize").least_squares  # without stubs
    generator, best = np.random.default_rng(0), None
    for _ in range(12):
        start = bounds[0] + (bounds[1] - bounds[0]) * generator.uniform(0.2, 0.8, len(fields))
        found = least_squares(errors, start, bounds=bounds, loss="soft_l1", f_scale=0.1)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return _rounded(at(best.x), place, fields)


def report(name: str, tier: LinkTier, fields: tuple[str, ...], samples: Samples, found: FloatArray) -> None:
    """Constants, and the errors of each operation."""
    print(f"{name}: " + ", ".join(f"{field} {getattr(tier, field):.4g}" for field in fields))
    error = found / samples.seconds - 1.0
    for op in sorted(set(samples.op)):
        rows = samples.op == op
        large = rows & (samples.num_bytes >= SMALLEST_EXCHANGE)
        figures: list[tuple[str, Callable[[FloatArray], np.floating]]] = [("median", np.median), ("mean", np.mean)]
        words = [
            f"{word} {of(np.abs(error[rows])):.1%} (from 1 MB {of(np.abs(error[large])):.1%})" for word, of in figures
        ]
        print(f"  {op:<15}{rows.sum():>5} calls: absolute error {', '.join(words)}, bias {error[rows].mean():+.1%}")


def _with(cluster: ClusterProfile, place: int, values: Mapping[str, float | None]) -> ClusterProfile:
    changes = dict(values)
    if "bytes_per_s" in changes:
        changes["contended_bytes_per_s"] = changes["bytes_per_s"]
    tiers = list(cluster.tiers)
    tiers[place] = replace(tiers[place], **changes)  # type: ignore[arg-type]
    return replace(cluster, tiers=tuple(tiers))


def _rounded(cluster: ClusterProfile, place: int, fields: tuple[str, ...]) -> ClusterProfile:
    values = {field: float(f"{getattr(cluster.tiers[place], field):.4g}") for field in fields}
    return _with(cluster, place, values)


def _tables(package: Path | None) -> Path:
    if package is None:
        spec = importlib.util.find_spec("aiconfigurator_core")
        if spec is None or spec.origin is None:
            raise SystemExit("aiconfigurator-core is not installed: pip install 'meshwright[presets]'")
        package = Path(spec.origin).parent
    return package / "systems" / "data"


def _write(name: str, tier: LinkTier, fields: tuple[str, ...]) -> None:
    path = LINK_FOLDER / f"{name}.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    for field in (*fields, "contended_bytes_per_s"):
        tree[field] = getattr(tier, field)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
