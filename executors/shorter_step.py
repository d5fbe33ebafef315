"""How many of a step's micro-batches a dry run must run to reach the peak that all of them reach."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost_models.strategy import ParallelConfig, Schedule
from meshwright.planner.plan import Plan


def enough_microbatches(plan: Plan, pp_rank: int, num_microbatches: int) -> int:
    """How many micro-batches of a step reach the peak that all of them reach.

    Without a pipeline three: the first makes gradients, the second adds to them, the last reduces them. Under 1F1B
    three more than the rank has in flight (``schedules.rank_actions``): its second and third backward find as many in
    flight as any later one, and gradients to add to. Under gpipe all are in flight. The other schedules repeat
    themselves from round to round of ``pp`` micro-batches: four rounds hold a whole one in the middle (what torch's
    runtime keeps of those left out, the tensors it sent, ``dry_run_peak`` adds); where ``pp`` does not divide the
    micro-batches they run whole.
    """
    config = plan.config
    if config.pp == 1:
        return min(num_microbatches, 3)
    if config.schedule is Schedule.ONE_F_ONE_B:
        return min(num_microbatches, max(config.pp, config.pp - pp_rank + 3))
    if config.schedule is Schedule.GPIPE or num_microbatches % config.pp:
        return num_microbatches
    return min(num_microbatches, 4 * config.pp)


def fewest_microbatches(config: ParallelConfig, num_microbatches: int) -> int:
    """How many micro-batches the schedule takes at least, of so many."""
    if num_microbatches % config.pp and config.schedule is Schedule.INTERLEAVED:
        return num_microbatches
    return min(num_microbatches, 2 * config.pp if config.schedule is Schedule.DUALPIPEV else config.pp)


def shortened(plan: Plan, num_microbatches: int) -> Plan:
    """The plan with at most so many micro-batches a data rank."""
    shares = tuple(min(share, num_microbatches) for share in plan.micro_batches_per_data_rank)
    batch = sum(shares) * plan.config.micro_batch_size
    return replace(plan, micro_batches_per_data_rank=shares, workload=replace(plan.workload, global_batch_size=batch))
