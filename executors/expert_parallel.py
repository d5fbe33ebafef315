"""Expert parallelism: each rank holds some of the experts of a layer, tokens travel to them and back.

    split = split_experts(stage.model, mesh, sequence_parallel=..., num_chunks=config.ep_chunks, num_microbatches=8)
    ...                                                       # recompute, fully_shard over edp, forward, backward
    split.begin_step()                                        # before the forwards of a step
    split.statistics()                                        # after it: load, dropped tokens, auxiliary loss

The ranks of a stage are folded into ``mesh.experts`` ``[edp, ep, etp]`` (Liu et al., "MoE Parallel Folding", arXiv
2504.14960), whatever axes attention gives them. A rank holds ``num_experts / ep`` experts, of each ``1 / etp`` of its
width: parameters become DTensors ``[Shard(0), Shard(width)]`` over ``mesh.experts["ep", "etp"]`` (``Replicate`` over etp
for the bias after the second matrix), so that FSDP2 shards them over ``mesh.experts["edp"]``. Where ``ep * etp`` is 1
they stay as they are. Gradients are plain sums over edp, with no factor: each expert has seen all tokens of its ep group.

How a layer runs, ``T`` tokens of this rank, each with ``k`` choices, ``h`` wide, in ``num_chunks`` parts:

* the model's own router runs on the rank's tokens;
* *dispatch*: rows, sorted by expert, go to the ranks that hold their expert; sizes are exchanged first;
* where the ranks of an etp group have different tokens, the rows that arrived are gathered over etp, and the partial
  results reduce-scattered; where they have the same (tp without sequence parallelism: then etp = tp), each computes its
  slice of the width and the result is a **partial sum over tp**, which whoever closes the region adds up. The router's
  gradients are then partial sums over tp too, as is the gradient of the layer's input;
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
auxiliary loss              1 all_reduce of ``E`` over cp and tp        none
==========================  ==========================================  ======================================

(all figures are totals of the n parts). A forward waits once for the host to read the sizes. Recomputed in full, a
layer issues all of its forward's collectives again (the gradient of the router's weights needs the rows that came back).
Recomputed selectively it issues none again: what collectives and matrix products returned is kept.

With ``num_chunks`` above 1 the exchange of one part runs beside the experts' work on another, forward and backward:
all_to_alls are asynchronous, the dispatch of part ``i + 1`` is issued before the work on part ``i``, whose combine is
issued right after it; autograd, which runs backward in the opposite order of forward, does the same in backward.
"""

from __future__ import annotations

from torch import Tensor, nn

from meshwright.executors.mesh import Mesh
from meshwright.profiler.record import record


@record
class ExpertStatistics:
    """What the routers of a stage did in one step, over all ranks and micro-batches; one row a layer with experts.

    ``load`` ``[layers, experts]``: tokens that chose an expert, before any is dropped. ``dropped`` ``[layers]``: choices
    that an expert had no room for. ``auxiliary_loss`` ``[layers]``: with its coefficient, averaged over micro-batches and
    dp; under Hugging Face's formula across layers, each layer's share of the sum. ``layers`` are the names of the
    modules that hold the experts.
    """

    layers: tuple[str, ...]
    load: Tensor
    dropped: Tensor
    auxiliary_loss: Tensor


class ExpertParallel:
    """The expert layers of one stage, split: their parameters' layouts, and what their routers did.

    ``modules``: the modules that hold experts' parameters, by name in the stage; each is one FSDP2 unit over edp.
    ``names``: those parameters' names. ``router_names``: names of the routers' parameters (their gradients are partial
    sums over tp whenever tp > 1, with sequence parallelism or without).
    """

    modules: dict[str, nn.Module]
    names: tuple[str, ...]
    router_names: tuple[str, ...]

    def copies(self, name: str) -> int:
        """On how many ranks of one ``[ep, etp]`` slice each element of an expert's parameter is held (1, or etp)."""
        raise NotImplementedError

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor in the model's own layout, from a parameter or its gradient as stored (also over edp).

        Every rank of ``mesh.experts`` must call.
        """
        raise NotImplementedError

    def stored_part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as stored before edp shards it. No communication."""
        raise NotImplementedError

    def begin_step(self) -> None:
        """Forget what the routers did."""
        raise NotImplementedError

    def statistics(self) -> ExpertStatistics:
        """What the routers did since ``begin_step``; every rank of the stage must call."""
        raise NotImplementedError


def split_experts(
    model: nn.Module, mesh: Mesh, *, sequence_parallel: bool, num_chunks: int, num_microbatches: int
) -> ExpertParallel:
    """Split the experts of ``model`` (one stage of it, or all) over ``mesh.experts``, in place.

    ``num_microbatches`` are those of a step over all data ranks, by which the auxiliary loss is divided. The auxiliary
    loss is added where the model's ``config`` asks for it: ``router_aux_loss_coef`` above 0, and in Hugging Face models
    ``output_router_logits``, which is switched off (the loss is added here, at each router).

    Raises ``InputError`` naming a module whose experts cannot be split, and for sizes that do not divide.
    """
    raise NotImplementedError
