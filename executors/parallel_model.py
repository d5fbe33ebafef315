"""The model that comes out of ``parallelize``: its step, its weights whole and in part, its norm, its statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshwright import InputError
from meshwright.executors.clip import global_grad_norm, scale_grads
from meshwright.executors.context_parallel import ContextParallel
from meshwright.executors.data_parallel import local, torch_dtype
from meshwright.executors.expert_parallel import ExpertStatistics
from meshwright.executors.expert_routing import check_token_groups
from meshwright.executors.loss import IGNORED
from meshwright.executors.mesh import Mesh
from meshwright.executors.pipeline import Chunk, Pipeline
from meshwright.executors.state import (
    gather_stages,
    gather_statistics,
    load_parts,
    load_whole,
    whole_gradients,
    whole_weights,
)
from meshwright.planner.plan import Plan
from meshwright.profiler.anatomy import Anatomy


class ParallelModel:
    """A model split as its plan says. Give ``parameters()`` to an optimizer, then for each batch::

        loss = parallel.step(batch)
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    ``data_rank`` and ``data_size`` say which share of the global batch this rank takes; ranks of one ``data_rank``
    (pp, cp and tp peers) must be given the same batch, of whole sequences: context parallelism cuts them here.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        anatomy: Anatomy,
        chunks: list[Chunk],
        context: ContextParallel | None,
        *,
        check_count: bool,
    ) -> None:
        self.plan = plan
        self.mesh = mesh.root
        self.data_rank = mesh.index("dp")
        self.data_size = mesh.size("dp")
        self.num_microbatches = plan.micro_batches_per_data_rank[self.data_rank]
        self._mesh = mesh
        self._chunks = chunks
        self._context = context
        self._check_count = check_count  # the user's loss_fn may count otherwise; ours does not
        self._tied = _tied_across_stages(plan, anatomy, chunks)
        self._pipelines: dict[int, Pipeline] = {}  # by sequence length

    def step(self, batch: tuple[Tensor, Tensor] | Mapping[str, Tensor]) -> Tensor:
        """Forward and backward of this data rank's share of one global batch; gradients are left in ``.grad``.

        ``batch`` is ``(inputs, targets)`` or a mapping with ``input_ids`` and ``targets``, each
        ``[micro_batches * micro_batch_size, sequence]``; targets are already shifted, -100 is ignored. Returns the mean
        loss over the targets of the whole global batch, the same on every rank.

        Raises ``InputError`` for a batch of another shape, or a ``loss_fn`` that counts other targets.
        """
        tokens, targets = self._checked(batch)
        positions = None
        if self._context is not None:
            positions = self._context.positions(tokens.shape[1], tokens.device)
            tokens, targets = tokens[:, positions], targets[:, positions]
        count = (targets != IGNORED).sum()
        dist.all_reduce(count, group=self._mesh.shard.get_group())
        for chunk in self._chunks:
            chunk.module.begin_step(count.clamp(min=1), positions)
            if chunk.experts:
                chunk.experts.begin_step()
        if self._mesh.size("pp") > 1:
            self._pipeline(tokens.shape[1]).run(tokens, targets)
        else:
            self._accumulate(self._chunks[0], tokens, targets)
        for chunk in self._chunks:
            chunk.data_parallel.finish()
            chunk.tensor_parallel.finish_gradients()
        if self._tied:
            self._sum_tied_grads(self._tied)
        return self._mean_loss(count)

    def _accumulate(self, chunk: Chunk, tokens: Tensor, targets: Tensor) -> None:
        size = self.plan.config.micro_batch_size
        for index, (inputs, wanted) in enumerate(
            zip(torch.split(tokens, size), torch.split(targets, size), strict=True)
        ):
            loss = chunk.module(tokens=inputs, targets=wanted)
            chunk.data_parallel.before_backward(last=index == self.num_microbatches - 1)
            loss.backward()

    def _pipeline(self, sequence: int) -> Pipeline:
        if sequence not in self._pipelines:
            config = self.plan.config
            shards = config.tp if config.sequence_parallel else 1
            self._pipelines[sequence] = Pipeline(
                self._chunks,
                self._mesh,
                config.schedule,
                config.num_stages,
                self.num_microbatches,
                (config.micro_batch_size, sequence // shards, self.plan.model.hidden),
                torch_dtype(self.plan.workload.recipe.compute),
            )
        return self._pipelines[sequence]

    def _sum_tied_grads(self, copies: list[nn.Parameter]) -> None:
        """Add the gradients of a tied embedding's two copies; both then hold the sum."""
        ours = [local(copy.grad) for copy in copies if copy.grad is not None]
        if len(copies) == 2:
            ours[0].add_(ours[1])
            ours[1].copy_(ours[0])
            return
        (grad,) = ours
        sent = grad.contiguous()
        received = torch.empty_like(sent)
        first, last = self.plan.stages[0].pp_rank, self.plan.stages[-1].pp_rank
        peer = last if self._mesh.index("pp") == first else first
        group = self._mesh.axis("pp").get_group()
        ends = [
            dist.P2POp(dist.isend, sent, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, received, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(ends):
            work.wait()
        grad.add_(received)

    def _mean_loss(self, count: Tensor) -> Tensor:
        last = self._chunks[-1].module
        seen = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)
        if last.loss_fn is not None and self._mesh.index("tp") == 0:
            seen[0], seen[1] = last.loss_sum, last.count
        dist.all_reduce(seen)
        if self._check_count and int(seen[1]) != int(count):
            raise InputError(f"loss_fn counted {int(seen[1])} targets, {int(count)} are not {IGNORED}")
        return seen[0] / count.clamp(min=1)

    def _checked(self, batch: tuple[Tensor, Tensor] | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        tokens, targets = (batch["input_ids"], batch["targets"]) if isinstance(batch, Mapping) else batch
        rows = self.num_microbatches * self.plan.config.micro_batch_size
        if tokens.dim() != 2 or tokens.shape[0] != rows or tokens.shape != targets.shape:
            raise InputError(
                f"data rank {self.data_rank} takes inputs and targets of shape [{rows}, sequence] "
                f"({self.num_microbatches} micro-batches of {self.plan.config.micro_batch_size}), "
                f"found {list(tokens.shape)} and {list(targets.shape)}"
            )
        if self.plan.model.moe is not None:
            check_token_groups(self.plan.model.moe, self.plan.config, tokens.shape[1])
        return tokens.to(self._mesh.device), targets.to(self._mesh.device)

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients under the original names, on the CPU of every rank: those of this rank's stages."""
        return {name: grad for chunk in self._chunks for name, grad in whole_gradients(chunk).items()}

    def state_dict(self, *, full: bool = True) -> dict[str, Tensor]:
        """The weights under the names of the model that was given.

        ``full``: all of them, whole and unpadded, on the CPU of every rank. Otherwise what this rank holds, as it holds
        it (``DTensor`` where split), without communication.
        """
        if not full:
            return {name: value for chunk in self._chunks for name, value in chunk.module.model.state_dict().items()}
        own = {name: value for chunk in self._chunks for name, value in whole_weights(chunk).items()}
        return gather_stages(own, self._mesh)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *, full: bool = True) -> None:
        """Take weights from ``state``: the whole model's (of any plan), or what ``state_dict(full=False)`` gave here.

        Raises ``InputError`` for a missing name or another shape.
        """
        for chunk in self._chunks:
            load_whole(chunk, state) if full else load_parts(chunk, state)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, whole or in part, under their names in the model that was given."""
        for chunk in self._chunks:
            yield from chunk.module.model.named_parameters()

    def modules(self) -> list[nn.Module]:
        """This rank's stages of the model, in the model's order."""
        return [chunk.module.model for chunk in self._chunks]

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters: what its optimizer updates."""
        return (weight for _, weight in self.named_parameters())

    def parameter_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """``parameters()`` as an optimizer's groups, each on one mesh, as ``fused=True`` and ``foreach=True`` need."""
        groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
        for weight in self.parameters():
            groups.setdefault(weight.device_mesh if isinstance(weight, DTensor) else None, []).append(weight)
        return [{"params": weights} for weights in groups.values()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for chunk in self._chunks:
            chunk.module.zero_grad(set_to_none=set_to_none)

    def axis_of_group(self) -> dict[str, str]:
        """Which axis (pp, dp, cp, tp, world) each process group runs along, by the group's name."""
        return self._mesh.axis_of_group()

    def train(self, mode: bool = True) -> ParallelModel:
        """Switch dropout on or off, as ``nn.Module.train``."""
        for chunk in self._chunks:
            chunk.module.train(mode)
        return self

    def eval(self) -> ParallelModel:
        """Switch dropout off."""
        return self.train(False)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their common 2-norm is at most ``max_norm``; returns the norm before.

        The norm is that of the whole model: replicas and the second copy of a tied weight count once.
        """
        counted = [
            (weight, self._copies(chunk, name))
            for chunk in self._chunks
            for name, weight in chunk.module.model.named_parameters()
            if chunk.index == 0 or not any(weight is copy for copy in self._tied)
        ]
        norm = global_grad_norm(counted, self._mesh.device)
        scale_grads(self.parameters(), max_norm, norm)
        return norm

    def _copies(self, chunk: Chunk, name: str) -> int:
        """How many ranks of a stage hold each element of a parameter."""
        is_expert = chunk.experts is not None and name in chunk.experts.names
        owner = chunk.experts if is_expert else chunk.tensor_parallel
        assert owner is not None
        replicas = self._mesh.size("edp") if is_expert else self._mesh.shard.size()
        return owner.copies(name) * (1 if self.plan.config.zero_stage else replicas)

    def expert_statistics(self) -> ExpertStatistics | None:
        """What the routers of the whole model did in the last step, on every rank; None for a model without experts, or
        with experts that are not known (``expert_modules``).

        Tokens that chose each expert, choices dropped for want of room, and the auxiliary loss, which ``step`` trains
        on but does not return. It is worked out for each layer over one micro-batch and averaged over micro-batches and
        data ranks; Hugging Face's own formula mixes the layers of a model, and is kept only where pp, dp and the
        number of micro-batches are 1.
        """
        own = [chunk.experts.statistics() for chunk in self._chunks if chunk.experts]
        if not own:
            return None
        return gather_statistics(own, self._mesh)


def _tied_across_stages(plan: Plan, anatomy: Anatomy, chunks: list[Chunk]) -> list[nn.Parameter]:
    """This rank's copies of an embedding tied over two stages: none, one, or in a V both."""
    if not anatomy.tied or len(plan.stages) == 1:
        return []
    holders = {0: anatomy.token_embedding, len(plan.stages) - 1: anatomy.head}
    return [
        dict(chunk.module.model.named_parameters())[f"{holders[chunk.index]}.weight"]
        for chunk in chunks
        if chunk.index in holders
    ]
