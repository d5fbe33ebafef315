"""How a published run was split, from its columns: degrees, sharding, schedule, recompute.

What a source does not say is filled with what its framework does by default, and said in the notes.
"""

from __future__ import annotations

import re

from meshwright.cost_models.published_hardware import cluster_named, cluster_of
from meshwright.cost_models.published_rows import Row, Skip
from meshwright.cost_models.strategy import ParallelConfig, Recompute, Schedule
from meshwright.cost_models.workload import Workload
from meshwright.profiler.model import ModelSpec

# targets whose tensor parallelism cuts activations by sequence too, where a source does not say: nanotron's and
# torchtitan's default mode, what Megatron-Core's recipes turn on with tp > 1
SEQUENCE_PARALLEL = ("nanotron", "megatron-bridge", "nemo", "torchtitan", "meshwright")

NO_RECOMPUTE = "recompute not published: none assumed"


def config_of(row: Row, model: ModelSpec, workload: Workload, target: str) -> tuple[ParallelConfig, tuple[str, ...]]:
    """How the run was split, and what had to be assumed.

    A blank recompute is none: the default of every target here, and what Megatron-Bridge's performance recipes for
    dense models do (``scripts/performance/configs/llama`` of NVIDIA-NeMo/Megatron-Bridge: all but two of some forty
    presets; those with FSDP move activations of some layers to the host: ``target_megatron.MEGATRON_BRIDGE_OFFLOAD``).
    Raises ``Skip`` where degrees, batch or layers contradict each other.
    """
    tp, pp, dp, cp = (row.integer(name, 1) for name in ("tp", "pp", "dp", "cp"))
    if tp * pp * dp * cp != row.integer("num_gpus"):
        raise Skip(f"tp*cp*pp*dp={tp * pp * dp * cp} is not num_gpus={row.integer('num_gpus')}")
    misprinted = _is_misprinted(row)
    if misprinted:
        pp, dp = 4, tp * pp * dp // 4
    ep, etp, expert_notes = _experts(row, model, tp, dp * cp)
    micro, micro_notes = (1, (MISPRINTED,)) if misprinted else _micro_batch(row, dp, pp, target)
    if workload.global_batch_size % (dp * micro):
        raise Skip(f"dp*micro_batch={dp * micro} does not divide global_batch={workload.global_batch_size}")
    schedule, vpp, schedule_notes = _schedule(row, pp, target, model.num_layers)
    stage, shard = _sharding(row, dp * cp)
    sharding_notes: tuple[str, ...] = ()
    if target == "megatron-deepspeed" and row.number("zero_stage") is None and _exceeds(row, model, tp * pp):
        stage, shard, sharding_notes = 1, dp * cp, (UNSHARDED_EXCEEDS,)
    if target.startswith("torchtitan") and pp > 1 and stage > 1:
        stage = 1  # parallelize_llama.py: with pp weights stay gathered; torch reduces with the last micro-batch
    sequence_parallel, sp_notes = _sequence_parallel(row, tp, target)
    recompute, recompute_notes = _recompute(row)
    config = ParallelConfig(
        tp=tp,
        cp=cp,
        pp=pp,
        dp=dp,
        ep=ep,
        etp=etp,
        vpp=vpp,
        cp_ring=cp,
        dp_shard=shard,
        micro_batch_size=micro,
        zero_stage=stage,
        sequence_parallel=sequence_parallel,
        vocab_parallel=tp > 1,
        schedule=schedule,
        recompute=recompute,
    )
    return config, (*recompute_notes, *sp_notes, *micro_notes, *expert_notes, *schedule_notes, *sharding_notes)


# Llama 3 70B on GB300 in MXFP8 and NVFP4 runs with pp 4, five chunks and micro batches of 1 in every recipe and table
# of Megatron-Bridge (scripts/performance/configs/llama; docs/performance-summary-archive.md) but one: that of 26.02.01
# has micro batches of 2 and no chunks there, as its lines with FSDP do, without FSDP
MISPRINTED = "pp 4, vpp 5 and micro batches of 1 as in the recipe: without chunks or FSDP it would not fit"


def _is_misprinted(row: Row) -> bool:
    said = [row.text(name).lower() for name in ("framework", "model", "gpu_type", "precision")]
    patterns = (r"megatron-bridge", r"^llama-?3-70b$", r"gb300", r"mxfp8|nvfp4")
    recipe = all(re.search(pattern, text) for pattern, text in zip(patterns, said, strict=True))
    return recipe and row.integer("tp", 1) == 1 and row.number("vpp") is None and row.number("zero_stage") == 1


def _experts(row: Row, model: ModelSpec, tp: int, data_ranks: int) -> tuple[int, int, tuple[str, ...]]:
    """``ep`` and ``etp``; a blank ``etp`` is ``tp``, as in Megatron without folding, where the ranks allow it.

    A variant in parentheses shares the column of its line, though its pipeline may leave fewer ranks than that.
    """
    if model.moe is None:
        return 1, 1, ()
    ep, notes = row.integer("ep", 1), list[str]()
    if ep > data_ranks * tp and "parenthesised" in row.text("notes").lower():
        notes.append(f"ep {data_ranks * tp}: the {ep} of the line would exceed the ranks of a stage")
        ep = data_ranks * tp
    etp = row.integer("etp", tp if data_ranks % ep == 0 else 1)
    if (data_ranks * tp) % (ep * etp):
        raise Skip(f"ep*etp={ep * etp} does not divide dp*cp*tp={data_ranks * tp}")
    if model.moe.num_experts % ep:
        raise Skip(f"ep={ep} does not divide the {model.moe.num_experts} experts")
    return ep, etp, tuple(notes)


# accumulation steps of a line of Megatron-Bridge's tables, and of its variant in parentheses, which shares all other
# columns but for those that have parentheses too
ACCUMULATION = re.compile(r"published ga=(\d+)(?: \((\d+)\))?")


def _micro_batch(row: Row, dp: int, pp: int, target: str) -> tuple[int, tuple[str, ...]]:
    """Sequences of a micro-batch; torchtitan of 2024 cuts a rank's batch into ``pp`` micro-batches where not told.

    (torchtitan/parallelisms/pipeline_llama.py: ``pipeline_parallel_microbatches or parallel_dims.pp``.)
    """
    notes = row.text("notes").lower()
    accumulates = ACCUMULATION.search(notes)
    if accumulates and accumulates[2] and "parenthesised" in notes:
        share, left = divmod(row.integer("global_batch"), dp * int(accumulates[2]))
        if share and not left and share != row.number("micro_batch"):
            return share, (f"micro batch {share}, by the accumulation published for the variant in parentheses",)
    assumed = re.search(r"microbatch \d+ assumed", notes) or row.number("micro_batch") is None
    share, left = divmod(row.integer("global_batch"), dp * pp)
    if target.startswith("torchtitan") and pp > 1 and assumed and share and not left:
        return share, (f"micro batch not published: {share}, so that there are pp of them, as torchtitan has it",)
    if row.number("micro_batch") is not None:
        return row.integer("micro_batch"), ()
    if row.number("grad_accum") is not None:
        share, left = divmod(row.integer("global_batch"), dp * row.integer("grad_accum"))
        if share and not left:
            return share, ()
    return 1, ("micro batch not published: 1 assumed",)


# what a schedule column says and what stands for it; None: no model
_SCHEDULES: tuple[tuple[str, Schedule | None], ...] = (
    (r"zb-?2p|dualpipe(?!v)|v-?half|v-?min|v-?zb|custom|afab.*\+", None),
    (r"dualpipev", Schedule.DUALPIPEV),
    (r"\bzb-?v\b", Schedule.ZBV),
    (r"\bzb", Schedule.ZB_H1),
    (r"gpipe|\bafab\b", Schedule.GPIPE),
)


# chunks of a rank in NVIDIA's own recipes for these models (recipes of NVIDIA/NeMo and of NVIDIA-NeMo/Megatron-Bridge)
_RECIPE_CHUNKS: tuple[tuple[str, int], ...] = (
    (r"nemotron-?4-340b", 12),
    (r"llama-?3(\.\d)?-70b", 5),
    (r"llama-?3(\.\d)?-405b", 8),
    (r"gpt-?3-175b", 12),
    (r"mixtral-?8x22b", 7),  # a layer a chunk, whatever pp
    (r"mixtral-?8x22b", 14),
)


def _schedule(row: Row, pp: int, target: str, num_layers: int) -> tuple[Schedule, int, tuple[str, ...]]:
    """Schedule and chunks of each rank; chunks that are not published are the least that the schedule needs.

    Of a model that NVIDIA has a recipe for they are the recipe's, where layers, embedding and head fill them.
    """
    said = row.text("schedule").lower()
    if pp == 1:
        return Schedule.ONE_F_ONE_B, 1, ()
    if target == "llama3-4d" and (num_layers + 2) % pp == 0:
        # a layer is left out of the first and the last stage, which leaves the embedding alone on the first chunk
        return Schedule.INTERLEAVED, (num_layers + 2) // pp, ("vpp not published: a layer a chunk",)
    for pattern, schedule in _SCHEDULES:
        if re.search(pattern, said):
            if schedule is None:
                raise Skip(f"no model of the schedule {row.text('schedule')}")
            return schedule, 2 if schedule in (Schedule.ZBV, Schedule.DUALPIPEV) else 1, ()
    notes: tuple[str, ...] = ()
    vpp = row.integer("vpp", 1)
    if row.number("vpp") is None:
        # "1f1b/interleaved" names both; "interleaved" alone is two chunks at least
        vpp = 2 if re.search(r"interleaved|1f1b-i\b", said) and "1f1b/" not in said else 1
        for model, chunks in _RECIPE_CHUNKS if target.startswith(("megatron-bridge", "nemo")) else ():
            if re.search(model, row.text("model").lower()) and 0 in (
                num_layers % (pp * chunks),
                (num_layers + 2) % (pp * chunks),
            ):
                vpp = chunks
        notes = (f"vpp not published: {vpp} assumed",)
    return (Schedule.INTERLEAVED if vpp > 1 else Schedule.ONE_F_ONE_B), vpp, notes


# DeepSpeed's pipelines allow ZeRO 1 at most (deepspeed/runtime/pipe/engine.py)
UNSHARDED_EXCEEDS = (
    "ZeRO not published: stage 1, since weights, gradients and states exceed the device's memory without"
)


def _exceeds(row: Row, model: ModelSpec, model_ranks: int) -> bool:
    """Whether float16 weights and gradients and float32 master weights and states, 16 bytes each, exceed a device."""
    device = cluster_named(cluster_of(row)[0]).device
    return 16.0 * model.params / model_ranks > device.memory_bytes


def _sharding(row: Row, ranks: int) -> tuple[int, int]:
    """``zero_stage`` and the ranks of a shard group; a group of one shards nothing."""
    stage = int(row.number("zero_stage") or 0)
    if stage not in (0, 1, 2, 3):
        raise Skip(f"zero_stage {stage} is not 0 to 3")
    said, notes = row.text("optimizer_sharding").lower(), row.text("notes").lower()
    shard = ranks
    group = re.search(r"over (\d+) gpus|fsdp (\d+)$", said)
    group = group or re.search(r"fsdp (?:sharding )?group(?: =)? (\d+)", notes)
    if group:
        wanted = int(next(text for text in group.groups() if text))
        shard = wanted if wanted > 1 and ranks % wanted == 0 else ranks
    elif "hsdp" in said:
        node = row.integer("gpus_per_node", 8)
        shard = node if ranks % node == 0 else ranks
    return (stage, shard) if stage and shard > 1 else (0, 1)


def _sequence_parallel(row: Row, tp: int, target: str) -> tuple[bool, tuple[str, ...]]:
    said = row.text("sp").lower()
    if tp == 1:
        return False, ()
    if said:
        return said in ("true", "1", "1.0", "yes"), ()
    own = target.startswith(SEQUENCE_PARALLEL)  # versions of them too
    return own, (f"sequence parallelism not published: {'on' if own else 'off'}, as {target} has it",)


# vTrain's runs on one node: their recompute is its simulator's input, not the runs'. What was measured fits none: with
# full recompute matmuls would take 0.79 of the seconds of the A100's measured curve (a fit over tp, hidden size and
# micro batch, the rest free), 320 of 312 TFLOP/s at 8,192 tokens and hidden size 2048; without they take 1.0 to 1.1. A
# block costs the same in pipelines of one stage to four, so that no stage differs. The simulator repeats nothing on the
# last stage (VIA-Research/vTrain, src/predictor.py: create_layer_graph). Runs on several nodes need recompute to fit.
SIMULATED = re.compile(r"^\[single-node\] recompute=full .*taken from config")
SIMULATED_RECOMPUTE = "recompute published as its simulator's input: none assumed, which the measured steps fit"


# the 530B model at tp 8, pp 35 with three chunks each is that of arXiv 2205.05198, table 3, where it runs with
# selective recompute; without it scores alone exceed 80 GB
MT_NLG_RECOMPUTE = "recompute not published: selective, as in Megatron-LM's own runs of this model"

# "selective" in fms-fsdp is a share of blocks recomputed whole (fms_fsdp/config: selective_checkpointing), and hardware
# over model FLOPs say which: 4/3 is all of them
FULL_AGAIN = 1.2
WHOLE_BLOCKS = "selective recompute repeats whole blocks here, nearly all by the published hardware FLOPs"


def _recompute(row: Row) -> tuple[Recompute, tuple[str, ...]]:
    said, framework, notes = (row.text(name).lower() for name in ("recompute", "framework", "notes"))
    if not said and "megatron-lm" in framework and re.search(r"\b530b\b", row.text("model").lower()):
        return Recompute.SELECTIVE, (MT_NLG_RECOMPUTE,)
    if not said:
        return Recompute.NONE, (NO_RECOMPUTE,)
    mfu, hardware = row.number("mfu_pct"), re.search(r"\bhfu (\d+)", notes)
    if said == "selective" and "fms-fsdp" in framework and mfu and hardware and float(hardware[1]) / mfu > FULL_AGAIN:
        return Recompute.FULL, (WHOLE_BLOCKS,)
    if SIMULATED.search(row.text("notes")):
        return Recompute.NONE, (SIMULATED_RECOMPUTE,)
    known = {"none": Recompute.NONE, "false": Recompute.NONE, "full": Recompute.FULL, "true": Recompute.FULL}
    return known.get(said, Recompute.SELECTIVE), ()
