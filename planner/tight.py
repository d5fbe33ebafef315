"""What would make most room in a plan whose memory is tight: changes that shrink the largest kind of its peak."""

from __future__ import annotations

from collections.abc import Callable

from meshwright.cost_models.estimate import KINDS, Moment
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.strategy import SPLIT_BACKWARD, ParallelConfig, Recompute
from meshwright.cost_models.targets import FRAMEWORKS
from meshwright.planner.plan import Plan
from meshwright.planner.summary import needed_of

TIGHT = 0.9  # of what a device offers
SHOWN = 3

Lever = Callable[[ParallelConfig, Framework], str | None]


def largest_kind(plan: Plan) -> str | None:
    """The kind (of ``estimate.KINDS``) that holds most at the peak; ``None`` for a plan with room, or unpriced."""
    memory = plan.memory
    if memory is None:
        return None
    usable = memory.capacity_bytes - memory.reserved_bytes
    if needed_of(memory, plan.memory_margin) <= TIGHT * usable:
        return None
    return max(KINDS, key=lambda kind: int(getattr(memory, f"{kind}_bytes")))


def what_helps(plan: Plan, kind: str) -> tuple[str, ...]:
    """Changes of the plan, open to its target, that shrink a kind: at most three, none for a target not known here."""
    target = FRAMEWORKS.get(plan.framework)
    if target is None:
        return ()
    whole = plan.memory is not None and plan.memory.moment is Moment.BUILD
    found = (lever(plan.config, target) for lever in (UNSHARDED if whole else LEVERS[kind]))
    return tuple(words for words in found if words)[:SHOWN]


def _recompute(config: ParallelConfig, target: Framework) -> str | None:
    order = (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL)
    more = [each.value for each in order[order.index(config.recompute) + 1 :] if each in target.recomputes]
    if not more or (config.pp > 1 and config.schedule in SPLIT_BACKWARD):
        return None
    return f"recompute {' or '.join(more)}"


def _micro_batch(config: ParallelConfig, target: Framework) -> str | None:
    return "a smaller micro batch" if config.micro_batch_size > 1 else None


def _sequence(config: ParallelConfig, target: Framework) -> str | None:
    return "sequence parallelism" if config.tp > 1 and not config.sequence_parallel else None


def _tp(config: ParallelConfig, target: Framework) -> str | None:
    return "more tp" if target.tensor_parallel else None


def _cp(config: ParallelConfig, target: Framework) -> str | None:
    return "more cp" if target.context_parallel else None


def _pp(config: ParallelConfig, target: Framework) -> str | None:
    return "more pp" if target.pipeline_parallel else None


def _zero(stage: int) -> Lever:
    def lever(config: ParallelConfig, target: Framework) -> str | None:
        higher = [each for each in target.zero_stages if each >= stage]
        if config.zero_stage >= stage or not higher or config.dp * config.cp == 1:
            return None
        return f"ZeRO {min(higher)}"

    return lever


def _shard(config: ParallelConfig, target: Framework) -> str | None:
    partly = config.zero_stage > 0 and config.dp_shard < config.dp * config.cp
    return f"sharding over all dp*cp={config.dp * config.cp} ranks" if partly else None


# A pipeline of more stages does not shrink activations: under 1F1B its first one holds as many micro-batches as there
# are stages.
LEVERS: dict[str, tuple[Lever, ...]] = {
    "params": (_zero(3), _shard, _pp, _tp),
    "grads": (_zero(2), _shard, _pp, _tp),
    "optimizer": (_zero(1), _shard, _pp, _tp),
    "activations": (_recompute, _micro_batch, _sequence, _cp, _tp),
    "gathered": (_zero(3), _pp, _tp),
    "working": (_micro_batch, _sequence, _cp, _tp),
    "communication": (_micro_batch, _tp),
}
UNSHARDED: tuple[Lever, ...] = (_pp, _tp)  # of a model made whole, which no sharding shrinks
