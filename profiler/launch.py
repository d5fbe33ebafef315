"""Start ranks on this machine, hear from them while they run, and say clearly which one died.

Ranks are forked from this process after one import of torch (eight ranks start in a fraction of a second); a parent
that already uses CUDA must not fork, so import torch and leave CUDA alone before calling this.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from meshwright import Error, InfeasibleError, InputError, RunError

_PR_SET_PDEATHSIG = 1
GRACE_S = 2.0  # how long the other ranks may go on after one failed, so that the first cause is the one reported


class RankError(RunError):
    """A rank failed; ``partial`` holds what each rank had reported with ``report`` before, in order of arrival."""

    def __init__(self, message: str, partial: Sequence[tuple[int, Any]] = ()) -> None:
        super().__init__(message)
        self.partial = tuple(partial)


class Rank:
    """What a started function gets: who it is, and a way to tell the parent something before it is done."""

    def __init__(self, rank: int, num_ranks: int, connection: Connection) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._connection = connection

    def report(self, value: Any) -> None:
        """Send ``value`` (picklable) to the parent at once."""
        self._connection.send(("report", value))


def run_ranks(
    function: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout_s: float,
    backend: str | None = "gloo",
    cores: Sequence[Sequence[int]] | None = None,
    on_report: Callable[[int, Any], None] | None = None,
    before: Callable[[int], None] | None = None,
) -> list[Any]:
    """Call ``function(rank, *args)`` on ``num_ranks`` forked processes; returns their results by rank.

    ``rank`` is a ``Rank``; with a ``backend`` the default process group is initialised around the call. ``cores`` pins
    rank ``i`` to the processors ``cores[i]``. ``on_report`` is called in this process for each ``Rank.report``;
    ``before`` with the rank's number in the rank itself, first of all (to move to another host, to set variables).

    Raises:
        RankError: a rank raised, died or did not end within ``timeout_s``; the others are stopped first. The message
            names the rank and the cause; a rank's own ``RunError`` keeps its sentence.
        InputError, InfeasibleError: a rank raised it; the sentence is the rank's.
    """
    context = multiprocessing.get_context("fork")
    partial: list[tuple[int, Any]] = []
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        processes, connections = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(function, args, rank, num_ranks, theirs, f"{folder}/store", backend, cores and cores[rank]),
                kwargs={"timeout_s": timeout_s, "before": before},
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        failures: dict[int, tuple[type[Error], str]] = {}
        try:
            _collect(processes, connections, results, failures, partial, on_report, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                process.join()
            for connection in connections:
                connection.close()
    if failures:
        # a rank that died is the cause of what the others then complain of
        rank, (kind, cause) = min(failures.items(), key=lambda item: not item[1][1].startswith("died"))
        if kind is not RankError:
            raise kind(cause)
        raise RankError(f"rank {rank} of {num_ranks} {cause}", partial)
    if len(results) < num_ranks:
        silent = [rank for rank in range(num_ranks) if rank not in results]
        names = ", ".join(map(str, silent[:8])) + (" ..." if len(silent) > 8 else "")
        raise RankError(f"no answer from rank {names} of {num_ranks} within {timeout_s:.0f} s: stopped", partial)
    return [results[rank] for rank in range(num_ranks)]


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone, however that ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _collect(
    processes: list[Any],
    connections: list[Connection],
    results: dict[int, Any],
    failures: dict[int, tuple[type[Error], str]],
    partial: list[tuple[int, Any]],
    on_report: Callable[[int, Any], None] | None,
    deadline: float,
) -> None:
    """Read the ranks' messages until all are done, one has failed and the grace is over, or the deadline passes."""
    open_ranks = {connection: rank for rank, connection in enumerate(connections)}
    while open_ranks and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(open_ranks), timeout=left):
            assert isinstance(ready, Connection)
            rank = open_ranks[ready]
            try:
                kind, value = ready.recv()
            except EOFError:
                del open_ranks[ready]
                processes[rank].join()
                if rank not in results and rank not in failures:
                    failures[rank] = RankError, _exit_cause(processes[rank].exitcode)
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                continue
            if kind == "report":
                partial.append((rank, value))
                if on_report:
                    on_report(rank, value)
            elif kind == "result":
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + GRACE_S)


def _exit_cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        hint = ", which is also what the system does when memory runs out" if exitcode == -signal.SIGKILL else ""
        return f"died of signal {-exitcode} ({signal.Signals(-exitcode).name}){hint}"
    return f"ended early with exit code {exitcode}"


def _child(
    function: Callable[..., Any],
    args: Sequence[Any],
    rank: int,
    num_ranks: int,
    connection: Connection,
    store: str,
    backend: str | None,
    cores: Sequence[int] | None,
    timeout_s: float,
    before: Callable[[int], None] | None,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    die_with_parent()
    if cores:
        os.sched_setaffinity(0, cores)
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in local.items()})
    try:
        if before:
            before(rank)
        if backend:
            import torch
            import torch.distributed as dist

            torch.set_num_threads(len(cores) if cores else 1)
            dist.init_process_group(
                backend,
                store=dist.FileStore(store, num_ranks),  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateImportUsage]
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=timeout_s),
            )
        connection.send(("result", function(Rank(rank, num_ranks, connection), *args)))
    except (InputError, InfeasibleError) as error:  # what every rank would say, and not this rank's failing
        kind = InputError if isinstance(error, InputError) else InfeasibleError
        connection.send(("failure", (kind, str(error))))
    except Error as error:
        connection.send(("failure", (RankError, f"on {socket.gethostname()}: {error}")))
    except BaseException:
        connection.send(("failure", (RankError, f"raised:\n{traceback.format_exc()}")))
    finally:
        connection.close()
        os._exit(0)  # skip the parent's exit handlers and a process group that may hang
