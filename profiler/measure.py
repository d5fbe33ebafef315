"""What every rank does to measure a cluster, section by section; rank 0 reports each section as soon as it is known.

Sections: who the ranks are, links, collectives, kernels of each dtype with all ranks at work, launches, and compute
while a collective runs. ``budget_s`` is shared out among them; a section that ends early leaves its time unused.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from meshwright.profiler.clock import DeviceClock, Timing, timing_of
from meshwright.profiler.cluster import Device, KernelSample, Provenance, Source
from meshwright.profiler.collectives_bench import (
    OPS,
    CollectiveOptions,
    GroupShape,
    group_shapes,
    measure_collectives,
)
from meshwright.profiler.emulate import HOST_VARIABLE
from meshwright.profiler.environment import capture_environment, cpu_model
from meshwright.profiler.findings import COMMAND, DeviceFacts, RankFacts, nodes_of
from meshwright.profiler.kernels import (
    CPU_SCALE,
    GPU_SCALE,
    KernelCase,
    Scale,
    attention_cases,
    grouped_cases,
    launch_seconds,
    matmul_cases,
    memory_cases,
    time_case,
    virtual_scale,
)
from meshwright.profiler.launch import Rank
from meshwright.profiler.links import LinkOptions, measure_links
from meshwright.profiler.record import record
from meshwright.profiler.rounds import across_rounds, inside_rounds
from meshwright.profiler.virtual import virtual_device
from meshwright.profiler.virtual_name import parse_virtual_device

Report = Callable[[tuple[str, Any]], None]

CASE_REPEATS = 7
CASE_BUDGET_S = 0.012  # for one shape of one operator
ENOUGH_CASES = 16  # that many shapes are timed however busy the machine is
CHECK = 0.4  # a virtual device's curves are stated: its kernels are timed only to see that they hold
SLOW_RANK = 1.2  # a rank this much slower than the median rank is named
# shares of the budget; what is left is start-up, agreement between ranks and the larger cases
LINKS, COLLECTIVES, MATMUL, ATTENTION, GROUPED, MEMORY = 0.16, 0.28, 0.28, 0.12, 0.06, 0.04


@record
class MeasureOptions:
    """What to measure on: ``device`` is cpu, cuda or a virtual device's name; ``dtypes`` as torch names them."""

    device: str
    dtypes: tuple[str, ...]
    budget_s: float


def measure_rank(rank: Rank, options: MeasureOptions) -> None:
    """``measure`` for ranks started by ``launch.run_ranks`` or ``emulate.emulate_ranks``."""
    measure(options, rank.report if dist.get_rank() == 0 else lambda section: None)


def measure(options: MeasureOptions, report: Report) -> None:
    """Measure, with every rank of the default process group; ``report`` gets ``(section, value)`` as ``Findings.add``.

    Raises ``InputError`` where ranks of a host are not neighbours, or a virtual device is unknown.
    """
    described = parse_virtual_device(options.device) if options.device.startswith("virtual:") else None
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    ranks = _rank_facts(options, device, described)
    report(("ranks", ranks))
    hosts = tuple(dict.fromkeys(facts.host for facts in ranks))
    report(("environment", capture_environment(backend=dist.get_backend(), hosts=hosts)))
    nodes = nodes_of(ranks)
    clock = DeviceClock(device)
    if len(ranks) > 1:
        _links(nodes, clock, options, report)
        _collectives(group_shapes(nodes), clock, options, report)
    if described is None:
        before = untracked_bytes(device)
        _kernels(ranks, clock, GPU_SCALE if device.type == "cuda" else CPU_SCALE, options, report)
        _device(ranks, clock, report, loaded_bytes=max(untracked_bytes(device) - before, 0))
    else:
        checked = replace(options, budget_s=options.budget_s * CHECK)
        with virtual_device(options.device) as virtual:
            _kernels(ranks, DeviceClock(device, virtual), virtual_scale(described), checked, report)
        report(("device", _described(described)))
    report(("progress", (1.0, "done")))


def _rank_facts(options: MeasureOptions, device: torch.device, described: Device | None) -> tuple[RankFacts, ...]:
    host = os.environ.get(HOST_VARIABLE) or socket.gethostname()
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or host
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    if described is not None:
        kind, memory, reserved = described.kind, described.memory_bytes, described.reserved_bytes
    elif device.type == "cuda":
        torch.zeros(1, device=device)  # the context is made by the first use
        memory = torch.cuda.mem_get_info(device)[1]
        kind, reserved = torch.cuda.get_device_name(device), untracked_bytes(device)
    else:
        total, available = host_memory()
        kind, memory, reserved = f"cpu {cpu_model()}", total // local_size, (total - available) // local_size
    mine = RankFacts(
        rank=dist.get_rank(), host=host, node=node, kind=kind, memory_bytes=memory, reserved_bytes=max(reserved, 0)
    )
    return tuple(_everyone(mine))


def untracked_bytes(device: torch.device) -> int:
    """What is taken of a GPU, but not by torch's allocator: context, kernels, communicators, others; 0 of a CPU."""
    if device.type != "cuda":
        return 0
    free, memory = torch.cuda.mem_get_info(device)
    return memory - free - torch.cuda.memory_reserved(device)


def host_memory() -> tuple[int, int]:
    """Bytes of memory this host has, and has available now; a container's limit where it is lower."""
    with open("/proc/meminfo", encoding="utf-8") as file:
        lines = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in file}
    total, available = lines["MemTotal"], lines["MemAvailable"]
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
            limit = int(file.read())  # "max" is no number: no limit
    except (OSError, ValueError):
        return total, available
    return min(total, limit), min(available, limit)


def _links(nodes: list[list[int]], clock: DeviceClock, options: MeasureOptions, report: Report) -> None:
    rounds = len(inside_rounds(nodes, one_pair_a_host=True)) + len(across_rounds(nodes))
    share_s = LINKS * options.budget_s
    link_options = LinkOptions(  # each round times two directions, eight messages each with those that find the size
        message_s=float(np.clip(share_s / (16 * rounds), 0.005, 0.05)),
        crowd_s=float(np.clip(share_s / (2 * rounds), 0.05, 0.15)),
    )
    matrix, notes = measure_links(
        nodes, clock, link_options, lambda done: report(("progress", (LINKS * done, "links between ranks")))
    )
    report(("link_matrix", matrix))
    for note in notes:
        report(("note", note))


def _collectives(shapes: Sequence[GroupShape], clock: DeviceClock, options: MeasureOptions, report: Report) -> None:
    collective_options = CollectiveOptions(
        budget_s=COLLECTIVES * options.budget_s,
        largest_bytes=2**26 if clock.device.type == "cpu" else 2**30,
    )
    source = Source(provenance=Provenance.MEASURED, reference=f"{COMMAND}, slowest rank of all groups of a shape")
    total, restless = len(shapes) * len(OPS), []
    for done, curve in enumerate(measure_collectives(shapes, clock, collective_options, source), start=1):
        text = f"{curve.op} over {curve.num_ranks} ranks"
        report(("collective", curve))
        report(("progress", (LINKS + COLLECTIVES * done / total, text)))
        if float(np.median(curve.spread)) > 1.0:
            restless.append(f"{text} ({curve.ranks_per_node} a node)")
    if restless:
        report(
            (
                "note",
                f"{len(restless)} of {total} collective curves were unsteady (samples of a size mostly spread by more "
                f"than their median): {restless[0]}" + (" and others" if len(restless) > 1 else ""),
            )
        )


def _kernels(
    ranks: Sequence[RankFacts], clock: DeviceClock, scale: Scale, options: MeasureOptions, report: Report
) -> None:
    """Every operator in every dtype, all ranks at the same work; samples are medians over the ranks of a kind."""
    done = LINKS + COLLECTIVES if len(ranks) > 1 else 0.0
    slowness: list[Any] = []
    for dtype in options.dtypes:
        for name, cases, share in (
            ("matmul", matmul_cases(dtype, scale), MATMUL),
            ("attention", attention_cases(dtype, scale), ATTENTION),
            ("grouped matmul", grouped_cases(dtype, scale), GROUPED),
            ("memory", memory_cases(dtype, scale), MEMORY),
        ):
            share /= len(options.dtypes)
            report(("progress", (done, f"{name}, {dtype}")))
            timings = _time_cases(cases, clock, scale, share * options.budget_s, whole=name == "memory")
            done += share
            by_rank = np.array(_everyone([(timing.seconds, timing.spread) for timing in timings]))
            report(("samples", _samples(cases[: len(timings)], by_rank, ranks)))
            slowness.append(by_rank[:, :, 0] / np.median(by_rank[:, :, 0], axis=0))
    ratios = np.median(np.concatenate(slowness, axis=1), axis=1)
    for facts, ratio in zip(ranks, ratios, strict=True):
        if ratio > SLOW_RANK:
            report(("note", f"rank {facts.rank} on {facts.host} computes {ratio - 1:.0%} slower than the median rank"))


def _time_cases(
    cases: Sequence[KernelCase], clock: DeviceClock, scale: Scale, budget_s: float, *, whole: bool
) -> list[Timing]:
    """Cases in order, until rank 0's time is up; ``whole`` for short lists that are always finished."""
    start, timings = time.monotonic(), []
    for case in cases:
        timings.append(time_case(case, clock, scale, repeats=CASE_REPEATS, budget_s=CASE_BUDGET_S))
        spent_s = 0.0 if whole else _agreed(time.monotonic() - start, clock.device)
        if spent_s > budget_s and len(timings) >= ENOUGH_CASES:
            break
    return timings


def _samples(cases: Sequence[KernelCase], by_rank: Any, ranks: Sequence[RankFacts]) -> list[tuple[str, KernelSample]]:
    """``by_rank``: [rank, case, (seconds, spread)]."""
    out = []
    for kind in dict.fromkeys(facts.kind for facts in ranks):
        middle = np.median(by_rank[[facts.kind == kind for facts in ranks]], axis=0)
        for case, (seconds, spread) in zip(cases, middle, strict=True):
            sample = KernelSample(
                op=case.op,
                dtype=case.dtype,
                m=case.m,
                n=case.n,
                k=case.k,
                batch=case.batch,
                flops=case.flops,
                num_bytes=case.num_bytes,
                seconds=float(seconds),
                spread=float(spread),
            )
            out.append((kind, sample))
    return out


def _device(ranks: Sequence[RankFacts], clock: DeviceClock, report: Report, *, loaded_bytes: int) -> None:
    """Launches, memory rate, slow-down by communication and the memory of its buffers, of each kind of device."""
    report(("progress", (1.0 - MEMORY, "launches, compute while communicating")))
    scale = GPU_SCALE if clock.device.type == "cuda" else CPU_SCALE
    figures = (
        _memory_rate(clock, scale),
        launch_seconds(clock).seconds,
        _communication_slowdown(clock) if len(ranks) > 1 else 0.0,
        _multiprocessors(clock.device),
        loaded_bytes,
        _communicator_bytes(clock.device) if len(ranks) > 1 else 0,
    )
    by_rank = np.array(_everyone(figures))
    for kind in dict.fromkeys(facts.kind for facts in ranks):
        memory, launch, slowdown, multiprocessors, loaded, communicator = np.median(
            by_rank[[facts.kind == kind for facts in ranks]], axis=0
        )
        facts = DeviceFacts(
            kind=kind,
            memory_bytes_per_s=float(memory),
            launch_s=float(launch),
            communication_slowdown=float(slowdown),
            num_multiprocessors=int(multiprocessors) or None,
            loaded_bytes=int(loaded),
            communicator_bytes=int(communicator),
        )
        report(("device", facts))


def _multiprocessors(device: torch.device) -> int:
    """What a GPU cuts its kernels over; 0 of a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def _communicator_bytes(device: torch.device) -> int:
    """What one more group of all ranks takes of a GPU once it has communicated: NCCL's buffers."""
    if device.type != "cuda":
        return 0
    message = torch.zeros(2**20, device=device)
    torch.cuda.synchronize(device)
    before = untracked_bytes(device)
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)  # this rank is one of it
    dist.all_reduce(message, group=group)
    torch.cuda.synchronize(device)
    taken = untracked_bytes(device) - before
    dist.destroy_process_group(group)
    return max(taken, 0)


def _memory_rate(clock: DeviceClock, scale: Scale) -> float:
    """Bytes a second of a copy that caches do not hold, all ranks copying: what a fused or pointwise operator gets."""
    cases = [case for case in memory_cases("float32", scale) if case.op in ("memory_copy", "elementwise")]
    beyond = [case for case in cases if scale.rotate_bytes <= case.num_bytes <= 4 * scale.rotate_bytes]
    timings = [time_case(case, clock, scale, repeats=11, budget_s=0.15) for case in beyond]
    return timing_of([case.num_bytes / timing.seconds for case, timing in zip(beyond, timings, strict=True)]).seconds


def _communication_slowdown(clock: DeviceClock) -> float:
    """Time of matmuls while an all_reduce of all ranks runs beside them, over their time alone, minus 1."""
    gpu = clock.device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if gpu else (256, torch.float32)
    a = torch.ones(size, size, device=clock.device, dtype=dtype)
    message = torch.zeros(2**27 if gpu else 2**22, device=clock.device)
    dist.all_reduce(message)
    alone = clock.measure(lambda: torch.mm(a, a), repeats=15, budget_s=0.1).seconds
    beside = []
    for _ in range(7):
        dist.barrier()
        work = dist.all_reduce(message, async_op=True)
        assert work is not None
        start, count = time.perf_counter(), 0
        while not work.is_completed():
            torch.mm(a, a)
            count += 1
            if gpu and count % 4 == 0:
                torch.cuda.current_stream().synchronize()  # of the matmuls only
        if count:
            beside.append((time.perf_counter() - start) / count)
        work.wait()
    return max(0.0, timing_of(beside).seconds / alone - 1) if beside else 0.0


def _described(device: Device) -> DeviceFacts:
    return DeviceFacts(
        kind=device.kind,
        memory_bytes_per_s=device.memory_bytes_per_s,
        launch_s=device.launch_s,
        communication_slowdown=device.communication_slowdown,
    )


def _everyone(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _agreed(value: float, device: torch.device) -> float:
    """Rank 0's value, on every rank."""
    tensor = torch.tensor([value], device=device)
    dist.broadcast(tensor, 0)
    return float(tensor)
