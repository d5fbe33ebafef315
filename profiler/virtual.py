"""Virtual devices: a rank whose bytes move for real and whose compute is a sleep of stated length per operator.

Eight ranks on two cores steal each other's time: a pipeline bubble costs nothing and data parallelism gains nothing.
Under a virtual device each operator takes the time that a named device would need for it, scaled down, and the
processor is free meanwhile; communication is real. So rehearsed steps behave like a cluster's.

Names are read by ``virtual_name``. Matrix products are not computed, unless the name ends in ``+numbers``: they return
small fixed noise, as computing them would take longer than the stated time on most machines.

What is charged, all of it below autograd, so that backward and recompute count like forward:

* matmul, convolution, attention and grouped matmul: ``max(FLOPs / (peak * max_share), bytes / memory rate)``. FLOPs are
  those of torch's ``flop_registry`` (2 m n k for a product); attention is 4 b h q k d forward and 10 b h q k d
  backward, half of it when causal, as flash kernels skip masked blocks (FlashAttention-2, arXiv 2307.08691, section
  4.1). The curve's half sizes are not applied: the scaled device is as efficient on small shapes as on large ones.
* every other operator: bytes read and written / memory rate, unfused, as eager kernels run. Views and allocations are
  free. Bytes of a gather (embedding, index) are those of the rows it reads.

What is left out: launch costs (the real host's Python stands for them), slow-down of compute by communication, and
memory limits. A collective or a transfer starts when all compute issued before it is done, on whatever stream a GPU
would have put it; a prefetched gather is therefore late by at most the compute issued before it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch._C import _disabled_torch_dispatch_impl
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

from meshwright.profiler.cluster import Device
from meshwright.profiler.virtual_name import DEVICE_VARIABLE, split_virtual_name
from meshwright.profiler.virtual_name import parse_virtual_device as parse_virtual_device

if TYPE_CHECKING:
    from types import TracebackType

_AHEAD_S = 5e-3  # the most that the host issues ahead of the device; a sleep leaves half of it, to hide what follows
_PR_SET_TIMERSLACK = 29

aten = torch.ops.aten


def virtual_device(name: str) -> VirtualDevice:
    """A context in which this thread's torch operators take the time that the named device would need.

    Raises ``InputError`` as ``parse_virtual_device`` does; and inside, at the first operator in a dtype for which the
    device has no rate.
    """
    return VirtualDevice(parse_virtual_device(name), numbers=split_virtual_name(name).numbers)


def device_of_this_rank() -> AbstractContextManager[VirtualDevice | None]:
    """The virtual device that ``meshwright emulate`` named for this rank, or a context that does nothing."""
    name = os.environ.get(DEVICE_VARIABLE)
    return virtual_device(name) if name else nullcontext()


def synchronize() -> None:
    """Wait for the virtual device of this thread, if there is one: what ``torch.cuda.synchronize`` is to a GPU."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, VirtualDevice):
            mode.settle()


class VirtualDevice(TorchDispatchMode):
    """The clock of a virtual device. ``charged_s`` is stated time, ``slept_s`` what this rank really slept for it.

    The device works through its operators in order, like a GPU's stream, while the host runs ahead: an operator ends at
    ``deadline = max(deadline, now) + stated``, and the host sleeps up to the deadline where it has to wait for the
    device: when it is 5 ms ahead, before it communicates, and in ``settle``. So the host's own Python hides behind
    stated compute as launches hide behind kernels; and a clock read without ``settle`` is up to 5 ms early, as one read
    without synchronizing a GPU is. Reading a value does not wait, since optimizers keep their step counts in tensors
    that a GPU job has on the host. A sleep that ends late is not the device's idleness: that much is forgiven to the
    next operators, or eight ranks' late wake-ups would add up.
    """

    def __init__(self, device: Device, *, numbers: bool = False) -> None:
        super().__init__()
        self.device = device
        self.numbers = numbers
        self.charged_s = 0.0
        self.slept_s = 0.0
        self._deadline = 0.0
        self._late_s = 0.0  # how far the last sleep overshot its deadline, and the host has not caught up yet
        self._products: dict[Any, tuple[float, tuple[Any, ...]]] = {}
        self._noise: dict[torch.dtype, Tensor] = {}

    def __enter__(self) -> Self:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # ns; the default of 50 us is that much late
        self._deadline, self._late_s = time.perf_counter(), 0.0
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if error is None:
            self.settle()

    def settle(self) -> None:
        """Wait until the device has done all it was given: call it where a step ends, before a clock is read."""
        self._sleep_until(self._deadline)

    def _sleep_until(self, wake: float) -> None:
        now = time.perf_counter()
        if wake > now:
            time.sleep(wake - now)
            after = time.perf_counter()
            self.slept_s += after - now
            self._late_s = after - wake

    def charge(self, stated_s: float, issued: float) -> None:
        """Let the device work for ``stated_s`` seconds from the clock's ``issued`` on, or after its earlier work."""
        self.charged_s += stated_s
        if issued - self._late_s > self._deadline:  # the device idled; what is forgiven is forgiven once
            self._deadline, self._late_s = issued - self._late_s, 0.0
        self._deadline += stated_s
        if self._deadline - time.perf_counter() > _AHEAD_S:
            self._sleep_until(self._deadline - _AHEAD_S / 2)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **(kwargs or {}))  # DTensor asks for a shape: nothing is computed
        if any(kind.__torch_dispatch__ is not _disabled_torch_dispatch_impl for kind in types):
            return NotImplemented  # DTensor and others take themselves apart; their local operators come back here
        kwargs = kwargs or {}
        role = _role(func)
        if role == "free" or (args and isinstance(args[0], Tensor) and args[0].is_meta):  # shapes only, no work
            return func(*args, **kwargs)
        if role == "waits":
            self.settle()
            return func(*args, **kwargs)
        issued = time.perf_counter()
        if role == "bytes":
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.is_meta:
                return result
            self.charge(_moved_bytes(func, args, kwargs, result) / self.device.memory_bytes_per_s, issued)
            return result
        stated_s, outputs = self._product(func, args, kwargs)
        if self.numbers or not outputs:
            result = func(*args, **kwargs)
        else:
            tensors = [output and self._filled(*output) for output in outputs]
            result = tuple(tensors) if len(tensors) > 1 else tensors[0]
        self.charge(stated_s, issued)
        return result

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, tuple[Any, ...]]:
        """Stated seconds and (shape, stride, dtype) of each output of a matmul-like operator, remembered by shape."""
        key = (func, *map(_signature, args), *((name, _signature(value)) for name, value in kwargs.items()))
        if key not in self._products:
            with torch.no_grad():
                result = func(*map(_on_meta, args), **{name: _on_meta(value) for name, value in kwargs.items()})
            op, flops = _FLOPS[func.overloadpacket](func, args, kwargs, result)
            dtype = str(args[0].dtype).removeprefix("torch.")
            efficiency = self.device.efficiency(op, dtype)
            stated_s = max(
                flops / (efficiency.peak_flops_per_s * efficiency.max_share),
                _moved_bytes(func, args, kwargs, result) / self.device.memory_bytes_per_s,
            )
            tensors = result if isinstance(result, tuple) else (result,)
            outputs = tuple(t if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in tensors)
            self._products[key] = stated_s, () if func._schema.is_mutable else outputs
        return self._products[key]

    def _filled(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of small fixed noise: finite, balanced over experts, equal on every rank for equal shapes."""
        out = torch.empty_strided(shape, stride, dtype=dtype)
        noise = self._noise.get(dtype)
        if noise is None:
            values = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 0.02
            noise = self._noise[dtype] = values.to(dtype)
        flat = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,))
        whole = flat.numel() // noise.numel() * noise.numel()
        flat[:whole].view(-1, noise.numel()).copy_(noise)
        flat[whole:].copy_(noise[: flat.numel() - whole])
        return out


_COMMUNICATION = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_NO_TRAFFIC = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh")
_OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_")  # target not read
_GATHERS = ("embedding", "index", "index_select", "gather")  # read the rows they return, not the whole table


@cache
def _role(func: Any) -> str:
    """What an operator is to the clock: ``product`` (FLOPs), ``bytes``, ``free``, or ``waits`` for the device."""
    name = func._schema.name.split("::")[1]
    if func.namespace in _COMMUNICATION:
        return "free" if name.startswith("wait_tensor") else "waits"
    if func.overloadpacket in _FLOPS:
        return "product"
    if func.is_view or name in _NO_TRAFFIC or name in ("detach", "alias", "_local_scalar_dense"):
        return "free"
    return "bytes"


def _moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes an eager kernel reads and writes: its inputs once and its outputs once."""
    name = func._schema.name.split("::")[1]
    written = _tensor_bytes((result,)) or _tensor_bytes((kwargs.get("out"),))
    if name in _GATHERS:
        return 2 * written + _tensor_bytes(args[1:])
    if name in _OVERWRITES:
        return _tensor_bytes(args[:1]) + _tensor_bytes(args[1:])
    return _tensor_bytes(args) + written


def _tensor_bytes(values: Sequence[Any]) -> int:
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, (list, tuple)):
            total += _tensor_bytes(value)
    return total


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(map(_signature, value)) if isinstance(value, (list, tuple)) else value


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(_on_meta, value)) if isinstance(value, (list, tuple)) else value


def _registered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[str, float]:
    return "matmul", float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result))


def _attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[str, float]:
    """``[batch, heads, tokens, head_dim]``: two products forward, five backward (one of them the recomputed scores)."""
    backward = func._schema.name.endswith("_backward")
    query, key, value = args[1:4] if backward else args[:3]
    batch, heads, tokens, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    causal = kwargs.get("is_causal", args[7 if backward else 4] if len(args) > (7 if backward else 4) else False)
    product = 2.0 * batch * heads * tokens * keys * (0.5 if causal else 1.0)
    if backward:
        return "attention_backward", product * (3 * head_dim + 2 * value_dim)
    return "attention_forward", product * (head_dim + value_dim)


def _grouped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[str, float]:
    """Every row meets one group's matrix: 2 m n k, with the sizes of the whole, however they are cut into groups."""
    rows, inner = args[0].shape[-2:]
    groups = args[0].shape[0] if args[0].dim() == 3 and args[1].dim() == 3 else 1
    return "grouped_matmul", 2.0 * groups * rows * inner * args[1].shape[-1]


_FLOPS: dict[Any, Callable[..., tuple[str, float]]] = {
    **{
        packet: _registered
        for packet in flop_registry
        if isinstance(packet, torch._ops.OpOverloadPacket) and "attention" not in packet.__name__
    },
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention,
    aten._grouped_mm: _grouped,
}
