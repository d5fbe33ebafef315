"""What must hold before a plan is applied; each failure is one sentence with its numbers."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import nn

from meshwright import InputError
from meshwright.cost_models.schedules import stage_indices
from meshwright.cost_models.strategy import SPLIT_BACKWARD, ParallelConfig, Schedule
from meshwright.executors.data_parallel import torch_dtype
from meshwright.executors.expert_modules import find_experts
from meshwright.executors.expert_routing import check_token_groups
from meshwright.planner.plan import Plan
from meshwright.profiler.anatomy import Anatomy
from meshwright.profiler.cluster import ClusterProfile
from meshwright.profiler.environment import capture_environment, environment_differences


def check_plan(plan: Plan) -> None:
    """The plan is ours to run, on this many ranks. Raises ``InputError``."""
    config = plan.config
    if plan.framework != "meshwright":
        raise InputError(
            f"this plan is for {plan.framework!r}; parallelize runs plans made with --framework meshwright"
        )
    if not dist.is_initialized():
        raise InputError("torch.distributed is not initialised: call init_process_group first, or start with torchrun")
    if dist.get_world_size() != config.world_size:
        raise InputError(
            f"the plan is for {config.world_size} ranks ({config.describe()}), this run has {dist.get_world_size()}"
        )
    _check_experts(plan)
    if config.vocab_parallel != (config.tp > 1):
        raise InputError(f"tp={config.tp} splits embedding and head by vocabulary: vocab_parallel must say so")
    if config.zero_stage and config.dp_shard != config.dp * config.cp:
        raise InputError(
            f"dp_shard={config.dp_shard}: this version shards over all dp*cp={config.dp * config.cp} ranks"
        )
    _check_stages(plan)
    shares = set(plan.micro_batches_per_data_rank)
    if min(shares) < 1:
        raise InputError(f"each data rank needs a micro-batch, found {plan.micro_batches_per_data_rank}")
    for share in shares:
        _check_schedule(config, share)
    if config.zero_stage >= 2 and len(shares) > 1:
        raise InputError(
            f"zero_stage={config.zero_stage} reduces gradients after each micro-batch, so data ranks need equally "
            f"many; found {plan.micro_batches_per_data_rank}: use zero_stage 0 or 1, or an even share"
        )


def _check_experts(plan: Plan) -> None:
    """Experts divide over ep and etp, and tokens reach them once."""
    config, moe = plan.config, plan.model.moe
    if moe is None:
        for name in ("ep", "etp"):
            if getattr(config, name) > 1:
                raise InputError(f"{name}={getattr(config, name)}: {plan.model.name} has no experts")
        return
    if moe.num_experts % config.ep or moe.expert_ffn_size % config.etp:
        raise InputError(
            f"ep={config.ep} must divide the {moe.num_experts} experts of {plan.model.name}, and etp={config.etp} "
            f"their width of {moe.expert_ffn_size}"
        )
    if config.tp > 1 and config.etp != config.tp and not config.sequence_parallel:
        raise InputError(
            f"tp={config.tp} with etp={config.etp} needs sequence_parallel: without it tp ranks have the same tokens"
        )
    check_token_groups(moe, config, plan.workload.seq_len)
    if len(set(plan.micro_batches_per_data_rank)) > 1 and (config.cp * config.tp) % (config.ep * config.etp):
        raise InputError(
            f"ep={config.ep} and etp={config.etp} span data ranks, which exchange tokens in every micro-batch and so "
            f"need equally many; found {plan.micro_batches_per_data_rank}: use an even share"
        )


def _check_stages(plan: Plan) -> None:
    """Each stage is on the rank on which torch's schedule looks for it, and runs as it can there."""
    config = plan.config
    stages: list[list[int]] = stage_indices(config.schedule, config.pp, config.vpp).tolist()
    rank_of = {stage: rank for rank, own in enumerate(stages) for stage in own}
    places, wanted = [stage.pp_rank for stage in plan.stages], [rank_of[index] for index in range(len(plan.stages))]
    if places != wanted:
        found, expected = (", ".join(map(str, ranks)) for ranks in (places, wanted))
        raise InputError(f"{config.schedule.value} has its stages on the pipeline ranks {expected}; found {found}")
    if config.schedule not in SPLIT_BACKWARD:
        return
    if config.zero_stage >= 2:
        raise InputError(
            f"{config.schedule.value} works out gradients of weights for a whole stage at a time, so that zero_stage="
            f"{config.zero_stage} saves nothing: use zero_stage 0 or 1, or another schedule"
        )


def _check_schedule(config: ParallelConfig, num_microbatches: int) -> None:
    """The rules of torch's schedules on the number of micro-batches (``torch/distributed/pipelining/schedules.py``)."""
    if config.pp == 1:
        return
    if config.schedule is Schedule.ONE_F_ONE_B and num_microbatches < config.pp:
        raise InputError(f"1f1b with pp={config.pp} needs at least {config.pp} micro-batches, found {num_microbatches}")
    if config.schedule is Schedule.DUALPIPEV and num_microbatches < 2 * config.pp:
        raise InputError(
            f"dualpipev with pp={config.pp} needs at least {2 * config.pp} micro-batches, found {num_microbatches}"
        )
    rounds = max(1, num_microbatches // config.pp)
    if config.schedule in (Schedule.INTERLEAVED, Schedule.ZB_H1) and num_microbatches % rounds:
        raise InputError(
            f"{config.schedule.value} with pp={config.pp} runs {num_microbatches} micro-batches in {rounds} rounds, "
            f"which must divide them"
        )


def check_model(model: nn.Module, anatomy: Anatomy, plan: Plan) -> None:
    """The model is the one that was planned for. Raises ``InputError``."""
    if dist.get_backend() != "fake" and any(weight.device.type == "meta" for weight in model.parameters()):
        raise InputError(
            f"this {type(model).__name__} is on the meta device, without weights: build it in memory, or try the plan "
            "on it with meshwright.dry_run"
        )
    degrees = {"ep": plan.config.ep, "etp": plan.config.etp, "tp": plan.config.tp}
    if plan.model.moe is not None and max(degrees.values()) > 1 and not find_experts(model):
        above = ", ".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1)
        raise InputError(
            f"this {type(model).__name__} has no module of stacked experts, parameters [experts, ...], as {above} needs"
        )
    spec, head = plan.model, dict(model.named_parameters(remove_duplicate=False))[f"{anatomy.head}.weight"]
    found = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "decoder layers": anatomy.num_blocks,
        "vocabulary entries": head.shape[0],
    }
    dtypes = {weight.dtype for weight in model.parameters()}
    recipe = plan.workload.recipe
    if not recipe.has_master and dtypes != {torch_dtype(recipe.params)}:
        raise InputError(
            f"the plan keeps weights in {recipe.params.value}, this {type(model).__name__} has "
            f"{', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}: convert it with model.to(...)"
        )
    planned = {
        "parameters": spec.params,
        "decoder layers": spec.num_layers,
        "vocabulary entries": spec.vocab_size,
    }
    for what, number in planned.items():
        if found[what] != number:
            raise InputError(
                f"the plan is for {spec.name} with {number:,} {what}, this {type(model).__name__} has {found[what]:,}"
            )


def check_cluster(plan: Plan, cluster: ClusterProfile) -> None:
    """The plan was made on this cluster as it was measured. Raises ``InputError``."""
    if cluster.digest != plan.cluster_digest:
        raise InputError(
            f"the plan was made for cluster {plan.cluster_name} ({plan.cluster_digest}), this is {cluster.name} "
            f"({cluster.digest}): plan again with --cluster and this profile"
        )


def check_environment(plan: Plan) -> None:
    """Warn where this run's circumstances differ from those that the plan's figures were measured under."""
    if plan.environment is None or dist.get_rank() > 0 or dist.get_backend() == "fake":
        return
    differences = environment_differences(plan.environment, capture_environment(backend=dist.get_backend()))
    if differences:
        warnings.warn(
            f"the cluster was profiled under other settings, predictions may be off: {'; '.join(differences)}",
            stacklevel=3,
        )
