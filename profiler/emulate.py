"""A cluster rehearsed on one Linux machine: real ranks on emulated hosts, with a virtual device each if one is named.

Two ways in. ``run_emulated`` starts a command as every rank, or once a host, with the environment that torchrun gives.
``emulate_ranks`` forks the ranks from this process after one import of torch: eight ranks start in about a second.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from meshwright import InputError, RunError
from meshwright.profiler.launch import GRACE_S, run_ranks
from meshwright.profiler.namespaces import INTERFACE, HostNamespaces, address
from meshwright.profiler.topology_file import EmulatedTopology
from meshwright.profiler.virtual_name import DEVICE_VARIABLE

HOST_VARIABLE = "MESHWRIGHT_HOST"  # the emulated host's name: all of them share the machine's own host name
PORT = 29500  # free in every rehearsal, as its namespaces are its own


def rank_environment(topology: EmulatedTopology, rank: int) -> dict[str, str]:
    """The variables of one rank, as torchrun names them, and those that name its host and its virtual device."""
    host, local_rank = topology.host_of(rank)
    return {
        **host_environment(topology, host),
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(host),
        "WORLD_SIZE": str(topology.num_ranks),
        "LOCAL_WORLD_SIZE": str(topology.hosts[host].devices),
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(PORT),
    }


def host_environment(topology: EmulatedTopology, host: int) -> dict[str, str]:
    """The variables of a command that is started once a host; those in ``PET_`` are torchrun's own options."""
    own = topology.hosts[host]
    variables = {
        HOST_VARIABLE: own.name,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PET_NNODES": str(len(topology.hosts)),
        "PET_NODE_RANK": str(host),
        "PET_NPROC_PER_NODE": str(own.devices),
        "PET_MASTER_ADDR": address(0),
        "PET_MASTER_PORT": str(PORT),
    }
    return variables | ({DEVICE_VARIABLE: own.device} if own.device else {})


def emulate_ranks(
    topology: EmulatedTopology,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float,
    backend: str | None = "gloo",
    on_report: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Call ``function(rank, *args)`` on every rank of a topology, each on its host; returns their results by rank.

    As ``launch.run_ranks``, and each rank finds the variables of ``rank_environment``. The virtual device is the
    function's to open, with ``virtual.device_of_this_rank()``.

    Raises:
        InputError: this machine does not allow emulated hosts.
        RankError: a rank raised, died or did not end within ``timeout_s``.
    """
    with HostNamespaces(topology) as hosts:
        return run_ranks(
            function,
            topology.num_ranks,
            *args,
            timeout_s=timeout_s,
            backend=backend,
            on_report=on_report,
            before=partial(_become_rank, hosts),
        )


def _become_rank(hosts: HostNamespaces, rank: int) -> None:
    os.environ.update(rank_environment(hosts.topology, rank))
    hosts.enter(hosts.topology.host_of(rank)[0])


def run_emulated(
    topology: EmulatedTopology,
    command: Sequence[str],
    *,
    per_host: bool | None = None,
    timeout_s: float | None = None,
) -> None:
    """Run ``command`` as every rank, each on its host; what they print goes where this process prints.

    ``per_host`` starts it once on each host instead; by default so for ``torchrun``, which starts the ranks itself.

    Raises:
        InputError: this machine does not allow emulated hosts, or there is no such command.
        RunError: a rank ended with another code than 0, or the time-out passed; the others are stopped.
    """
    if per_host is None:
        per_host = Path(command[0]).name == "torchrun"
    count = len(topology.hosts) if per_host else topology.num_ranks
    with HostNamespaces(topology) as hosts:
        started: list[subprocess.Popen[bytes]] = []
        try:
            for index in range(count):
                host = index if per_host else topology.host_of(index)[0]
                variables = host_environment(topology, host) if per_host else rank_environment(topology, index)
                started.append(_start(command, os.environ | variables, partial(hosts.enter, host)))
            _wait(started, "host" if per_host else "rank", timeout_s)
        finally:
            hosts.close()
            for process in started:
                process.wait()


def _start(command: Sequence[str], environment: dict[str, str], enter: Callable[[], None]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=environment, preexec_fn=enter)
    except OSError as error:
        raise InputError(f"cannot start {command[0]}: {error.strerror}") from None


def _wait(started: Sequence[subprocess.Popen[bytes]], what: str, timeout_s: float | None) -> None:
    """Until all have ended well. After the first failure the others get a moment, so that the first cause is told."""
    deadline = time.monotonic() + timeout_s if timeout_s is not None else None
    failed: dict[int, int] = {}
    while any(process.poll() is None for process in started):
        if deadline is not None and time.monotonic() > deadline:
            break
        for index, process in enumerate(started):
            if process.poll() and index not in failed:
                failed[index] = process.returncode
                deadline = min(deadline or float("inf"), time.monotonic() + GRACE_S)
        time.sleep(0.02)
    for index, process in enumerate(started):
        if process.returncode:
            failed.setdefault(index, process.returncode)
    if failed:
        index, code = next(iter(failed.items()))
        how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise RunError(f"{what} {index} of {len(started)} {how}; the others were stopped")
    silent = [str(index) for index, process in enumerate(started) if process.returncode is None]
    if silent:
        raise RunError(f"{what} {', '.join(silent)} of {len(started)} did not end within {timeout_s:.0f} s: stopped")
