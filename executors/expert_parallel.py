"""Expert parallelism: each rank holds some of the experts of a layer, tokens travel to them and back.

    split = split_experts(stage.model, mesh, sequence_parallel=..., num_chunks=config.ep_chunks, num_microbatches=8)
    ...                                                       # recompute, fully_shard over edp, forward, backward
    split.begin_step()                                        # before the forwards of a step
    split.statistics()                                        # after it: load, dropped tokens, auxiliary loss

The ranks of a stage are folded into ``mesh.experts`` ``[edp, ep, etp]`` (Liu et al., "MoE Parallel Folding", arXiv
2504.14960), whatever axes attention gives them. A rank holds ``num_experts / ep`` experts, of each ``1 / etp`` of its
width: parameters become DTensors ``[Shard(0), Shard(width)]`` over ``mesh.experts["ep", "etp"]`` (``Replicate`` over
etp for the bias after the second matrix), so that FSDP2 shards them over ``mesh.experts["edp"]``. Where ``ep * etp`` is
1 they stay as they are. Gradients are plain sums over edp, with no factor: each expert has seen all tokens of its ep
group.

How a layer runs, ``T`` tokens of this rank, each with ``k`` choices, ``h`` wide, in ``num_chunks`` parts:

* the model's own router runs on the rank's tokens;
* *dispatch*: rows, sorted by expert, go to the ranks that hold their expert; sizes are exchanged first;
* where the ranks of an etp group have different tokens, the rows that arrived are gathered over etp, and the partial
  results reduce-scattered; where they have the same (tp without sequence parallelism: then etp = tp), each computes its
  slice of the width and the result is a **partial sum over tp**, which ``tensor_parallel`` adds up, as it does the
  gradients of what the experts are given, so that the router's are whole on every rank;
* *combine*: rows go back; they are weighted and added up where they came from.

Collectives of one layer for one micro-batch. ``b`` bytes an element of the activations, ``E`` experts, ``n`` chunks,
``R`` rows that arrive (``T * k`` on average; all_gather and reduce_scatter take the longest of the etp group, padded).
Bytes are what all_to_all is given or returns, all_gather returns, reduce_scatter and all_reduce are given.

==========================  ==========================================  ======================================
collective                  forward                                     backward
==========================  ==========================================  ======================================
sizes (ep > 1)              1 all_to_all over ep, ``8 * n * E``         none
sizes over etp (gathered)   1 all_gather over etp, ``8 * n * E * etp``  none
dispatch (ep > 1)           n all_to_all over ep, ``T * k * h * b``     n all_to_all, the same
rows over etp (gathered)    n all_gather over etp, ``etp * R * h * b``  n reduce_scatter over etp, the same
results over etp (gathered) n reduce_scatter, ``etp * R * h * b``       n all_gather, the same
combine (ep > 1)            n all_to_all over ep, ``T * k * h * b``     n all_to_all, the same
auxiliary loss, if any      1 all_reduce of ``E`` over cp, 1 over tp    none
==========================  ==========================================  ======================================

(all figures are totals of the n parts). A forward waits once for the host to read the sizes. Recomputed in full, a
layer issues all of its forward's collectives again (the gradient of the weights needs the rows that came back).
Recomputed selectively it issues none again: what collectives and matrix products returned is kept, but for the experts'
second product where a collective follows it.

With ``num_chunks`` above 1 the exchange of one part runs beside the experts' work on another, forward and backward:
all_to_alls are asynchronous, the dispatch of part ``i + 1`` is issued before the work on part ``i``, whose combine is
issued right after it; autograd, which runs backward in the opposite order of forward, does the same in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright import InputError
from meshwright.executors.expert_compute import run_experts
from meshwright.executors.expert_dispatch import Arrived, Exchange, Group, Part, plan_parts, put, spread, take
from meshwright.executors.expert_modules import (
    SLICE_AXES,
    ExpertPlace,
    ExpertShape,
    compute_with,
    find_experts,
    hold_slice,
    own_part,
)
from meshwright.executors.expert_routing import AllLayers, Auxiliary, Routing
from meshwright.executors.mesh import Mesh
from meshwright.executors.tp_collectives import gather_sequence, scatter_sequence
from meshwright.executors.tp_layout import gathered
from meshwright.profiler.record import record


@record
class ExpertStatistics:
    """What the routers of a stage did in one step, over all ranks and micro-batches; one row a layer with experts.

    ``layers`` are the names of the modules that hold the experts. ``load`` ``[layers, experts]``: tokens that chose an
    expert, before any is dropped. ``dropped`` ``[layers]``: choices that an expert had no room for. ``auxiliary_loss``
    ``[layers]`` float64: with its coefficient, averaged over micro-batches and dp; under Hugging Face's formula across
    layers, each layer's share.
    """

    layers: tuple[str, ...]
    load: Tensor
    dropped: Tensor
    auxiliary_loss: Tensor


@record
class ExpertGroups:
    """Who takes part in a layer: ``ep`` None where all experts are here, ``gathers`` None where no rows are gathered.

    ``adds_bias``: this rank adds the bias behind the second matrix.
    """

    ep: Group | None
    gathers: Group | None
    adds_bias: bool
    num_chunks: int


class _Layer:
    """One layer of experts on this rank: the way of its tokens."""

    def __init__(self, shape: ExpertShape, groups: ExpertGroups, routing: Routing) -> None:
        self.shape, self.groups, self.routing = shape, groups, routing

    def __call__(self, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Tokens ``[tokens, h]``, choices and weights ``[tokens, k]``, to ``[tokens, h]``."""
        self.routing.note_kept(index)
        ep, gathers, num_chunks = self.groups.ep, self.groups.gathers, self.groups.num_chunks
        parts = plan_parts(index, self.shape.num_experts, num_chunks, ep, gathers)
        there = [_exchange(ep, part.sent, part.received) for part in parts]
        back = [_exchange(ep, part.received, part.sent) for part in parts]
        pieces = x.split([part.num_tokens for part in parts])
        rows = [there[0].start(spread(pieces[0], parts[0].order, parts[0].top_k))]
        for number, part in enumerate(parts):
            if number + 1 < num_chunks:
                following = parts[number + 1]
                rows.append(there[number + 1].start(spread(pieces[number + 1], following.order, following.top_k)))
            rows[number] = back[number].start(self._work(module, there[number].wait(rows[number]), part.arrived))
        shares = weights.split([part.num_tokens for part in parts])
        added = [_weighted(back[number].wait(rows[number]), part, shares[number]) for number, part in enumerate(parts)]
        whole: Tensor = added[0] if num_chunks == 1 else torch.cat(added)
        return whole.to(x.dtype)

    def _work(self, module: nn.Module, rows: Tensor, arrived: Arrived) -> Tensor:
        """This rank's experts on the rows that arrived, results in the same places."""
        num_rows, gathers = rows.shape[0], self.groups.gathers
        if gathers is not None:
            if num_rows < arrived.longest:
                rows = put(rows, torch.arange(num_rows, device=rows.device), arrived.longest)
            rows = gather_sequence(rows, gathers)
        by_expert = rows if arrived.places is None else take(rows, arrived.places)
        result = run_experts(
            module,
            self.shape,
            by_expert,
            arrived,
            adds_bias=self.groups.adds_bias,
            leaves=self.groups.ep is not None or gathers is not None,
        )
        if arrived.places is not None:
            result = put(result, arrived.places, rows.shape[0])
        return result if gathers is None else scatter_sequence(result, gathers)[:num_rows]


class _Here:
    """The exchange where all experts are on this rank."""

    def start(self, rows: Tensor) -> Tensor:
        return rows

    def wait(self, pending: Tensor) -> Tensor:
        return pending


def _exchange(group: Group | None, sent: list[int], received: list[int]) -> Exchange | _Here:
    return _Here() if group is None else Exchange(group, sent, received)


def _weighted(rows: Tensor, part: Part, weights: Tensor) -> Tensor:
    """Rows that came back, sorted by expert, weighted and added up for each token; as transformers 5 does it."""
    choices = put(rows, part.order, part.num_tokens * part.top_k).view(part.num_tokens, part.top_k, -1)
    return (choices * weights.unsqueeze(-1)).sum(1)


def _forward(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return module.expert_layer(module, x, index, weights)  # type: ignore[no-any-return]


class ExpertParallel:
    """The expert layers of one stage, split: their parameters' layouts, and what their routers did.

    ``modules``: the modules that hold experts' parameters, by name in the stage; each is to be an FSDP2 unit over edp.
    ``names``: those parameters' names. ``router_names``: names of the routers' parameters, whose gradients are partial
    sums over tp with sequence parallelism. ``note``: a sentence on what is not as the model's own code has it, or "".
    """

    def __init__(
        self, mesh: DeviceMesh | None, shard_groups: tuple[Group, ...], modules: dict[str, nn.Module], note: str
    ) -> None:
        self.modules = modules
        self.note = note
        self.names: tuple[str, ...] = ()
        self.router_names: tuple[str, ...] = ()
        self._mesh = mesh
        self._shard_groups = shard_groups
        self._shapes: dict[str, ExpertShape] = {}
        self._routings: list[Routing] = []
        self._together = AllLayers()

    def copies(self, name: str) -> int:
        """On how many ranks of one ``[ep, etp]`` slice each element of an expert's parameter is held (1, or etp)."""
        return 1 if self._mesh is None else self._layout(name).copies

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor in the model's own layout, from an expert's parameter or its gradient as stored.

        ``tensor`` may be sharded further over edp. Every rank of ``mesh.experts`` must call.
        """
        stored = gathered(tensor)
        if self._mesh is None:
            return stored
        layout = self._layout(name)
        if layout.dim is None:
            return stored
        places = torch.cat([torch.from_numpy(positions) for positions in layout.positions]).to(stored.device)
        return torch.empty_like(stored).index_copy_(layout.dim, places, stored)

    def stored_part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as stored before edp shards it. No communication."""
        return whole if self._mesh is None else own_part(whole, self._layout(name), self._mesh)

    def begin_step(self) -> None:
        """Forget what the routers did."""
        self._together.forget()
        for routing in self._routings:
            routing.begin_step()

    def statistics(self) -> ExpertStatistics:
        """What the routers did since ``begin_step``; every rank of the stage must call, at the same time.

        Raises ``InputError`` before the first forward.
        """
        rows = []
        for routing in self._routings:
            if routing.load is None or routing.kept is None:
                raise InputError("no step has run yet: routers have chosen nothing")
            loss = torch.as_tensor(routing.loss(), device=routing.load.device).double().reshape(1)
            dropped = (routing.load - routing.kept).sum().reshape(1)
            rows.append(torch.cat((routing.load.double(), dropped.double(), loss)))  # counts below 2**53 are exact
        if not rows:
            return ExpertStatistics(
                layers=(), load=torch.empty(0, 0), dropped=torch.empty(0), auxiliary_loss=torch.empty(0)
            )
        table = torch.stack(rows)
        for group in self._shard_groups:
            dist.all_reduce(table, group=group)
        return ExpertStatistics(
            layers=tuple(self.modules),
            load=table[:, :-2].long(),
            dropped=table[:, -2].long(),
            auxiliary_loss=table[:, -1],
        )

    def _layout(self, name: str) -> Any:
        module, _, weight = name.rpartition(".")
        assert self._mesh is not None
        return self._shapes[module].layout(weight, self._mesh.size(1))

    def _add(self, model: nn.Module, place: ExpertPlace, groups: ExpertGroups, auxiliary: Auxiliary | None) -> None:
        module = self.modules[place.name]
        routing = Routing(model.get_submodule(place.router), place.shape.num_experts, auxiliary, self._together)
        object.__setattr__(module, "expert_layer", _Layer(place.shape, groups, routing))
        if self._mesh is not None:
            hold_slice(module, place.shape, self._mesh)
        compute_with(module, place.shape, _forward)
        self._routings.append(routing)
        self._shapes[place.name] = place.shape
        self.names += tuple(f"{place.name}.{name}" for name in place.shape.names)
        router = model.get_submodule(place.router)
        self.router_names += tuple(f"{place.router}.{name}" for name, _ in router.named_parameters())


def split_experts(
    model: nn.Module, mesh: Mesh, *, sequence_parallel: bool, num_chunks: int, num_microbatches: int
) -> ExpertParallel:
    """Split the experts of ``model`` (one stage of it, or all) over ``mesh.experts``, in place.

    ``num_microbatches`` are those of a step over all data ranks, by which the auxiliary loss is divided. It is added
    where the model's ``config`` asks for it: ``router_aux_loss_coef`` above 0, and in Hugging Face models
    ``output_router_logits``, which is switched off then (the loss is added here, at each router).

    Raises ``InputError`` naming a module whose experts cannot be split, and for sizes that do not divide.
    """
    places = find_experts(model)
    ep, etp, tp = (mesh.size(axis) for axis in ("ep", "etp", "tp"))
    for place in places:
        if place.shape.num_experts % ep or place.shape.ffn_size % etp:
            raise InputError(
                f"{place.name} has {place.shape.num_experts} experts of width {place.shape.ffn_size}, which ep={ep} "
                f"and etp={etp} do not divide"
            )
    is_cut = mesh.experts is not None and ep * etp > 1
    alike = tp > 1 and not sequence_parallel  # tp ranks have the same tokens
    if alike and etp != tp:
        raise InputError(f"etp={etp} and tp={tp} without sequence_parallel: all ranks of tp have the same tokens")
    groups = ExpertGroups(
        ep=mesh.axis("ep").get_group() if ep > 1 else None,
        gathers=mesh.axis("etp").get_group() if etp > 1 and not alike else None,
        adds_bias=mesh.index("etp") == 0,
        num_chunks=num_chunks if ep > 1 else 1,
    )
    auxiliary, note = _auxiliary(model, mesh, alike=alike, num_microbatches=num_microbatches)
    shards = [mesh.shard, *([mesh.axis("tp")] if tp > 1 and sequence_parallel else [])]
    split = ExpertParallel(
        mesh.experts[SLICE_AXES] if mesh.experts is not None and is_cut else None,
        tuple(axis.get_group() for axis in shards if axis.size() > 1),
        {place.name: model.get_submodule(place.name) for place in places},
        note,
    )
    for place in places:
        split._add(model, place, groups, auxiliary)
    return split


def _auxiliary(model: nn.Module, mesh: Mesh, *, alike: bool, num_microbatches: int) -> tuple[Auxiliary | None, str]:
    """What the model's config asks for, and a sentence where the formula is not the model's own."""
    config: Any = getattr(model, "config", None)
    coefficient = getattr(config, "router_aux_loss_coef", None) or 0.0
    of_hugging_face = hasattr(config, "output_router_logits")
    if not coefficient or (of_hugging_face and not config.output_router_logits):
        return None, ""
    if of_hugging_face:
        config.output_router_logits = False
    axes = [mesh.axis("cp"), *([] if alike else [mesh.axis("tp")])]
    across = of_hugging_face and mesh.size("pp") == 1 and num_microbatches == 1
    auxiliary = Auxiliary(
        coefficient=coefficient,
        num_microbatches=num_microbatches,
        groups=tuple(axis.get_group() for axis in axes if axis.size() > 1),
        num_shards=mesh.size("cp") * (1 if alike else mesh.size("tp")),
        across_layers=across,
    )
    changed = (
        f"the auxiliary loss (router_aux_loss_coef={coefficient:g}) is that of each layer over one micro-batch, added "
        "up over layers and averaged over micro-batches; Hugging Face's own takes all layers as one, about one layer's"
    )
    return auxiliary, changed if of_hugging_face and not across else ""
