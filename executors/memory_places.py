"""Where in a step one is: the module, the phase, and what for, as ``memory_tracker`` notes at each tensor's birth.

A module's name is known in its forward by hooks on all modules. In a backward it is looked up: autograd numbers its
nodes in the order of the forward, hooks note the number at which each module is entered and left, and the node being
run tells its number. What a backward recomputes is told apart by gradients being recorded meanwhile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._autograd import _get_sequence_nr as _sequence_number  # pyright: ignore[reportMissingModuleSource]
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from meshwright.executors import pipeline
from meshwright.executors.data_parallel import local

if TYPE_CHECKING:
    from meshwright.executors.parallel_model import ParallelModel

IGNORED = "ignored"


class Places:
    """The present place of one rank; ``label`` is the kind that what is born now has, ``window`` the stage's forward.

    Between ``install`` and ``remove`` the functions of torch and of ``parallel`` that gather, reduce and receive are
    wrapped to say so.
    """

    def __init__(self, parallel: ParallelModel, tracker: Any) -> None:
        self.label: str | None = None
        self.window: int | None = None
        self.steps: list[int] = []
        self._tracker = tracker
        self._chunks = parallel._chunks
        self._parallel = parallel
        self._names: dict[int, str] = {}
        for chunk in self._chunks:
            self._names |= {id(part): name for name, part in chunk.module.model.named_modules() if name}
        self._stages = {id(chunk.module) for chunk in self._chunks}
        self._stack: list[str] = []
        self._phase: str | None = None
        self._numbers: list[int] = []  # autograd's number at each change of module ...
        self._modules: list[str] = []  # ... and the module from there on
        self._undo: list[Callable[[], None]] = []

    def now(self) -> tuple[str, str]:
        """(phase, module's dotted name)."""
        node = torch._C._current_autograd_node()
        if self._phase is not None:
            return self._phase, ""
        if node is not None:
            module = self._stack[-1] if self._stack else self._module_of(node)
            return ("recompute" if torch.is_grad_enabled() else "backward"), module
        if self.window is not None or self._stack:
            return "forward", self._stack[-1] if self._stack else ""
        return "step", ""

    def _module_of(self, node: Any) -> str:
        number = node._sequence_nr()
        place = bisect_right(self._numbers, number) - 1
        return self._modules[place] if place >= 0 and number < 2**63 else ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is born inside is of phase ``name``."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    # -- hooks ------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Start to watch."""
        self._wrap(FSDPParamGroup, "unshard", "gathered")
        self._wrap(FSDPParamGroup, "wait_for_unshard", "gathered")
        self._wrap(FSDPParamGroup, "post_backward", "communication", after=self._kept_gradients)
        self._wrap(
            ShardingPropagator, "_propagate_tensor_meta_non_cached", IGNORED
        )  # it works out shapes on whole tensors, all of them fake
        self._wrap(pipeline._Stage, "get_fwd_recv_ops", "activations")
        self._wrap(pipeline._Stage, "get_bwd_recv_ops", "communication")
        self._wrap(self._parallel, "_sum_tied_grads", "communication")
        for chunk in self._chunks:
            self._wrap(chunk.data_parallel, "finish", "communication")
            self._wrap(chunk.tensor_parallel, "finish_gradients", "communication")
            self._undo.append(chunk.module.register_forward_pre_hook(self._open_window, prepend=True).remove)
            self._undo.append(chunk.module.register_forward_hook(self._close_window).remove)
        self._undo.append(register_module_forward_pre_hook(self._enter).remove)
        self._undo.append(register_module_forward_hook(self._leave, always_call=True).remove)

    def remove(self) -> None:
        """Stop, and leave everything as it was."""
        while self._undo:
            self._undo.pop()()

    def _wrap(self, owner: Any, name: str, label: str, after: Callable[[Any], None] | None = None) -> None:
        original, own = getattr(owner, name), name in vars(owner)

        @wraps(original)
        def labelled(*args: Any, **kwargs: Any) -> Any:
            before, self.label = self.label, label
            try:
                return original(*args, **kwargs)
            finally:
                self.label = before
                if after is not None:
                    after(args[0])

        setattr(owner, name, labelled)
        self._undo.append(lambda: setattr(owner, name, original) if own else delattr(owner, name))

    def _kept_gradients(self, group: FSDPParamGroup) -> None:
        """Whole gradients that FSDP2 holds when a unit's backward is done are there to be added to."""
        for weight in group.fsdp_params:
            kept = weight.unsharded_accumulated_grad
            if kept is None and hasattr(weight, "_unsharded_param"):
                kept = weight._unsharded_param.grad
            if kept is not None:
                self._tracker.mark([local(kept)], "grads")

    def _open_window(self, module: nn.Module, args: Any) -> None:
        self.window = self._tracker.num_windows

    def _close_window(self, module: nn.Module, args: Any, output: Any) -> None:
        self.window = None
        self._tracker.end_window()

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is not None:
            self._stack.append(name)
            self._change()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is not None and self._stack and self._stack[-1] == name:
            self._stack.pop()
            self._change()

    def _change(self) -> None:
        self._numbers.append(_sequence_number())
        self._modules.append(self._stack[-1] if self._stack else "")
