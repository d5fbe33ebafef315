"""Tensor parallelism: split a model, or one pipeline stage of it, over the ranks of a tp mesh.

    rules = find_tensor_parallel_rules(model)                    # once, on the whole model (meta device is fine)
    rules.check(tp, sequence_parallel=True)
    split = apply_tensor_parallel(stage, rules, mesh["tp"], sequence_parallel=True)
    ...                                                          # recompute, fully_shard, forward, backward
    split.finish_gradients()                                     # once per step, after all backwards

Parameters become DTensors on the tp mesh (``Shard`` or ``Replicate``); the computation is local with explicit
collectives (Megatron-LM, arXiv 1909.08053; with sequence parallelism arXiv 2205.05198), so that exactly the following
are issued, all over the tp group. One *message* is ``batch * sequence * hidden`` elements in the activations' type.
Bytes are what all_reduce is given, all_gather returns and reduce_scatter is given.

===========================  ======================================  ===========================================
for each micro-batch         without sequence parallelism            with it
===========================  ======================================  ===========================================
each block, forward          2 all_reduce of a message               2 all_gather, 2 reduce_scatter of a message
each block, backward         2 all_reduce                            2 reduce_scatter, 2 all_gather
recomputed in full           1 all_reduce (of the first region;      2 all_gather, 1 reduce_scatter
                             that of the last is not needed again)
embedding, forward           1 all_reduce                            1 reduce_scatter; where something lies between
                                                                     table and blocks (learned positions): 1 all_reduce
embedding, backward          none                                    1 all_gather
head, forward                none                                    1 all_gather
head, backward               1 all_reduce                            1 reduce_scatter
default loss, forward        2 all_reduce of ``tokens`` and          the same
                             ``2 * tokens`` elements, float32 for
                             half types
a user's loss, forward       1 all_gather of the logits              the same
===========================  ======================================  ===========================================

A block has two regions (attention, feed-forward), each one entry and one exit; query, key and value, or gate and up,
share an entry. So do the down-projections of latent attention, which every rank computes alike on the region's input.

In a layer of experts the router stays whole and only a shared expert is a region as above. With sequence parallelism
router and experts work on the rank's own part of the sequence without a collective over tp (``expert_parallel`` sends
tokens over the ranks that hold experts). Without it, where etp = tp, all ranks have the same tokens: the experts add 1
all_reduce of a message forward, and backward 1 of a message and 1 of the tokens' weights ``[tokens, top_k]``, so that
what reaches the router is whole on every rank and its gradients (the auxiliary loss's too) need no sum over tp.

Once per step ``finish_gradients`` adds up, in one all_reduce for each gradient type, the gradients of replicated
parameters of which each rank saw a part: under sequence parallelism the norms, routers and the biases of row splits,
always the norms on each head's queries and keys and latent attention's whole matrices and norms, and, where tp exceeds
the key/value heads, the copies of keys and values (``kv_heads`` times this rank's share of the gradient, each rank
filling the slot of its head).

With sequence parallelism each rank holds its part of the sequence from the first block's input to the final norm's
output (Hugging Face models count positions on the whole sequence before); what passes between pipeline stages is the
shard ``[batch, sequence / tp, hidden]``: a later stage's first block takes it, a stage's last block returns it, as they
are, without communication. The gathered input of each region is kept for backward, not gathered again.

The vocabulary is padded inside to a multiple of tp with rows of zeros that get no gradient; logits come out as this
rank's columns (``loss.loss_on_shards``). ``TensorParallel.whole`` gives whole weights, unpadded, in their own layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from meshwright import InputError
from meshwright.executors.tp_collectives import (
    Group,
    enter,
    gather_sequence,
    leave,
    scatter_sequence,
    slice_sequence,
)
from meshwright.executors.tp_find import find_tensor_parallel_rules
from meshwright.executors.tp_layout import Layout, TensorParallel, no_tensor_parallel, take_part
from meshwright.executors.tp_modules import ColumnSplit, Entry, RowSplit, VocabularySplit, compute_locally
from meshwright.executors.tp_rules import Region, TensorParallelRules

__all__ = [
    "TensorParallel",
    "TensorParallelRules",
    "apply_tensor_parallel",
    "find_tensor_parallel_rules",
    "no_tensor_parallel",
]


def apply_tensor_parallel(
    module: nn.Module, rules: TensorParallelRules, tp_mesh: DeviceMesh, *, sequence_parallel: bool = False
) -> TensorParallel:
    """Split ``module`` in place: the model that ``rules`` were found on, or a stage of it under the same dotted names.

    What the module no longer has (blocks, token table, final norm or head replaced by parts without parameters) is
    passed over. Weights may be real, equal on all ranks, or on the meta device; each rank keeps its slice, nothing is
    sent. Apply before recompute and ``fully_shard``; a block's ``forward`` may be wrapped, its hooks must stay outside.

    Raises ``InputError`` when tp or sequence parallelism does not suit the model.
    """
    tp = tp_mesh.size()
    rules.check(tp, sequence_parallel=sequence_parallel)
    if tp == 1:
        return no_tensor_parallel(module)
    return _Splitter(module, rules, tp_mesh, sequence_parallel).split()


class _Splitter:
    """One application: plans every parameter's layout, replaces parameters, then modules, then places the hooks."""

    def __init__(
        self, module: nn.Module, rules: TensorParallelRules, tp_mesh: DeviceMesh, sequence_parallel: bool
    ) -> None:
        self.module = module
        self.rules = rules
        self.mesh = tp_mesh
        self.sequence_parallel = sequence_parallel
        self.tp = tp_mesh.size()
        self.rank = tp_mesh.get_local_rank()
        self.group: Group = tp_mesh.get_group()
        self.owned = {
            name: part
            for name, part in module.named_modules()
            if name not in rules.experts and any(weight is not None for weight in part._parameters.values())
        }
        self.layouts: dict[str, Layout] = {}
        self.splits: dict[str, ColumnSplit | RowSplit | VocabularySplit] = {}

    def split(self) -> TensorParallel:
        for region in self.rules.regions:
            if region.row in self.owned:
                self._plan_region(region)
        self._plan_vocabulary()
        self._replace_parameters()
        for name, part in self.owned.items():
            compute_locally(part, self.splits.get(name))
        if not self.sequence_parallel:
            self._enter_experts()
        self._place_sequence_ends()
        return TensorParallel(self.module, self.mesh, self.layouts)

    def _plan_region(self, region: Region) -> None:
        tp, matrices = self.tp, self.rules.matrices
        into: Callable[..., Tensor] = gather_sequence if self.sequence_parallel else enter
        out_of: Callable[..., Tensor] = scatter_sequence if self.sequence_parallel else leave
        entry = None if region.container else Entry(partial(into, group=self.group), len(region.entries))
        if region.container:
            enter_container = partial(
                _enter_container, where=region.argument, collective=partial(into, group=self.group)
            )
            self.module.get_submodule(region.container).register_forward_pre_hook(enter_container, with_kwargs=True)
        for index, name in enumerate(region.columns):
            copies = region.copies(index, tp)
            layout = Layout(
                dim=matrices[name].output_dim,
                positions=tuple(region.outputs(index, tp, rank) for rank in range(tp)),
                whole_size=matrices[name].outputs,
                copies=copies,
                summed=copies > 1,
            )
            own_entry = entry if name in region.entries else None
            self._plan_matrix(name, layout, ColumnSplit(transposed=matrices[name].transposed, entry=own_entry))
        for name in region.kept_whole:
            own_entry = entry if name in region.entries else None
            self.splits[name] = ColumnSplit(transposed=matrices[name].transposed, entry=own_entry)
        for name in region.vectors:
            positions = tuple(region.entries_of(name, tp, rank) for rank in range(tp))
            size = sum(len(part) for part in positions)
            self.layouts[name] = Layout(dim=0, positions=positions, whole_size=size, copies=1, summed=False)
        row = matrices[region.row]
        everywhere = np.arange(row.inputs)
        self.layouts[f"{region.row}.weight"] = Layout(
            dim=1 - row.output_dim,
            positions=tuple(everywhere[region.inputs(tp, rank)] for rank in range(tp)),
            whole_size=row.inputs,
            copies=1,
            summed=False,
        )
        self.splits[region.row] = RowSplit(transposed=row.transposed, leave=partial(out_of, group=self.group))
        for item in region.attributes:
            setattr(self.module.get_submodule(item.module), item.name, region.share(item.share, tp))

    def _plan_matrix(self, name: str, layout: Layout, split: ColumnSplit) -> None:
        """A matrix whose outputs are split: its weight along ``layout.dim``, its bias along its only dimension."""
        self.layouts[f"{name}.weight"] = layout
        self.layouts[f"{name}.bias"] = Layout(
            dim=0,
            positions=layout.positions,
            whole_size=layout.whole_size,
            copies=layout.copies,
            summed=layout.summed,
        )
        self.splits[name] = split

    def _plan_vocabulary(self) -> None:
        anatomy, matrix = self.rules.anatomy, self.rules.matrices[self.rules.anatomy.head]
        rows = np.arange(self.rules.padded_vocab_size(self.tp))
        rows[self.rules.vocab_size :] = -1
        num_rows = len(rows) // self.tp
        layout = Layout(
            dim=0,
            positions=tuple(np.split(rows, self.tp)),
            whole_size=self.rules.vocab_size,
            copies=1,
            summed=False,
        )
        if anatomy.token_embedding in self.owned:
            partial_sums = self.sequence_parallel and self.rules.embedding_reaches_blocks
            self.layouts[f"{anatomy.token_embedding}.weight"] = layout
            self.splits[anatomy.token_embedding] = VocabularySplit(
                first_row=self.rank * num_rows,
                num_rows=num_rows,
                leave=None if partial_sums else partial(leave, group=self.group),
            )
        if anatomy.head in self.owned:
            entry: Callable[[Tensor], Tensor] | None = partial(enter, group=self.group)
            if self.sequence_parallel:
                entry = None if self._norm_before_head() else partial(gather_sequence, group=self.group)
            self._plan_matrix(anatomy.head, layout, ColumnSplit(transposed=matrix.transposed, entry=entry))

    def _norm_before_head(self) -> str | None:
        """The last module with parameters between blocks and head; the sequence is gathered at its output."""
        return next((name for name in reversed(self.rules.anatomy.after) if name in self.owned), None)

    def _replace_parameters(self) -> None:
        """Every parameter by a DTensor; parameters that are one object stay one object."""
        done: dict[int, nn.Parameter] = {}
        for name, part in self.owned.items():
            for key, weight in part._parameters.items():
                if weight is None:
                    continue
                full_name = f"{name}.{key}" if name else key
                layout = self.layouts.setdefault(full_name, self._replicated(full_name))
                if id(weight) not in done:
                    done[id(weight)] = self._stored(weight, layout)
                part._parameters[key] = done[id(weight)]

    def _replicated(self, name: str) -> Layout:
        anatomy = self.rules.anatomy
        holder = name.rpartition(".")[0]
        on_sequence = name.startswith(anatomy.blocks + ".") or holder in anatomy.after
        summed = name in self.rules.partial or (self.sequence_parallel and on_sequence)
        return Layout(dim=None, positions=(), whole_size=0, copies=self.tp, summed=summed)

    def _stored(self, weight: nn.Parameter, layout: Layout) -> nn.Parameter:
        placement = Replicate() if layout.dim is None else Shard(layout.dim)
        with torch.no_grad():
            local = take_part(weight.detach(), layout, self.rank)
        stored = DTensor.from_local(local, self.mesh, [placement], run_check=False)
        return nn.Parameter(stored, requires_grad=weight.requires_grad)

    def _enter_experts(self) -> None:
        """Without sequence parallelism experts, split over etp = tp, are a region of their own: each rank has the same
        tokens and their weights, and returns a part of the sum."""
        for name in self.rules.experts:
            if _has_module(self.module, name):
                experts = self.module.get_submodule(name)
                experts.register_forward_pre_hook(partial(_enter_all, group=self.group), with_kwargs=True)
                experts.register_forward_hook(partial(_leave_output, group=self.group))

    def _place_sequence_ends(self) -> None:
        """With sequence parallelism the sequence is cut before the first block and gathered before the head."""
        anatomy = self.rules.anatomy
        if not self.sequence_parallel:
            return
        if anatomy.token_embedding in self.owned:
            cut = scatter_sequence if self.rules.embedding_reaches_blocks else slice_sequence
            first = self.module.get_submodule(f"{anatomy.blocks}.0")
            hook = partial(_enter_blocks, where=self.rules.hidden_argument, cut=cut, group=self.group)
            first.register_forward_pre_hook(hook, with_kwargs=True)
        norm = self._norm_before_head()
        if norm is not None and anatomy.head in self.owned:
            gather = partial(_gather_output, group=self.group)
            self.module.get_submodule(norm).register_forward_hook(gather)


def _has_module(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_modules())


def _enter_all(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, group: Group
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def entered(value: Any) -> Any:
        return enter(value, group) if isinstance(value, Tensor) and value.requires_grad else value

    return tuple(map(entered, args)), {name: entered(value) for name, value in kwargs.items()}


def _leave_output(module: nn.Module, args: Any, output: Tensor, *, group: Group) -> Tensor:
    return leave(output, group)


def _enter_container(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    where: Any,
    collective: Callable[[Tensor], Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the collective at a region's entry on the argument that feeds it."""
    if isinstance(where, int):
        return (*args[:where], collective(args[where]), *args[where + 1 :]), kwargs
    return args, {**kwargs, where: collective(kwargs[where])}


def _enter_blocks(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    where: Any,
    cut: Callable[[Tensor, Group], Tensor],
    group: Group,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = args[where] if isinstance(where, int) else kwargs[where]
    if hidden.shape[-2] % group.size():
        raise InputError(
            f"sequence_parallel needs tp={group.size()} to divide the sequence of {hidden.shape[-2]} tokens"
        )

    def own_part(x: Tensor) -> Tensor:
        return cut(x, group)

    return _enter_container(module, args, kwargs, where=where, collective=own_part)


def _gather_output(module: nn.Module, args: Any, output: Tensor, *, group: Group) -> Tensor:
    return gather_sequence(output, group)
