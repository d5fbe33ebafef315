"""Hosts as network namespaces on one Linux machine, joined by a bridge, with a rate for each pair (tc htb).

The namespaces have no names: they live as long as this process holds them open or a process runs inside, so nothing is
left behind, however this process ends. A watcher, forked when they are made, kills what still runs inside when this
process is gone. Everything lies inside the namespaces, the bridge too: the machine's own network is not touched, and
any number of rehearsals can run at once with the same addresses.

The rate of a pair is set at the sender, one htb class for each destination, chosen by a u32 filter; a host's uplink is
the parent of its classes, and for what it receives a class on the bridge's port to it. Rates are payload: a segment of
9000 bytes carries 8948 of message (IP, TCP and timestamps take 52) and 14 of Ethernet are counted with it, so the
class gets 9014/8948 of the stated rate. Acknowledgements, about 0.1 % of the other direction, are left out. There is no
added latency: the kernel's netem, which would add it, is missing from many machines.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from types import TracebackType
from typing import Self, TypeVar

from meshwright import InputError
from meshwright.profiler.launch import die_with_parent
from meshwright.profiler.topology_file import EmulatedTopology

T = TypeVar("T")

INTERFACE = "eth0"  # of each host, inside its namespace

_CLONE_NEWNET = 0x40000000
_MTU = 9000
_WIRE_OVER_PAYLOAD = (_MTU + 14) / (_MTU - 52)
_LOOPBACK_WIRE_OVER_PAYLOAD = (65536 + 14) / (65536 - 52)
_BURST_S = 5e-4  # what may go at once after silence, as time at the rate: little, or short messages would be too fast
_libc = ctypes.CDLL(None, use_errno=True)


def address(host: int) -> str:
    """The IPv4 address of a host by its index, the same in every rehearsal."""
    return f"10.77.0.{host + 1}"


def _hardware_address(host: int) -> str:
    return f"02:00:00:00:00:{host + 1:02x}"


class HostNamespaces:
    """The namespaces of a topology's hosts: a context that makes them and takes them away, with all that runs inside.

    Raises ``InputError`` where this machine does not allow it (see ``emulation_available``).
    """

    def __init__(self, topology: EmulatedTopology) -> None:
        self.topology = topology
        self._descriptors: list[int] = []
        self._inodes: set[int] = set()
        self._watcher: int | None = None

    def __enter__(self) -> Self:
        if reason := emulation_available():
            raise InputError(f"cannot emulate hosts on this machine: {reason}")
        try:
            for _ in range(len(self.topology.hosts) + 1):  # the last one holds the bridge
                self._descriptors.append(_new_namespace())
            self._inodes = {os.fstat(descriptor).st_ino for descriptor in self._descriptors}
            self._watcher = _start_watcher(self._inodes, self._descriptors)
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything that runs inside, then let the namespaces go."""
        _kill_inside(self._inodes)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors, self._inodes = [], set()
        if self._watcher is not None:
            os.kill(self._watcher, signal.SIGKILL)
            os.waitpid(self._watcher, 0)
            self._watcher = None

    def enter(self, host: int) -> None:
        """Move this process (just forked, one thread) to a host for good, to die with the process that forked it."""
        die_with_parent()
        _set_namespace(self._descriptors[host])
        if cores := self.topology.hosts[host].cores:
            os.sched_setaffinity(0, cores)

    def run_in(self, host: int, function: Callable[[], T]) -> T:
        """Call ``function`` in a thread inside a host; sockets it opens and processes it starts stay there."""
        return _in_namespace(self._descriptors[host], function)

    def _build(self) -> None:
        hosts = range(len(self.topology.hosts))
        switch = len(hosts)
        lines = ["link add switch type bridge", "link set switch up"]
        for host in hosts:
            inside = f"/proc/{os.getpid()}/fd/{self._descriptors[host]}"
            lines += [
                f"link add port{host} mtu {_MTU} type veth "
                f"peer name {INTERFACE} address {_hardware_address(host)} mtu {_MTU} netns {inside}",
                f"link set port{host} master switch up",
            ]
        self.run_in(switch, lambda: _batch("ip", lines))
        for host in hosts:
            self.run_in(host, lambda host=host: self._set_up(host))  # type: ignore[misc]
        ports = [line for host in hosts for line in self._port_classes(host)]
        if ports:
            self.run_in(switch, lambda: _batch("tc", ports))

    def _set_up(self, host: int) -> None:
        packet = self._largest_packet(host)
        settings = (
            ("ipv4/tcp_congestion_control", "reno"),  # BBR, some machines' default, paces itself below the stated rate
            ("ipv4/tcp_limit_output_bytes", str(2 * packet)),  # few in the queue from each flow: equal shares
            ("ipv6/conf/all/disable_ipv6", "1"),
        )
        for path, value in settings:  # a kernel may lack one
            with suppress(OSError), open(f"/proc/sys/net/{path}", "w") as file:
                file.write(value)
        _batch(
            "ip",
            [
                "link set lo up",
                f"addr add {address(host)}/24 dev {INTERFACE}",
                f"link set {INTERFACE} gso_max_size {packet} up",
                *(  # known neighbours: on a machine at its limits an unanswered ARP request is a stall of seconds
                    f"neigh add {address(other)} lladdr {_hardware_address(other)} dev {INTERFACE} nud permanent"
                    for other in range(len(self.topology.hosts))
                    if other != host
                ),
            ],
        )
        _batch("tc", self._host_classes(host))

    def _largest_packet(self, host: int) -> int:
        """What TCP may hand to the interface at once, of which a class lets the first through whatever its rate."""
        rates = [
            self.topology.pair_bytes_per_s(host, other) for other in range(len(self.topology.hosts)) if other != host
        ]
        return min(max(round(min(rates, default=0.0) * _BURST_S), _MTU), 65536)

    def _host_classes(self, host: int) -> list[str]:
        """The classes of one host: what it sends to each other host, and what its own ranks send each other."""
        own = self.topology.hosts[host]
        others = [other for other in range(len(self.topology.hosts)) if other != host]
        rates = {other: self.topology.pair_bytes_per_s(host, other) for other in others}
        lines = [f"qdisc add dev {INTERFACE} root handle 1: htb"]
        parent, share = "1:", 1.0
        if own.uplink_bytes_per_s is not None:
            lines.append(_class(INTERFACE, "1:", "1:1", own.uplink_bytes_per_s))
            parent, share = "1:1", min(1.0, own.uplink_bytes_per_s / max(sum(rates.values()), 1.0))
        for other, rate in rates.items():
            minor = f"{other + 16:x}"
            lines += [
                _class(INTERFACE, parent, f"1:{minor}", rate * share, ceiling=rate),
                f"qdisc add dev {INTERFACE} parent 1:{minor} pfifo limit 10000",
                f"filter add dev {INTERFACE} parent 1: protocol ip prio 1 u32 "
                f"match ip dst {address(other)}/32 flowid 1:{minor}",
            ]
        if own.intra_bytes_per_s is not None:
            lines.append("qdisc add dev lo root handle 1: htb default 1")
            lines.append(_class("lo", "1:", "1:1", own.intra_bytes_per_s, overhead=_LOOPBACK_WIRE_OVER_PAYLOAD))
        return lines

    def _port_classes(self, host: int) -> list[str]:
        uplink = self.topology.hosts[host].uplink_bytes_per_s
        if uplink is None:
            return []
        return [f"qdisc add dev port{host} root handle 1: htb default 1", _class(f"port{host}", "1:", "1:1", uplink)]


def _class(
    device: str,
    parent: str,
    name: str,
    bytes_per_s: float,
    *,
    ceiling: float | None = None,
    overhead: float = _WIRE_OVER_PAYLOAD,
) -> str:
    """A tc line: a class that sends ``bytes_per_s`` of payload, and up to ``ceiling`` of what its parent has left."""
    top = bytes_per_s if ceiling is None else ceiling
    burst = max(round(top * _BURST_S), _MTU)
    rates = f"rate {round(bytes_per_s * overhead * 8)}bit ceil {round(top * overhead * 8)}bit"
    return (
        f"class add dev {device} parent {parent} classid {name} htb {rates} burst {burst} cburst {burst} quantum 65536"
    )


@cache
def emulation_available() -> str | None:
    """Why hosts cannot be emulated here, as a phrase for a person; None where they can. Tried once, by doing it."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"the program {program!r} is missing: install iproute2"
    try:
        descriptor = _new_namespace()
    except OSError as error:
        return f"a network namespace needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN), and was refused: {error.strerror}"
    trial = [
        ("ip", ["link add port0 type veth peer name eth0", "link add switch type bridge"]),
        ("tc", ["qdisc add dev eth0 root handle 1: htb", _class("eth0", "1:", "1:10", 1e6)]),
        ("tc", ["filter add dev eth0 parent 1: protocol ip prio 1 u32 match ip dst 10.0.0.1/32 flowid 1:10"]),
    ]
    try:
        for program, lines in trial:
            _in_namespace(descriptor, partial(_batch, program, lines))
    except InputError as error:
        return f"the kernel lacks veth, bridge, htb or u32: {error}"
    finally:
        os.close(descriptor)
    return None


def _batch(program: str, lines: Sequence[str]) -> None:
    done = subprocess.run([program, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{program} refused: {done.stderr.strip() or done.stdout.strip()}")


def _new_namespace() -> int:
    def make() -> int:
        if _libc.unshare(_CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(make)


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _in_namespace(descriptor: int, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread that moved to a namespace."""

    def moved() -> T:
        _set_namespace(descriptor)
        return function()

    return _in_thread(moved)


def _in_thread(function: Callable[[], T]) -> T:
    """Call in a thread of its own: which network a thread sees is the thread's, and ends with it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _start_watcher(inodes: set[int], descriptors: Sequence[int]) -> int:
    """A process that waits for this one to end, then kills what still runs in the namespaces. Its process id."""
    parent = os.pidfd_open(os.getpid())
    watcher = os.fork()
    if watcher:
        os.close(parent)
        return watcher
    try:
        os.setsid()  # Ctrl-C in a terminal is not for it
        os.dup2(parent, 0)
        os.closerange(1, os.sysconf("SC_OPEN_MAX"))  # others must see this process's pipes end when they end
        select.select([0], [], [])
        _kill_inside(inodes)
    finally:
        os._exit(0)


def _kill_inside(inodes: set[int]) -> None:
    """SIGKILL every process whose network is one of the namespaces, until none is left."""
    while inodes:
        found = False
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with suppress(OSError):  # it ended meanwhile
                    if os.stat(f"/proc/{entry}/ns/net").st_ino in inodes:
                        os.kill(int(entry), signal.SIGKILL)
                        found = True
        if not found:
            return
        time.sleep(0.01)
