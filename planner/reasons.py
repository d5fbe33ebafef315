"""Rejections in words: a sentence for each reason, and for one config the rule it breaks with its numbers."""

from __future__ import annotations

from meshwright.cost_models.framework import Framework, supported
from meshwright.cost_models.strategy import (
    LOOPED,
    REASONS,
    SPLIT_BACKWARD,
    V_SHAPED,
    ConfigBatch,
    ParallelConfig,
    Reason,
    Recompute,
    Schedule,
    legal,
    rank_tokens,
    sequence_piece,
)
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import AttentionLayer, MoeLayer
from meshwright.profiler.model import ModelSpec

SENTENCES: dict[Reason, str] = {
    Reason.FIXED: "another value was asked for with --fix",
    Reason.NOT_IN_FRAMEWORK: "the target framework does not run it",
    Reason.HEADS: "tp times cp_ulysses does not divide the attention heads",
    Reason.KV_HEADS: "neither tp divides the key/value heads nor the reverse",
    Reason.FFN: "tp does not divide the feed-forward width",
    Reason.EXPERTS: "the experts or their tokens do not divide, or need sequence_parallel",
    Reason.SEQUENCE: "the sequence does not divide",
    Reason.LAYERS: "fewer layers than pipeline chunks",
    Reason.SCHEDULE: "the schedule does not run with these chunks",
    Reason.BATCH: "the global batch does not divide over dp",
    Reason.OUT_OF_MEMORY: "predicted memory is above what a device offers",
    Reason.MEMORY_MARGIN: "predicted memory fits, but not with the margin",
}


def why_illegal(config: ParallelConfig, model: ModelSpec, workload: Workload, framework: Framework) -> str | None:
    """The first rule that a config breaks, as a sentence with the numbers; ``None`` for a legal config.

    The order is that of ``planner.space``: ``strategy.legal``'s rules, then canonical form, then the target's rules.
    """
    batch = ConfigBatch.from_configs([config])
    verdict = int(legal(batch, model, workload)[0])
    if verdict >= 0:
        return _broken_rule(REASONS[verdict], config, model, workload)
    idle = _without_effect(config)
    if idle:
        return idle
    return None if supported(batch, framework, model, workload)[0] else _unsupported(config, model, workload, framework)


def _broken_rule(reason: Reason, config: ParallelConfig, model: ModelSpec, workload: Workload) -> str:
    counts, ranks = model.head_counts, config.tp * config.cp_ulysses
    if reason is Reason.HEADS:
        heads = next(heads for heads, _ in counts if heads % ranks)
        if config.cp_ulysses > 1:
            return f"tp={config.tp} times cp_ulysses={config.cp_ulysses} does not divide {heads} heads"
        return f"tp={config.tp} does not divide {heads} heads"
    if reason is Reason.KV_HEADS:
        kv_heads = next(count for _, count in counts if count % config.tp and config.tp % count)
        return f"tp={config.tp} does not divide {kv_heads} key/value heads, nor they tp"
    if reason is Reason.FFN:
        return f"tp={config.tp} does not divide the feed-forward width {model.ffn_size}"
    if reason is Reason.EXPERTS:
        return _broken_experts(config, model, workload)
    if reason is Reason.SEQUENCE:
        return _broken_sequence(config, workload)
    if reason is Reason.LAYERS:
        chunks = f" times vpp={config.vpp}" if config.vpp > 1 else ""
        return (
            f"pp={config.pp}{chunks} cuts the model into {config.num_stages} pieces, it has {model.num_layers} layers"
        )
    if reason is Reason.SCHEDULE:
        return _broken_schedule(config)
    return (
        f"dp={config.dp} times micro_batch_size={config.micro_batch_size} does not divide "
        f"global_batch_size={workload.global_batch_size}"
    )


def _broken_experts(config: ParallelConfig, model: ModelSpec, workload: Workload) -> str:
    layers = [layer for layer in model.layers() if isinstance(layer, MoeLayer)]
    if not layers:
        return f"ep={config.ep} and etp={config.etp} split experts, and {model.name} has none"
    for layer in layers:
        if layer.num_experts % config.ep:
            return f"ep={config.ep} does not divide {layer.num_experts} experts"
        if layer.expert_ffn_size % config.etp:
            return f"etp={config.etp} does not divide the experts' width {layer.expert_ffn_size}"
    if config.tp > 1 and config.etp != config.tp and not config.sequence_parallel:
        return f"experts with etp={config.etp} unlike tp={config.tp} need sequence_parallel"
    batch = ConfigBatch.from_configs([config])
    tokens = int(rank_tokens(batch, workload)[0])
    if tokens % config.ep_chunks:
        return f"ep_chunks={config.ep_chunks} does not divide the {tokens} tokens that a rank sends to experts"
    piece = int(sequence_piece(batch, workload, model.attention.causal)[0])
    group = max(layer.group_tokens for layer in layers)
    cut = f", cut by tp={config.tp}" if config.sequence_parallel else ""
    return (
        f"experts have a capacity for each {group} neighbouring tokens, and with cp={config.cp} a rank holds {piece} "
        f"of a sequence together{cut}"
    )


def _broken_sequence(config: ParallelConfig, workload: Workload) -> str:
    seq_len = workload.seq_len
    if seq_len % config.cp:
        return f"cp={config.cp} does not divide seq_len={seq_len}"
    if config.cp_ring > 1 and seq_len % (2 * config.cp):
        return f"a causal ring over cp={config.cp} needs seq_len to be a multiple of {2 * config.cp}, found {seq_len}"
    if config.tp == 1:
        return "sequence_parallel needs tp above 1"
    return f"sequence_parallel needs tp={config.tp} to divide seq_len/cp={seq_len // config.cp}"


def _broken_schedule(config: ParallelConfig) -> str:
    if config.pp == 1:
        return f"schedule={config.schedule.value} and vpp={config.vpp} have no effect with pp=1"
    wanted = "vpp=2 or more" if config.schedule in LOOPED else "vpp=2" if config.schedule in V_SHAPED else "vpp=1"
    return f"schedule={config.schedule.value} runs with {wanted}, found vpp={config.vpp}"


def _without_effect(config: ParallelConfig) -> str | None:
    group = config.dp * config.cp
    if config.vocab_parallel and config.tp == 1:
        return "vocab_parallel has no effect with tp=1"
    if config.zero_stage and group == 1:
        return f"zero_stage={config.zero_stage} shards over dp*cp, which is 1 here"
    if config.zero_stage and config.dp_shard == 1:
        return f"zero_stage={config.zero_stage} with dp_shard=1 shards nothing: dp_shard must be above 1, up to {group}"
    if not config.zero_stage and config.dp_shard > 1:
        return f"dp_shard={config.dp_shard} has no effect with zero_stage=0"
    return None


def _unsupported(config: ParallelConfig, model: ModelSpec, workload: Workload, framework: Framework) -> str:
    name = framework.name
    if config.pp > 1 and config.schedule not in framework.schedules:
        known = ", ".join(schedule.value for schedule in framework.schedules)
        return f"{name} does not run schedule={config.schedule.value}: it runs {known}"
    if config.zero_stage not in framework.zero_stages:
        known = ", ".join(str(stage) for stage in framework.zero_stages)
        return f"{name} does not run zero_stage={config.zero_stage}: it runs {known}"
    if config.recompute not in framework.recomputes:
        known = ", ".join(recompute.value for recompute in framework.recomputes)
        return f"{name} does not run recompute={config.recompute.value}: it runs {known}"
    if config.cp > 1 and not framework.context_parallel:
        return f"{name} does not run context parallelism, found cp={config.cp}"
    if config.cp_ring > 1 and not framework.context.ring:
        return f"{name} exchanges heads and runs no ring, found cp_ring={config.cp_ring}"
    if config.cp_ulysses > 1 and not framework.context.ulysses:
        return f"{name} runs a ring and exchanges no heads, found cp_ulysses={config.cp_ulysses}"
    windows = any(isinstance(layer, AttentionLayer) and layer.window for layer in model.layers())
    if config.cp_ring > 1 and windows and not framework.context.ring_windows:
        return f"{name} runs no ring over sliding windows, found cp_ring={config.cp_ring}: take cp_ulysses"
    if config.ep_chunks not in framework.expert_chunks or (config.ep_chunks > 1 and config.ep == 1):
        known = ", ".join(str(chunks) for chunks in framework.expert_chunks)
        return f"with ep={config.ep}, {name} does not run ep_chunks={config.ep_chunks}: it runs {known} where ep > 1"
    if config.ep * config.etp > 1 and not framework.expert_parallel:
        return f"{name} does not run expert parallelism, found ep={config.ep} and etp={config.etp}"
    if config.zero_stage and config.dp_shard != config.dp * config.cp and not framework.partial_sharding:
        return f"{name} shards over all of dp*cp={config.dp * config.cp}, found dp_shard={config.dp_shard}"
    if config.vocab_parallel != (framework.vocab_parallel and config.tp > 1):
        return f"with tp={config.tp}, {name} runs vocab_parallel {'on' if framework.vocab_parallel else 'off'} only"
    if config.tp > 1 and model.moe is not None and not framework.tensor_parallel_moe:
        return f"{name} does not cut a model with experts by tp, found tp={config.tp}"
    return _unsupported_schedule(config, config.num_microbatches(workload.global_batch_size), framework)


def _unsupported_schedule(config: ParallelConfig, number: int, framework: Framework) -> str:
    schedule = config.schedule
    if schedule in SPLIT_BACKWARD and config.recompute is not Recompute.NONE and not framework.defers_products:
        return (
            f"{schedule.value} splits backward, in which torch would recompute a block once for each of its weights: "
            f"it runs recompute=none only, found {config.recompute.value}"
        )
    if schedule in SPLIT_BACKWARD and config.zero_stage >= 2:
        return (
            f"{schedule.value} works out gradients of weights for a whole stage at a time: it runs zero_stage 0 and 1, "
            f"found {config.zero_stage}"
        )
    if schedule is Schedule.DUALPIPEV and number < 2 * config.pp:
        return (
            f"dualpipev with pp={config.pp} needs at least {2 * config.pp} micro-batches on each data rank, "
            f"found {number}"
        )
    if schedule is Schedule.ONE_F_ONE_B and number < config.pp:
        return f"1f1b with pp={config.pp} needs at least {config.pp} micro-batches on each data rank, found {number}"
    if schedule in (Schedule.INTERLEAVED, Schedule.ZB_H1):
        rounds = max(1, number // config.pp)
        return f"{schedule.value} over pp={config.pp} runs {rounds} rounds, which must divide {number} micro-batches"
    return f"{framework.name} does not run {config.describe()} with {number} micro-batches"
