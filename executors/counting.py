"""Count the collectives that a step really issues, as the kernels of one rank see them.

    with count_collectives(parallel) as counted:
        parallel.step(batch)
    counted.table()   # {("reduce_scatter", "dp"): Traffic(calls=3, message_bytes=98304), ...}

Seen are all operators below autograd: FSDP's, the pipeline's, tensor parallelism's, those of DTensor, in forward,
backward and recomputation. ``message_bytes`` is the whole tensor, as ``profiler.cluster.CollectiveCurve`` says: the
buffer of all_reduce and broadcast, the output of all_gather, the input of reduce_scatter and all_to_all; of a send
what is sent. Collectives over a group of one rank move nothing and are not counted.

What one rank issues in one ``ParallelModel.step``: ``n`` micro-batches of ``b`` sequences of ``s`` tokens, hidden size
``h``, activations of ``a`` bytes a number, weights and gradients of ``w``; ``P`` is the weights of a unit that this
rank holds after tp. A unit is a block, or what a stage has outside its blocks (``data_parallel``). The experts of a
block are a unit of their own, and what is said of ``dp`` is theirs over ``edp`` (as ``dp`` where tp, ep and etp are 1).

==============  =====  ===============================================================================
operator        axis   calls, and bytes of each
==============  =====  ===============================================================================
all_reduce      dp     zero 0: 1 a unit, ``w P``
all_gather      dp     zero 1, 2: 1 a unit, ``w P``; zero 3: ``2 n`` a block and ``n`` for the outer unit
reduce_scatter  dp     zero 1: 1 a unit, ``w P``; zero 2, 3: ``n`` a unit
all_reduce      dp     1 of 8 bytes: the number of targets
send            pp     ``n`` to the next stage, ``n`` to the previous one, ``a b s h`` (with sp: ``/tp``), if elsewhere
send            pp     a tied embedding over two ranks: 1 of this rank's shard of its gradient, on both
all_reduce      world  1 of 16 bytes: the loss; ``clip_grad_norm_`` adds 1 of 8 bytes
==============  =====  ===============================================================================

FSDP pads the first dimension of each weight to a multiple of the group, and its messages hold the padding. Interleaved
chunks count each for itself. The first step of a pipeline adds torch's vote, two sends of 4 bytes a stage. What tensor
parallelism issues within blocks is written in ``tensor_parallel``, what attention over cp issues in
``context_parallel``, what layers of experts exchange in ``expert_parallel``; ``recompute`` says what of it is issued
again. All of ``dp`` is over dp and cp together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.profiler.record import record

if TYPE_CHECKING:
    from meshwright.executors.parallel_model import ParallelModel

# operator -> (its name here, which argument holds the whole tensor)
_C10D = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "send": ("send", 0),
}
_FUNCTIONAL = {
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "broadcast_": ("broadcast", 0),
    "all_gather_into_tensor": ("all_gather", None),
    "all_gather_into_tensor_out": ("all_gather", None),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "reduce_scatter_tensor_out": ("reduce_scatter", 0),
    "all_to_all_single": ("all_to_all", 0),
}


@record
class Traffic:
    """Calls of one operator over one axis, and the bytes of all their messages together."""

    calls: int
    message_bytes: int


class CollectiveCounter(TorchDispatchMode):
    """Counts while it is entered; ``axis_of_group`` names process groups, unnamed ones are called by their size."""

    def __init__(self, axis_of_group: Mapping[str, str]) -> None:
        super().__init__()
        self._axis_of_group = axis_of_group
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()

    def table(self) -> dict[tuple[str, str], Traffic]:
        """``(operator, axis)`` -> traffic so far."""
        return {key: Traffic(calls=calls, message_bytes=self._bytes[key]) for key, calls in sorted(self._calls.items())}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind is not Tensor and kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # DTensor takes itself apart into local operators, which come back here
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in _C10D:
            operator, whole = _C10D[name]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if _is_boxed_group(arg))
            self._note(operator, group.group_name, group.size(), args[whole])
        elif namespace == "_c10d_functional" and name in _FUNCTIONAL:
            operator, place = _FUNCTIONAL[name]
            group_name = next(arg for arg in reversed(args) if isinstance(arg, str))
            size = _resolve_process_group(GroupName(group_name)).size()
            self._note(operator, group_name, size, result if place is None else args[place])
        return result

    def _note(self, operator: str, group_name: str, size: int, whole: Any) -> None:
        if size == 1:
            return
        key = (operator, self._axis_of_group.get(group_name, f"{size} ranks"))
        self._calls[key] += 1
        self._bytes[key] += _num_bytes(whole)


def count_collectives(parallel: ParallelModel) -> CollectiveCounter:
    """A context that counts what ``parallel`` issues on this rank, by axis of its mesh."""
    return CollectiveCounter(parallel.axis_of_group())


def _is_boxed_group(value: Any) -> bool:
    return type(value).__name__ == "ScriptObject" and "ProcessGroup" in str(value._type())


def _num_bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_num_bytes(tensor) for tensor in tensors)
