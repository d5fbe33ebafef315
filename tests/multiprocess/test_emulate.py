"""Emulated hosts for real: rates, ranks on their hosts, and nothing left behind however the emulator ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from meshwright import RunError
from meshwright.profiler.emulate import emulate_ranks, run_emulated
from meshwright.profiler.launch import Rank, RankError
from meshwright.profiler.namespaces import HostNamespaces, address, emulation_available
from meshwright.profiler.topology_file import EmulatedHost, EmulatedPair, EmulatedTopology
from meshwright.profiler.virtual import VirtualDevice, device_of_this_rank

REASON = emulation_available()
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts here: {REASON}"),
]

RATE = 25e6  # 200 Mbit/s
ATTEMPTS = 5  # how often a rate is measured before it counts as wrong
ROOT = Path(__file__).parents[2]


def two_hosts(devices: int = 1, **host: object) -> EmulatedTopology:
    hosts = tuple(EmulatedHost(name=name, devices=devices, **host) for name in ("a", "b"))  # type: ignore[arg-type]
    return EmulatedTopology(hosts=hosts, bytes_per_s=RATE)


def goodputs(hosts: HostNamespaces, source: int, target: int, num_flows: int, num_bytes: int) -> list[float]:
    """Bytes a second that each of several flows, all at the same time, delivers from one host to another."""

    def listener() -> socket.socket:
        server = socket.socket()
        server.bind((address(target), 0))
        server.listen(num_flows)
        return server

    server = hosts.run_in(target, listener)
    port = server.getsockname()[1]
    rates = [0.0] * num_flows
    begin = threading.Barrier(2 * num_flows)

    def send(flow: socket.socket) -> None:
        begin.wait()
        flow.sendall(bytes(num_bytes))

    def receive(index: int, flow: socket.socket) -> None:
        begin.wait()
        left, start = num_bytes, time.perf_counter()
        while left:
            left -= len(flow.recv(min(left, 2**18)))
        rates[index] = num_bytes / (time.perf_counter() - start)

    threads, flows = [], []
    for index in range(num_flows):
        out = hosts.run_in(source, lambda: socket.create_connection((address(target), port)))
        into, _ = server.accept()
        flows += [out, into]
        threads += [
            threading.Thread(target=send, args=(out,)),
            threading.Thread(target=receive, args=(index, into)),
        ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for flow in [*flows, server]:
        flow.close()
    return rates


def assert_rates(
    hosts: HostNamespaces, source: int, target: int, num_bytes: int, expected: list[float], rel: float = 0.05
) -> None:
    """One transfer of a few delivers what is stated: others on this machine can disturb some, but set none right."""
    found: list[float] = []
    for _ in range(ATTEMPTS):
        found = goodputs(hosts, source, target, len(expected), num_bytes)
        if found == pytest.approx(expected, rel=rel):
            return
    pytest.fail(f"{ATTEMPTS} transfers, none at {expected} bytes/s within {rel:.0%}; the last: {found}")


def test_rates_alone_and_shared() -> None:
    with HostNamespaces(two_hosts()) as hosts:
        assert_rates(hosts, 0, 1, 10_000_000, [RATE])
        assert_rates(hosts, 1, 0, 4_000_000, [RATE / 4] * 4, rel=0.1)


def test_pairs_uplinks_and_loopback_have_their_own_rates() -> None:
    topology = EmulatedTopology(
        hosts=(
            EmulatedHost(name="a", devices=1, uplink_bytes_per_s=1e7, intra_bytes_per_s=2e7),
            EmulatedHost(name="b", devices=1),
            EmulatedHost(name="c", devices=1),
        ),
        bytes_per_s=RATE,
        pairs=(EmulatedPair(hosts=("c", "b"), bytes_per_s=5e6),),
    )
    with HostNamespaces(topology) as hosts:
        assert_rates(hosts, 1, 2, 2_000_000, [5e6])
        assert_rates(hosts, 0, 1, 4_000_000, [1e7])  # what a may send
        assert_rates(hosts, 2, 0, 4_000_000, [1e7])  # what a may receive
        assert_rates(hosts, 0, 0, 8_000_000, [2e7])
        inside = max(goodputs(hosts, 1, 1, 1, 50_000_000)[0] for _ in range(ATTEMPTS))
        assert inside > 2 * RATE  # no limit inside b


def sum_of_ranks(rank: Rank) -> tuple[float, str, str, float]:
    total = torch.tensor([float(rank.rank)])
    with device_of_this_rank() as device:
        dist.all_reduce(total)
        assert isinstance(device, VirtualDevice)
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        charged_s = device.charged_s
    return total.item(), os.environ["MESHWRIGHT_HOST"], os.environ["LOCAL_RANK"], charged_s


def test_ranks_reduce_across_hosts() -> None:
    results = emulate_ranks(two_hosts(4, device="virtual:h100/1000"), sum_of_ranks, timeout_s=60)
    assert [result[0] for result in results] == [28.0] * 8
    assert [result[1] for result in results] == ["a"] * 4 + ["b"] * 4
    assert [result[2] for result in results] == ["0", "1", "2", "3"] * 2
    assert len({result[3] for result in results}) == 1
    assert results[0][3] > 0


def die(rank: Rank) -> None:
    if rank.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankError, match="rank 3 of 4 died of signal 9"):
        emulate_ranks(two_hosts(2), die, timeout_s=60, backend=None)


def test_a_command_runs_as_every_rank(tmp_path: Path) -> None:
    line = f"echo $RANK $MESHWRIGHT_HOST > {tmp_path}/$RANK; cat /proc/net/fib_trie >> {tmp_path}/$RANK"
    run_emulated(two_hosts(2), ["sh", "-c", line], timeout_s=30)
    assert [(tmp_path / f"{rank}").read_text().split()[1] for rank in range(4)] == ["a", "a", "b", "b"]
    assert "10.77.0.2" in (tmp_path / "3").read_text()
    run_emulated(two_hosts(2), ["sh", "-c", f"touch {tmp_path}/host-$PET_NODE_RANK"], per_host=True, timeout_s=30)
    assert sorted(path.name for path in tmp_path.glob("host-*")) == ["host-0", "host-1"]


def test_a_command_that_fails_or_hangs_is_said() -> None:
    with pytest.raises(RunError, match="rank 1 of 2 ended with exit code 7"):
        run_emulated(two_hosts(), ["sh", "-c", "[ $RANK = 0 ] || exit 7; sleep 60"])
    with pytest.raises(RunError, match="rank 0, 1 of 2 did not end within 1 s"):
        run_emulated(two_hosts(), ["sleep", "60"], timeout_s=1.0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_emulator_is_killed(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "meshwright.cli", "emulate", "-t", str(ROOT / "examples" / "two_hosts.json")]
    # a child of the rank that has left its session, as torchrun's workers do, must not survive either
    rank = ["sh", "-c", f"setsid sleep 300 & stat -Lc %i /proc/self/ns/net > {tmp_path}/$RANK; wait"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell in the background has ignored
    with subprocess.Popen([*command, "--", *rank], stderr=subprocess.DEVNULL, preexec_fn=heard) as emulator:
        wait_until(lambda: sum(path.stat().st_size > 0 for path in tmp_path.iterdir()) == 8)
        ours = {int(path.read_text()) for path in tmp_path.iterdir()}
        assert len(ours) == 2
        assert ours <= namespaces_of_processes()
        emulator.send_signal(how)
        emulator.wait()
    wait_until(lambda: not ours & namespaces_of_processes())


def namespaces_of_processes() -> set[int]:
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found.add(os.stat(f"/proc/{entry}/ns/net").st_ino)
            except OSError:
                continue
    return found


def wait_until(condition: object, timeout_s: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def test_the_example_is_what_the_documentation_says() -> None:
    example = json.loads((ROOT / "examples" / "two_hosts.json").read_text())
    assert example["bytes_per_s"] * 8 == 200e6
