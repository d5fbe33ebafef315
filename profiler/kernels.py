"""Time the operators that a training step is made of, on this rank's device, with all ranks of the host at work.

The grid does not know any model: sizes are spread evenly on a logarithmic scale, from the narrow cuts that tensor
parallelism leaves to what one device can do in a few milliseconds. A projection of ``T`` tokens from ``I`` to ``O``
numbers is timed as its three matmuls, named as the cost model names them: forward ``(T, O, I)``, gradient of the input
``(T, I, O)``, gradient of the weight ``(I, O, T)``. Operands rotate through more memory than caches hold, since in a
step weights come from memory too. Causal attention is charged the unmasked half, backward 2.5 times forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from meshwright.profiler.clock import DeviceClock, Timing
from meshwright.profiler.cluster import Device
from meshwright.profiler.record import record

Call = Callable[[], object]
T = TypeVar("T")


@record
class KernelCase:
    """One operator at one shape. ``variant`` tells apart what has the same sizes (which gradient, which head size)."""

    op: str
    dtype: str
    m: int
    n: int
    k: int
    batch: int = 1
    variant: str = ""
    flops: float
    num_bytes: float


@record
class Scale:
    """How large the grid is on a kind of device."""

    tokens: tuple[int, ...]
    widths: tuple[int, ...]
    sequences: tuple[int, ...]
    heads: tuple[int, ...]
    copies_bytes: tuple[int, ...]
    optimizer_params: int
    max_flops: float  # of one call
    rotate_bytes: int  # operands rotate through this much


CPU_SCALE = Scale(
    tokens=(32, 64, 128, 256, 512, 1024, 2048),
    widths=(32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    sequences=(64, 128, 256, 512, 1024),
    heads=(1, 2, 4, 8, 16, 32),
    copies_bytes=(2**18, 2**20, 2**22, 2**24, 3 * 2**23),  # above 32 MiB glibc maps fresh pages for each tensor
    optimizer_params=2**20,
    max_flops=1e9,
    rotate_bytes=2**25,
)
GPU_SCALE = Scale(
    tokens=(256, 1024, 2048, 4096, 8192, 16384),
    widths=(128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    sequences=(512, 1024, 2048, 4096, 8192),
    heads=(4, 8, 16, 32, 64),
    copies_bytes=(2**22, 2**24, 2**26, 2**28, 2**30),
    optimizer_params=2**26,
    max_flops=4e12,
    rotate_bytes=2**28,
)
VIRTUAL_CALL_S = 0.01  # operators of a virtual device are slept, not computed: this long at most


def virtual_scale(device: Device) -> Scale:
    """The grid of a described device: shapes that it is said to do in at most 10 ms."""
    slowest = min(curve.peak_flops_per_s * curve.max_share for curve in device.efficiencies)
    return Scale(
        tokens=(64, 128, 256, 512, 1024, 2048),
        widths=(64, 128, 256, 512, 1024, 2048, 4096),
        sequences=(128, 256, 512, 1024, 2048),
        heads=(1, 2, 4, 8, 16),
        copies_bytes=(),
        optimizer_params=2**16,
        max_flops=max(slowest * VIRTUAL_CALL_S, 1e8),
        rotate_bytes=2**25,
    )


def element_size(dtype: str) -> int:
    """Bytes of one number of a torch dtype by its name."""
    return torch.empty(0, dtype=getattr(torch, dtype)).element_size()


def matmul_cases(dtype: str, scale: Scale) -> list[KernelCase]:
    """Every projection of the grid, its three matmuls, in a fixed shuffled order (a prefix is spread over the grid)."""
    size = element_size(dtype)
    cases = [
        KernelCase(
            op="matmul",
            dtype=dtype,
            m=m,
            n=n,
            k=k,
            variant=variant,
            flops=2.0 * m * n * k,
            num_bytes=float(size * (m * k + k * n + m * n)),
        )
        for tokens in scale.tokens
        for wide in scale.widths
        for deep in scale.widths
        if 2.0 * tokens * wide * deep <= scale.max_flops
        and size * max(tokens, wide, deep) * min(max(tokens, wide), max(tokens, deep), max(wide, deep))
        <= scale.rotate_bytes
        for variant, (m, n, k) in (
            ("forward", (tokens, wide, deep)),
            ("input_gradient", (tokens, deep, wide)),
            ("weight_gradient", (deep, wide, tokens)),
        )
    ]
    return _shuffled(cases)


def attention_cases(dtype: str, scale: Scale) -> list[KernelCase]:
    """Causal attention, forward and backward, over sequence length, heads times sequences, and head size."""
    size, pairs = element_size(dtype), []
    for length in scale.sequences:
        for heads in scale.heads:
            for head_dim in (32, 64, 128):
                flops = 2.0 * heads * (length * (length + 1) / 2) * 2 * head_dim
                num_bytes = float(size * heads * 4 * length * head_dim)
                if flops * 2.5 > scale.max_flops:
                    continue
                forward = KernelCase(
                    op="attention_forward",
                    dtype=dtype,
                    m=length,
                    n=heads,
                    k=length,
                    variant=str(head_dim),
                    flops=flops,
                    num_bytes=num_bytes,
                )
                backward = replace(forward, op="attention_backward", flops=2.5 * flops, num_bytes=2.0 * num_bytes)
                pairs.append((forward, backward))
    return [case for pair in _shuffled(pairs) for case in pair]


def grouped_cases(dtype: str, scale: Scale) -> list[KernelCase]:
    """Experts with ``m`` tokens each: ``batch`` matmuls of one shape."""
    size = element_size(dtype)
    return _shuffled(
        [
            KernelCase(
                op="grouped_matmul",
                dtype=dtype,
                m=tokens,
                n=wide,
                k=deep,
                batch=experts,
                flops=2.0 * experts * tokens * wide * deep,
                num_bytes=float(size * experts * (tokens * deep + deep * wide + tokens * wide)),
            )
            for experts in (4, 8)
            for tokens in scale.tokens[:5]
            for wide in scale.widths[1:7]
            for deep in scale.widths[1:7]
            if 2.0 * experts * tokens * wide * deep <= scale.max_flops
        ]
    )


def memory_cases(dtype: str, scale: Scale) -> list[KernelCase]:
    """Copies into place, sums into a fresh tensor, and one AdamW step; ``m`` counts numbers."""
    size = element_size(dtype)
    cases = [
        KernelCase(op=op, dtype=dtype, m=num // size, n=1, k=1, flops=0.0, num_bytes=float(passes * num))
        for num in scale.copies_bytes
        for op, passes in (("memory_copy", 2), ("elementwise", 3))
    ]
    params = scale.optimizer_params
    # reads weight, gradient and two states, writes weight and two states
    step = KernelCase(op="optimizer_step", dtype=dtype, m=params, n=1, k=1, flops=0.0, num_bytes=7.0 * size * params)
    return [*cases, step]


def time_case(case: KernelCase, clock: DeviceClock, scale: Scale, *, repeats: int, budget_s: float) -> Timing:
    """Median seconds of one call of the case."""
    call = _BUILDERS[case.op](case, clock.device, scale)
    return clock.measure(call, repeats=repeats, budget_s=budget_s)


def launch_seconds(clock: DeviceClock) -> Timing:
    """Host seconds of one small eager operator, averaged over a chain forward and its autograd backward.

    The chain is of two-input operators on 256 numbers; backward runs two kernels (or accumulations) for each.
    """
    x = torch.ones(16, 16, device=clock.device, requires_grad=True)
    scale = torch.full((16, 16), 0.999, device=clock.device)
    chain = 40

    def call() -> None:
        y = x
        for _ in range(chain // 2):
            y = y * scale + x
        y.sum().backward()

    per_chain = clock.measure(call, repeats=30, budget_s=0.3)
    return Timing(seconds=per_chain.seconds / (chain * 2.5), spread=per_chain.spread)


@cache
def _pool(device: torch.device, dtype: str, numbers: int) -> Tensor:
    """Noise that operands are cut from: making fresh random tensors would take longer than timing them."""
    noise = torch.randn(min(numbers, 2**22), generator=torch.Generator().manual_seed(0)) * 0.1
    return noise.to(device=device, dtype=getattr(torch, dtype)).repeat(-(-numbers // noise.numel()))[:numbers]


def _tensors(shape: tuple[int, ...], case: KernelCase, device: torch.device, scale: Scale) -> Iterator[Tensor]:
    """Tensors of one shape, one after the other out of the pool and round again: no cache holds them all."""
    pool = _pool(device, case.dtype, scale.rotate_bytes // element_size(case.dtype))
    numbers = math.prod(shape)
    stride = -(-numbers // 32) * 32  # aligned as an allocator would
    count = max(1, min(16, pool.numel() // stride))
    return cycle([pool[place * stride :][:numbers].view(shape) for place in range(count)])


def _matmul(case: KernelCase, device: torch.device, scale: Scale) -> Call:
    if case.variant == "forward":
        rows, weights = ((case.m, case.k), (case.n, case.k))
    elif case.variant == "input_gradient":
        rows, weights = ((case.m, case.k), (case.k, case.n))
    else:
        rows, weights = ((case.k, case.m), (case.k, case.n))
    xs, ws = _tensors(rows, case, device, scale), _tensors(weights, case, device, scale)
    if case.variant == "forward":
        return lambda: functional.linear(next(xs), next(ws))
    if case.variant == "input_gradient":
        return lambda: torch.mm(next(xs), next(ws))
    return lambda: torch.mm(next(ws).t(), next(xs))


def _attention(case: KernelCase, device: torch.device, scale: Scale) -> Call:
    shape = (1, case.n, case.m, int(case.variant))
    tensors = _tensors(shape, case, device, scale)
    q, k, v = (next(tensors).detach().requires_grad_(case.op == "attention_backward") for _ in range(3))
    if case.op == "attention_forward":
        return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradient = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)


def _grouped(case: KernelCase, device: torch.device, scale: Scale) -> Call:
    xs, ws = _tensors((case.m, case.k), case, device, scale), _tensors((case.n, case.k), case, device, scale)
    pairs = [(next(xs), next(ws)) for _ in range(case.batch)]
    if device.type == "cuda" and case.dtype == "bfloat16":
        tokens = torch.cat([x for x, _ in pairs])
        stacked = torch.stack([w for _, w in pairs]).transpose(-2, -1)
        ends = torch.arange(1, case.batch + 1, device=device, dtype=torch.int32) * case.m
        return lambda: functional.grouped_mm(tokens, stacked, offs=ends)
    return lambda: [functional.linear(x, w) for x, w in pairs]


def _copy(case: KernelCase, device: torch.device, scale: Scale) -> Call:
    source, target = (torch.ones(case.m, device=device, dtype=getattr(torch, case.dtype)) for _ in range(2))
    return lambda: target.copy_(source)


def _sum(case: KernelCase, device: torch.device, scale: Scale) -> Call:
    first, second = (torch.ones(case.m, device=device, dtype=getattr(torch, case.dtype)) for _ in range(2))
    return lambda: first + second


def _optimizer(case: KernelCase, device: torch.device, scale: Scale) -> Call:
    dtype = getattr(torch, case.dtype)
    weights = [torch.nn.Parameter(torch.ones(case.m // 8, device=device, dtype=dtype)) for _ in range(8)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    return torch.optim.AdamW(weights, foreach=True).step


_BUILDERS: dict[str, Callable[[KernelCase, torch.device, Scale], Call]] = {
    "matmul": _matmul,
    "attention_forward": _attention,
    "attention_backward": _attention,
    "grouped_matmul": _grouped,
    "memory_copy": _copy,
    "elementwise": _sum,
    "optimizer_step": _optimizer,
}


def _shuffled(cases: list[T]) -> list[T]:
    order = np.random.default_rng(0).permutation(len(cases))
    return [cases[index] for index in order]
