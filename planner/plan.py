"""The plan: what to run, what it should cost, how it was chosen. The artifact that executors apply."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from meshwright import InputError
from meshwright.cost_models.estimate import CostBreakdown, Estimate, MemoryBreakdown
from meshwright.cost_models.margin import MemoryMargin
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import V_SHAPED, ParallelConfig, Reason, Recompute, even_stages
from meshwright.cost_models.workload import Workload
from meshwright.profiler import artifact
from meshwright.profiler.environment import Environment
from meshwright.profiler.model import ModelSpec
from meshwright.profiler.record import record

PLAN_SCHEMA_VERSION = 1
# fields of a plan that say how it was found and what was predicted of it
FOUND = ("cost", "memory", "memory_margin", "search", "assumptions", "environment", "cluster_name")


@record
class StagePlan:
    """One piece of the model: decoder layers ``first_layer <= i < last_layer`` on pipeline rank ``pp_rank``.

    The first stage also holds the embedding, the last one the final norm and the head.
    """

    pp_rank: int
    chunk: int
    first_layer: int
    last_layer: int
    recompute: tuple[Recompute, ...]  # of each layer
    device: str


@record
class RejectedCount:
    """How many configs were rejected for one reason."""

    reason: Reason
    count: int


@record
class SearchReport:
    """How the plan was found: what was scored, why the rest was rejected, and what came next.

    Of ``num_legal`` configs ``num_scored`` were scored; of the others it is proven that they are slower than every one
    that is named here (``num_too_slow``), or hold more than a device offers (``num_too_large``): see
    ``planner.pruned``. Feasible is what may be picked of those that were scored in time and memory: recommended
    configs, or those that fit where no margin is kept. Rejections for memory are of the scored ones, too.
    """

    method: str  # exhaustive, or branch and bound
    num_legal: int = 0  # 0 in plans of before there were bounds, which scored all
    num_scored: int
    num_too_slow: int = 0
    num_too_large: int = 0
    num_feasible: int
    rejected: tuple[RejectedCount, ...]
    runners_up: tuple[Estimate, ...]
    pareto: tuple[Estimate, ...]  # no feasible config is both faster and smaller; up to the slowest named, if not all
    optimality_gap: float  # 0: no legal config has a lower predicted step
    seconds: float


@record
class Plan:
    """How to split ``model`` for ``workload`` on the cluster with ``cluster_digest``, for ``framework`` to run.

    Raises ``InputError`` when stages do not cover the model's layers in order, or do not match the config.
    """

    artifact: Literal["plan"] = "plan"
    schema_version: int = PLAN_SCHEMA_VERSION
    framework: str
    model: ModelSpec
    workload: Workload
    cluster_name: str
    cluster_digest: str
    environment: Environment | None  # the profile's, to warn when a run differs
    config: ParallelConfig
    placement: Placement
    stages: tuple[StagePlan, ...]
    micro_batches_per_data_rank: tuple[int, ...]
    cost: CostBreakdown | None  # None in a plan written by hand, without a prediction
    memory: MemoryBreakdown | None
    memory_margin: MemoryMargin | None = None  # what a recommended plan leaves free; None where fitting is enough
    search: SearchReport | None
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        edges = [0, *(stage.last_layer for stage in self.stages)]
        if [stage.first_layer for stage in self.stages] != edges[:-1] or edges[-1] != self.model.num_layers:
            raise InputError(f"stages must cover layers 0 to {self.model.num_layers} in order, found edges {edges}")
        if len(self.stages) != self.config.num_stages:
            raise InputError(f"pp*vpp is {self.config.num_stages}, found {len(self.stages)} stages")
        if any(len(stage.recompute) != stage.last_layer - stage.first_layer for stage in self.stages):
            raise InputError("each stage must name the recompute choice of each of its layers")
        if len(self.micro_batches_per_data_rank) != self.config.dp:
            raise InputError(f"micro_batches_per_data_rank must have dp={self.config.dp} entries")
        sequences = sum(self.micro_batches_per_data_rank) * self.config.micro_batch_size
        if sequences != self.workload.global_batch_size:
            raise InputError(f"micro-batches hold {sequences} sequences, not {self.workload.global_batch_size}")

    @property
    def digest(self) -> str:
        """Fingerprint of what is run; how it was found and what was predicted do not belong to it."""
        return artifact.digest(self, without=FOUND)


def default_stages(model: ModelSpec, config: ParallelConfig, device: str) -> tuple[StagePlan, ...]:
    """Stages of the default partition (``even_stages``): stage ``s`` is chunk ``s // pp`` of rank ``s % pp``.

    In a V the second chunks go back: stage ``s`` of the second half is on rank ``2 * pp - 1 - s``.
    """
    stages, first = [], 0
    for stage, size in enumerate(even_stages(model.num_layers, config.num_stages)):
        chunk, rank = divmod(stage, config.pp)
        stages.append(
            StagePlan(
                pp_rank=config.pp - 1 - rank if chunk and config.schedule in V_SHAPED else rank,
                chunk=chunk,
                first_layer=first,
                last_layer=first + size,
                recompute=(config.recompute,) * size,
                device=device,
            )
        )
        first += size
    return tuple(stages)


def load_plan(path: str | Path) -> Plan:
    """Read a plan from its JSON file.

    Raises ``InputError`` for a file that cannot be read, is another artifact or of another version, or holds a plan
    that contradicts itself: with the field, what was expected and what was found.
    """
    return artifact.load(Plan, path, artifact="plan", schema_version=PLAN_SCHEMA_VERSION)


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as JSON; raises ``InputError`` when it cannot be written."""
    artifact.save(plan, path)


def save_candidates(plans: Sequence[Plan], folder: str | Path) -> tuple[Path, ...]:
    """Write plans into a folder, made where needed: ``plan-001.json`` is the first. Raises as ``artifact.save`` does.

    Files of that form already there are overwritten or, beyond the last plan, left.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    paths = tuple(folder / f"plan-{place:03d}.json" for place in range(1, len(plans) + 1))
    for plan, path in zip(plans, paths, strict=True):
        save_plan(plan, path)
    return paths
