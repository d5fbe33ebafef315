"""One command's worth: start ranks on this machine, or join those that are there, measure, and keep what was found.

Among ranks that a launcher started (``peers.launcher_ranks``) the whole cluster is measured. When a rank dies, what was
measured before goes to ``NAME.partial.json`` beside the output, and the error says which rank it was.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshwright import InputError, RunError
from meshwright.profiler import artifact
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.findings import Findings
from meshwright.profiler.launch import RankError, run_ranks
from meshwright.profiler.measure import MeasureOptions, measure, measure_rank
from meshwright.profiler.peers import launcher_ranks, lost_a_peer, silent_ranks
from meshwright.profiler.virtual_name import DEVICE_VARIABLE

OnProgress = Callable[[float, str], None]

DEFAULT_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",), "virtual": ("bfloat16", "float32")}
KNOWN_DTYPES = ("float32", "bfloat16", "float16", "float64")
REPLY_S = 50.0  # how long a rank waits for another before it is taken for dead


def profile_cluster(
    *,
    num_ranks: int | None = None,
    device: str | None = None,
    dtypes: Sequence[str] = (),
    budget_s: float | None = None,
    name: str | None = None,
    keep_partial: Path | None = None,
    on_progress: OnProgress = lambda share, text: None,
) -> ClusterProfile | None:
    """Measure this machine, or the cluster among whose ranks this process is; None on its ranks other than 0.

    ``num_ranks`` (only on one machine) defaults to one for each GPU, else for each core; ``device`` to cuda where
    there is any, else cpu, or a virtual device's name. ``keep_partial`` is where findings go when a rank dies.

    Raises:
        InputError: an unknown device or dtype, ``keep_partial`` cannot be written, or ``num_ranks`` given among ranks
            that are already there.
        RunError: a rank died, hung or ran out of memory; the message names it, and where the findings are.
    """
    device = device or os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.device_count() else "cpu")
    family = device.partition(":")[0]
    if family not in DEFAULT_DTYPES or (family != "virtual" and device != family):
        raise InputError(f"unknown device {device!r}: expected cpu, cuda or virtual:KIND/DIVISOR")
    if device == "cuda" and not torch.cuda.device_count():
        raise InputError("no CUDA device is visible to torch; measure the processor with --device cpu")
    for dtype in dtypes:
        if dtype not in KNOWN_DTYPES:
            raise InputError(f"unknown dtype {dtype!r}: expected one of {', '.join(KNOWN_DTYPES)}")
    joined = launcher_ranks()
    if keep_partial is not None and (not joined or joined[0] == 0):
        artifact.check_writable(keep_partial)
    if joined and num_ranks is not None:
        raise InputError(f"--nproc is for one machine; here {joined[1]} ranks were started by a launcher")
    count = joined[1] if joined else num_ranks or default_ranks(device)
    options = MeasureOptions(
        device=device, dtypes=tuple(dtypes) or DEFAULT_DTYPES[family], budget_s=budget_s or default_budget_s(count)
    )
    findings = Findings(name=name or socket.gethostname())
    if joined:
        return _among(joined, options, findings, keep_partial, on_progress)
    try:
        run_ranks(
            measure_rank,
            count,
            options,
            timeout_s=REPLY_S + 4 * options.budget_s,
            backend="nccl" if device == "cuda" else "gloo",
            cores=core_shares(count) if device == "cpu" else None,
            before=torch.cuda.set_device if device == "cuda" else None,
            on_report=lambda rank, section: _take(findings, section, on_progress),
        )
    except RankError as error:
        raise RunError(f"{error}{_keep(findings, str(error), keep_partial)}") from None
    return findings.profile()


def default_ranks(device: str) -> int:
    """One rank for each GPU, or for each core this process may use."""
    return torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))


def default_budget_s(num_ranks: int) -> float:
    """20 s for two ranks and a little more for more; pairs and shapes of groups grow with them."""
    return 18.0 + min(num_ranks, 8) + 0.5 * max(0, num_ranks - 8)


def core_shares(num_ranks: int) -> list[list[int]] | None:
    """The cores of each rank, neighbours together, the same number for each; None with more ranks than cores."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // num_ranks
    return [cores[rank * share : (rank + 1) * share] for rank in range(num_ranks)] if share else None


def _take(findings: Findings, section: tuple[str, Any], on_progress: OnProgress) -> None:
    name, value = section
    findings.add(name, value)
    if name == "progress":
        on_progress(*value)


def _keep(findings: Findings, failure: str, path: Path | None) -> str:
    """Write what was found, and say where; nothing when there is nothing."""
    if path is None or not findings.ranks:
        return "; nothing was measured yet" if path else ""
    artifact.save(findings.partial(failure), path)
    return f"; what was measured before is in {path}"


def _among(
    joined: tuple[int, int, int],
    options: MeasureOptions,
    findings: Findings,
    keep_partial: Path | None,
    on_progress: OnProgress,
) -> ClusterProfile | None:
    """Measure with the ranks that a launcher started. Rank 0 keeps the findings, also on disk after each section."""
    rank, size, local_rank = joined
    if options.device == "cuda":
        torch.cuda.set_device(local_rank)
    elif options.device == "cpu":
        _keep_to_core(local_rank)
    try:
        dist.init_process_group(
            "nccl" if options.device == "cuda" else "gloo",
            init_method="env://",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=REPLY_S),
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} of {size} could not meet the others: {_first_line(error)}") from None
    signal.signal(signal.SIGTERM, _stopped)

    def report(section: tuple[str, Any]) -> None:
        if rank == 0:
            _take(findings, section, on_progress)
            if section[0] in ("link_matrix", "samples"):
                _keep(findings, "not ended", keep_partial)

    try:
        measure(options, report)
    except (RuntimeError, _Stopped) as error:
        if not isinstance(error, _Stopped) and not lost_a_peer(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher stops the rest; rank 0 has something to write
        silent = silent_ranks()
        hosts = {facts.rank: facts.host for facts in findings.ranks}
        names = ", ".join(f"{silent_rank} on {hosts.get(silent_rank, 'an unknown host')}" for silent_rank in silent)
        who = f"no answer from rank {names}" if silent else f"ranks lost each other: {_first_line(error)}"
        kept = _keep(findings, who, keep_partial) if rank == 0 else ""
        raise RunError(f"{who} (seen by rank {rank} of {size}){kept}") from None
    dist.destroy_process_group()
    if rank != 0:
        return None
    if keep_partial is not None:
        keep_partial.unlink(missing_ok=True)
    return findings.profile()


class _Stopped(BaseException):
    """The launcher asked this rank to end."""


def _stopped(signum: int, frame: object) -> None:
    raise _Stopped(f"stopped by signal {signum}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _keep_to_core(local_rank: int) -> None:
    """One core a rank, where the launcher left this rank more than one."""
    cores = sorted(os.sched_getaffinity(0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_size <= len(cores):
        share = len(cores) // local_size
        os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])
        torch.set_num_threads(share)
    else:
        torch.set_num_threads(1)
