"""Every byte that a training step allocates on one rank, by kind of tensor, over real tensors and fake ones alike.

    tracker = MemoryTracker(parallel)
    with tracker:
        loss = parallel.step(batch)
        ...
    tracker.peak()      # bytes by kind at the moment of the peak, where it is, the largest tensors of it

Counted are the storages that operators return while the tracker is entered, and the parameters that were there before.
Views of one storage count once; a storage counts from its birth to its death, or from one ``resize_`` to the next
(FSDP2 frees gathered weights so). Bytes are rounded up to 512, as CUDA's caching allocator rounds what is asked of it
(``c10/cuda/CUDACachingAllocator.cpp``, ``kMinBlockSize``). Left out: the up to 1 MiB by which a large block reused may
exceed what was asked, memory that a kernel takes for itself (cuBLAS's workspace), and all that torch's allocator does
not hand out (context, communicators).

The kinds are those of ``cost_models.estimate.MemoryBreakdown``; each storage has one, for all its life:

* ``params``, ``grads``, ``optimizer``: by identity. Gradients are what ``.grad`` holds at a step's end, and whole ones
  that FSDP2 keeps from one micro-batch's backward to the next.
* ``gathered``: born while FSDP2 gathers a unit.
* ``communication``: born while gradients are reduced (the flat buffers); gradients that a pipeline receives.
* ``activations``: born in a micro-batch's forward and alive when that forward ends, so not what a backward recomputes;
  hidden states that a pipeline receives.
* ``working``: all else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshwright.executors.data_parallel import local
from meshwright.executors.fake_kernels import workspace_bytes
from meshwright.executors.memory_peak import Block, Peak, find_peak
from meshwright.executors.memory_places import IGNORED, Places

if TYPE_CHECKING:
    from meshwright.executors.parallel_model import ParallelModel

ROUNDING = 512


class MemoryTracker(TorchDispatchMode):
    """Tracks while it is entered; enter it once, after ``parallelize`` and before the first step.

    It must be the innermost mode (entered after a ``FakeTensorMode``). ``cuda``: count what CUDA's kernels take for
    themselves, too. ``on_forward`` is told after each forward of a stage how many there were.
    """

    def __init__(
        self, parallel: ParallelModel, *, cuda: bool = False, on_forward: Callable[[int], None] = lambda count: None
    ) -> None:
        super().__init__()
        self._on_forward = on_forward
        self._cuda = cuda
        self.failed_at = ""  # where the first operator failed
        self._parallel = parallel
        self._blocks: list[Block] = []
        self._alive: dict[int, tuple[Block, weakref.ref[Any]]] = {}  # by the address of the storage
        self._clock = 0
        self._windows: list[int] = []  # when each forward of a stage ended
        self._places = Places(parallel, self)

    def __enter__(self) -> Any:
        for name, tensor in self._parallel.named_parameters():
            self._note(local(tensor.detach()), "", "params", place=("before", name.rpartition(".")[0]))
        for module in self._parallel.modules():
            for buffer in module.buffers():
                self._note(local(buffer), "", None, place=("before", ""))
        self._places.install()
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resizing()  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self._places.remove()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind is not Tensor and kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # DTensor takes itself apart into local operators, which come back here
        if func is torch.ops._c10d_functional.wait_tensor.default and isinstance(args[0], FakeTensor):
            return args[0]  # as on real tensors; torch's stand-in for fake ones makes another
        try:
            result = func(*args, **(kwargs or {}))
        except RuntimeError:
            if not self.failed_at:
                phase, module = self._places.now()
                self.failed_at = f"in the {phase} of {module or 'the stage'} ({func._schema.name})"
            raise
        if self._places.label == IGNORED:
            return result
        aliased = any(given.alias_info is not None for given in func._schema.returns)
        for value in () if aliased else tree_leaves(result):  # a view, or written in place: no memory of its own
            if isinstance(value, Tensor):
                self._note(value, func._schema.name, None)
        workspace = workspace_bytes(func, args) if self._cuda else 0
        if workspace:
            self._passed(workspace, func._schema.name)
        return result

    # -- what is alive ----------------------------------------------------------------------------------------------

    def _note(self, tensor: Tensor, operator: str, kind: str | None, place: tuple[str, str] | None = None) -> None:
        """Take up a tensor's storage, unless it is known; ``place`` is its phase and module, if not the present."""
        if tensor.device.type == "meta":  # a shape alone
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._born(key, storage, operator, kind, tuple(tensor.shape), dtype, place)

    def _born(
        self,
        key: int,
        storage: Any,
        operator: str,
        kind: str | None,
        shape: tuple[int, ...],
        dtype: str,
        place: tuple[str, str] | None = None,
    ) -> None:
        self._clock += 1
        phase, module = place or self._places.now()
        block = Block(
            num_bytes=_rounded(storage.nbytes()),
            born=self._clock,
            kind=kind or self._places.label,
            window=self._places.window,
            phase=phase,
            module=module,
            operator=operator,
            shape=shape,
            dtype=dtype,
        )
        self._blocks.append(block)
        self._alive[key] = block, weakref.ref(storage, lambda _: self._died(key))

    def _passed(self, num_bytes: int, operator: str) -> None:
        """A kernel's own memory, there while it runs, beside its results."""
        phase, module = self._places.now()
        self._clock += 2
        self._blocks.append(
            Block(
                num_bytes=_rounded(num_bytes),
                born=self._clock - 1,
                died=self._clock,
                kind=None,
                window=None,
                phase=phase,
                module=module,
                operator=f"{operator} (workspace)",
                shape=(num_bytes,),
                dtype="uint8",
            )
        )

    def _died(self, key: int) -> None:
        self._clock += 1
        self._alive.pop(key)[0].died = self._clock

    def _resizing(self) -> Any:
        resize, tracker = self._resize, self

        def resized(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            known = tracker._alive.get(storage._cdata)
            if known is not None:
                before = known[0]
                tracker._died(storage._cdata)
                tracker._born(storage._cdata, storage, before.operator, before.kind, before.shape, before.dtype)
            return result

        return resized

    # -- what the tensors are ---------------------------------------------------------------------------------------

    def take_up(self, tensors: Sequence[Tensor]) -> None:
        """Count tensors that were made before the tracker was entered; call inside of it."""
        for tensor in tensors:
            self._note(local(tensor), "", None)

    def mark(self, tensors: Sequence[Tensor], kind: str) -> None:
        """Say what tensors are, wherever they were born."""
        for tensor in tensors:
            known = self._alive.get(local(tensor).untyped_storage()._cdata)
            if known is not None and known[0].kind != "params":
                known[0].kind = kind

    def mark_gradients(self) -> None:
        """Call at a step's end: what the parameters' ``grad`` holds are gradients."""
        self.mark([weight.grad for weight in self._parallel.parameters() if weight.grad is not None], "grads")

    def mark_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Call after an optimizer's step: what it keeps are its states."""
        self.mark(
            [value for value in tree_leaves(list(optimizer.state.values())) if isinstance(value, Tensor)], "optimizer"
        )

    def end_window(self) -> None:
        """A stage's forward of one micro-batch is over."""
        self._windows.append(self._clock)
        self._on_forward(len(self._windows))

    @property
    def num_windows(self) -> int:
        """How many forwards of stages are over."""
        return len(self._windows)

    def phase(self, name: str) -> Any:
        """A context in which what is born is of this phase (``optimizer``, ``clip``)."""
        return self._places.phase(name)

    @contextmanager
    def born_as(self, kind: str) -> Iterator[None]:
        """What is born inside is of this kind."""
        before, self._places.label = self._places.label, kind
        try:
            yield
        finally:
            self._places.label = before

    def begin_step(self) -> None:
        """A new step starts."""
        self._places.steps.append(self._clock)

    def peak(self) -> Peak:
        """The moment with the most bytes since the tracker was entered, and what they are."""
        return find_peak(self._blocks, self._windows, self._places.steps, self._clock)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ROUNDING) * ROUNDING
