"""``parallelize(model, plan)``: the order in which a plan is applied, written once.

The order matters: the mesh first; then each stage is cut out; its matrices are split over tp and its experts over ep
and etp, so that recompute and ZeRO see the pieces; its attentions are led over cp, within what recompute runs again;
recompute wraps a block's forward, inside everything that hooks onto the block; ZeRO shards what is left over dp and,
of experts, edp; and the pipeline's runtime runs the result.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn

from meshwright import InputError
from meshwright.cost_models.strategy import SPLIT_BACKWARD, Recompute
from meshwright.executors.attention_hooks import apply_context_parallel
from meshwright.executors.checks import check_cluster, check_environment, check_model, check_plan
from meshwright.executors.context_parallel import ContextParallel
from meshwright.executors.data_parallel import DataParallel, torch_dtype
from meshwright.executors.expert_parallel import ExpertParallel, split_experts
from meshwright.executors.loss import LossFunction, loss_on_shards
from meshwright.executors.mesh import Mesh, build_mesh
from meshwright.executors.parallel_model import ParallelModel
from meshwright.executors.pipeline import Chunk
from meshwright.executors.recompute import apply_recompute
from meshwright.executors.stage import StageModule, cut_stage, whole_stage
from meshwright.executors.tensor_parallel import (
    TensorParallelRules,
    apply_tensor_parallel,
    find_tensor_parallel_rules,
    no_tensor_parallel,
)
from meshwright.executors.weight_gradients import WeightGradients
from meshwright.planner.plan import Plan
from meshwright.profiler.anatomy import Anatomy, find_anatomy
from meshwright.profiler.cluster import ClusterProfile

logger = logging.getLogger(__name__)


def parallelize(
    model: nn.Module, plan: Plan, loss_fn: LossFunction | None = None, *, cluster: ClusterProfile | None = None
) -> ParallelModel:
    """Split ``model`` as ``plan`` says; every rank of the default process group calls this with equal weights.

    ``model`` is used up: its modules become part of the result. ``loss_fn(logits, targets) -> (sum, count)`` gets the
    logits ``[micro_batch_size, sequence, vocab_size]`` of a micro-batch; ``count`` is the number of targets that are
    not -100. The default is cross entropy. ``cluster`` is the profile of the machines this runs on, to be checked
    against the one that the plan was made for.

    Raises:
        InputError: the plan is for another world size, another model, another cluster, or another framework, or
            cannot be run.
    """
    check_plan(plan)
    if cluster is not None:
        check_cluster(plan, cluster)
    anatomy = find_anatomy(model)
    check_model(model, anatomy, plan)
    check_environment(plan)
    device = _rank_device()
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False  # type: ignore[union-attr]  # a cache of keys and values is for generation

    mesh = build_mesh(plan, device)
    tp_group = mesh.axis("tp").get_group() if plan.config.tp > 1 else None
    rules = find_tensor_parallel_rules(model) if plan.config.tp > 1 else None
    loss = loss_on_shards(loss_fn, group=tp_group, vocab_size=plan.model.vocab_size)
    stages = _own_stages(model, anatomy, plan, mesh, loss)
    context = ContextParallel(mesh.context) if mesh.context is not None else None
    chunks = [_split_stage(index, module, plan, mesh, rules, context) for index, module in stages]
    for note in sorted({chunk.experts.note for chunk in chunks if chunk.experts} - {""}):
        logger.log(logging.WARNING if dist.get_rank() == 0 else logging.DEBUG, note)
    return ParallelModel(plan, mesh, anatomy, chunks, context, check_count=loss_fn is not None)


def _split_stage(
    index: int,
    module: StageModule,
    plan: Plan,
    mesh: Mesh,
    rules: TensorParallelRules | None,
    context: ContextParallel | None,
) -> Chunk:
    """Stage ``index`` on its device, split over tp, attending over cp, then recomputing, then sharded over dp."""
    config, recipe, stage = plan.config, plan.workload.recipe, plan.stages[index]
    on_meta = any(weight.device.type == "meta" for weight in module.parameters())
    module.to(
        None if on_meta else mesh.device, torch_dtype(recipe.master) if recipe.master and recipe.has_master else None
    )
    split = no_tensor_parallel(module.model)
    if rules:
        tp_mesh = mesh.axis("tp")
        split = apply_tensor_parallel(module.model, rules, tp_mesh, sequence_parallel=config.sequence_parallel)
    experts = _split_experts(module.model, plan, mesh) if plan.model.moe else None
    put_off = None
    if config.schedule in SPLIT_BACKWARD:
        put_off = WeightGradients(
            module.blocks.values(), tensor_parallel=config.tp > 1, recomputed=Recompute.FULL in stage.recompute
        )
    if context is not None:
        apply_context_parallel(module.model, module.blocks, context)
    for layer, block in module.blocks.items():
        apply_recompute(block, stage.recompute[layer - stage.first_layer])
    routed = list(experts.modules.values()) if experts else []
    sharded = DataParallel(module, list(module.blocks.values()), mesh, config.zero_stage, recipe, experts=routed)
    return Chunk(index, module, split, sharded, put_off, experts)


def _split_experts(model: nn.Module, plan: Plan, mesh: Mesh) -> ExpertParallel | None:
    """A stage's experts over ep and etp; None for experts built otherwise, which run as they are where nothing cuts
    them."""
    config = plan.config
    try:
        return split_experts(
            model,
            mesh,
            sequence_parallel=config.sequence_parallel,
            num_chunks=config.ep_chunks,
            num_microbatches=sum(plan.micro_batches_per_data_rank),
        )
    except InputError:
        if config.tp * config.ep * config.etp > 1:
            raise
        return None


def _own_stages(
    model: nn.Module, anatomy: Anatomy, plan: Plan, mesh: Mesh, loss_fn: LossFunction
) -> list[tuple[int, StageModule]]:
    """The stages of this rank, with their place in the pipeline."""
    if len(plan.stages) == 1:
        return [(0, whole_stage(model, anatomy, loss_fn))]
    return [
        (index, cut_stage(model, anatomy, stage, loss_fn, torch_dtype(plan.workload.recipe.compute)))
        for index, stage in enumerate(plan.stages)
        if stage.pp_rank == mesh.index("pp")
    ]


def _rank_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
