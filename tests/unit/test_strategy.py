from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright import InputError
from meshwright.cost_models.strategy import (
    REASONS,
    ConfigBatch,
    ParallelConfig,
    Reason,
    Recompute,
    Schedule,
    even_stages,
    legal,
)
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload
from meshwright.planner.reasons import SENTENCES, why_illegal
from meshwright.profiler.model import load_model

LLAMA = load_model("llama3-8b")  # 32 layers, 32 heads, 8 key/value heads, feed-forward 14336
MIXTRAL = load_model("mixtral-8x7b")  # 32 layers, 32 heads, 8 key/value heads, 8 experts of width 14336
WORKLOAD = Workload(seq_len=4096, global_batch_size=64)
ALL = replace(
    MESHWRIGHT,
    schedules=tuple(Schedule),
    context_parallel=True,
    expert_parallel=True,
    partial_sharding=True,
    tensor_parallel_moe=True,
)


def test_degrees_of_a_config() -> None:
    config = ParallelConfig(tp=4, cp=2, cp_ring=2, pp=3, dp=8, ep=4, etp=2, vpp=2, schedule=Schedule.INTERLEAVED)
    assert (config.world_size, config.edp, config.num_stages) == (192, 8, 6)
    assert config.num_microbatches(64) == 8
    with pytest.raises(InputError, match=r"dp=8 times micro_batch_size=1 is 8, which does not divide .*=30"):
        config.num_microbatches(30)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tp": 0}, "tp must be at least 1, found 0"),
        ({"micro_batch_size": -2}, "micro_batch_size must be at least 1"),
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, found 4"),
        ({"cp": 4, "cp_ring": 2}, "cp_ring=2 times cp_ulysses=1 must be cp=4"),
        ({"dp": 4, "dp_shard": 3}, "dp_shard=3 must divide dp\\*cp=4"),
        ({"tp": 2, "ep": 4}, "ep\\*etp=4 must divide dp\\*cp\\*tp=2"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ParallelConfig(**fields)  # type: ignore[arg-type]


def test_describe() -> None:
    assert ParallelConfig().describe() == "mbs1"
    config = ParallelConfig(
        tp=8,
        pp=4,
        dp=2,
        dp_shard=2,
        zero_stage=1,
        micro_batch_size=2,
        sequence_parallel=True,
        recompute=Recompute.FULL,
    )
    assert config.describe() == "tp8 pp4 dp2 1f1b zero1 mbs2 sp recompute-full"


def test_even_stages_spare_the_first_and_then_the_last() -> None:
    assert even_stages(8, 1) == (8,)
    assert even_stages(8, 4) == (2, 2, 2, 2)
    assert even_stages(9, 4) == (2, 3, 2, 2)
    assert even_stages(10, 4) == (2, 3, 3, 2)
    assert even_stages(11, 4) == (3, 3, 3, 2)
    assert even_stages(3, 2) == (2, 1)
    with pytest.raises(InputError, match="3 layers cannot fill 4 pipeline stages"):
        even_stages(3, 4)


def test_a_batch_gives_back_its_configs() -> None:
    configs = [
        ParallelConfig(),
        ParallelConfig(tp=2, sequence_parallel=True, vocab_parallel=True, recompute=Recompute.SELECTIVE),
        ParallelConfig(pp=2, vpp=3, schedule=Schedule.INTERLEAVED, dp=4, dp_shard=2, zero_stage=3),
    ]
    batch = ConfigBatch.from_configs(configs)
    assert list(batch.configs()) == configs
    assert batch.take(batch.pp > 1).config(0) == configs[2]
    assert list(ConfigBatch.concatenate([batch, batch]).configs()) == configs * 2
    assert batch.num_stages.tolist() == [1, 1, 6]
    assert batch.edp.tolist() == [1, 2, 4]
    assert list(ConfigBatch.from_configs([]).configs()) == []


# one row for each rule: the config, the model's workload, the reason, and the sentence with the numbers
BROKEN = [
    (ParallelConfig(tp=3), LLAMA, Reason.HEADS, "tp=3 does not divide 32 heads"),
    (
        ParallelConfig(tp=16, cp=4, cp_ulysses=4),
        LLAMA,
        Reason.HEADS,
        "tp=16 times cp_ulysses=4 does not divide 32 heads",
    ),
    (ParallelConfig(ep=2, dp=2), LLAMA, Reason.EXPERTS, "split experts, and llama3-8b has none"),
    (ParallelConfig(ep=16, dp=16), MIXTRAL, Reason.EXPERTS, "ep=16 does not divide 8 experts"),
    (ParallelConfig(etp=3, dp=3), MIXTRAL, Reason.EXPERTS, "etp=3 does not divide the experts' width 14336"),
    (ParallelConfig(tp=2, ep=2), MIXTRAL, Reason.EXPERTS, "etp=1 unlike tp=2 need sequence_parallel"),
    (
        ParallelConfig(ep=2, dp=2, ep_chunks=3),
        MIXTRAL,
        Reason.EXPERTS,
        "ep_chunks=3 does not divide the 4096 tokens that a rank sends to experts",
    ),
    (ParallelConfig(cp=3, cp_ring=3), LLAMA, Reason.SEQUENCE, "cp=3 does not divide seq_len=4096"),
    (
        ParallelConfig(cp=4096, cp_ring=4096),
        LLAMA,
        Reason.SEQUENCE,
        "cp=4096 needs seq_len to be a multiple of 8192, found 4096",
    ),
    (ParallelConfig(sequence_parallel=True), LLAMA, Reason.SEQUENCE, "sequence_parallel needs tp above 1"),
    (
        ParallelConfig(tp=32, cp=256, cp_ring=256, sequence_parallel=True),
        LLAMA,
        Reason.SEQUENCE,
        "sequence_parallel needs tp=32 to divide seq_len/cp=16",
    ),
    (ParallelConfig(pp=33), LLAMA, Reason.LAYERS, "pp=33 cuts the model into 33 pieces, it has 32 layers"),
    (
        ParallelConfig(pp=8, vpp=5, schedule=Schedule.INTERLEAVED),
        LLAMA,
        Reason.LAYERS,
        "pp=8 times vpp=5 cuts the model into 40 pieces, it has 32 layers",
    ),
    (
        ParallelConfig(pp=2, schedule=Schedule.INTERLEAVED),
        LLAMA,
        Reason.SCHEDULE,
        "interleaved runs with vpp=2 or more, found vpp=1",
    ),
    (ParallelConfig(pp=2, vpp=2), LLAMA, Reason.SCHEDULE, "1f1b runs with vpp=1, found vpp=2"),
    (ParallelConfig(pp=2, vpp=3, schedule=Schedule.ZBV), LLAMA, Reason.SCHEDULE, "zbv runs with vpp=2, found vpp=3"),
    (ParallelConfig(schedule=Schedule.GPIPE), LLAMA, Reason.SCHEDULE, "have no effect with pp=1"),
    (ParallelConfig(dp=3), LLAMA, Reason.BATCH, "dp=3 times micro_batch_size=1 does not divide global_batch_size=64"),
]


@pytest.mark.parametrize(("config", "model", "reason", "sentence"), BROKEN, ids=[row[3] for row in BROKEN])
def test_each_rule_is_broken_with_its_reason_and_its_numbers(
    config: ParallelConfig, model: object, reason: Reason, sentence: str
) -> None:
    spec = MIXTRAL if model is MIXTRAL else LLAMA
    verdict = int(legal(ConfigBatch.from_configs([config]), spec, WORKLOAD)[0])
    assert REASONS[verdict] is reason
    found = why_illegal(config, spec, WORKLOAD, ALL)
    assert found is not None and found.endswith(sentence)


def test_groups_with_a_capacity_lie_inside_what_a_rank_holds_of_a_sequence() -> None:
    assert MIXTRAL.moe is not None
    moe = replace(MIXTRAL.moe, capacity_factor=1.0, group_tokens=512)
    layers = tuple(moe if layer == MIXTRAL.moe else layer for layer in MIXTRAL.blocks[1].layers)
    spec = replace(MIXTRAL, blocks=(MIXTRAL.blocks[0], replace(MIXTRAL.blocks[1], layers=layers), MIXTRAL.blocks[2]))
    ring, heads = ParallelConfig(cp=8, cp_ring=8), ParallelConfig(cp=8, cp_ulysses=8)  # halves of 512, or 512 at once
    fine = ParallelConfig(cp=4, cp_ring=4)
    cut = ParallelConfig(cp=4, cp_ring=4, tp=4, etp=4, sequence_parallel=True, vocab_parallel=True)
    verdict = legal(ConfigBatch.from_configs([ring, heads, fine, cut]), spec, WORKLOAD)
    experts = REASONS.index(Reason.EXPERTS)
    assert verdict.tolist() == [experts, -1, -1, experts]
    assert why_illegal(ring, spec, WORKLOAD, ALL) == (
        "experts have a capacity for each 512 neighbouring tokens, "
        "and with cp=8 a rank holds 256 of a sequence together"
    )
    said = why_illegal(cut, spec, WORKLOAD, ALL)
    assert said is not None and said.endswith("with cp=4 a rank holds 512 of a sequence together, cut by tp=4")


def test_tp_and_kv_heads_divide_one_way_or_the_other() -> None:
    gqa = replace(LLAMA.attention, num_heads=24, num_kv_heads=6)
    layers = tuple(gqa if layer == LLAMA.attention else layer for layer in LLAMA.blocks[1].layers)
    model = replace(LLAMA, blocks=(LLAMA.blocks[0], replace(LLAMA.blocks[1], layers=layers), LLAMA.blocks[2]))
    verdicts = legal(ConfigBatch.from_configs([ParallelConfig(tp=tp) for tp in (2, 3, 4, 6, 8, 12)]), model, WORKLOAD)
    # 14336 = 2**11 * 7 : 3, 6 and 12 also break FFN; 4 and 8 neither divide 6 nor are divided by it
    words = [REASONS[verdict] if verdict >= 0 else None for verdict in verdicts]
    assert words == [None, Reason.FFN, Reason.KV_HEADS, Reason.FFN, Reason.KV_HEADS, Reason.FFN]
    assert why_illegal(ParallelConfig(tp=4, vocab_parallel=True), model, WORKLOAD, ALL) == (
        "tp=4 does not divide 6 key/value heads, nor they tp"
    )
    assert why_illegal(ParallelConfig(tp=3, vocab_parallel=True), model, WORKLOAD, ALL) == (
        "tp=3 does not divide the feed-forward width 14336"
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ParallelConfig(vocab_parallel=True), "vocab_parallel has no effect with tp=1"),
        (ParallelConfig(zero_stage=1), "zero_stage=1 shards over dp*cp, which is 1 here"),
        (ParallelConfig(zero_stage=2, dp=4), "dp_shard must be above 1, up to 4"),
        (ParallelConfig(dp=4, dp_shard=2), "dp_shard=2 has no effect with zero_stage=0"),
    ],
)
def test_what_has_no_effect_is_said(config: ParallelConfig, sentence: str) -> None:
    assert sentence in (why_illegal(config, LLAMA, WORKLOAD, ALL) or "")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ParallelConfig(pp=2, vpp=2, schedule=Schedule.ZBV), None),
        (ParallelConfig(pp=2, vpp=2, schedule=Schedule.ZBV, recompute=Recompute.FULL), None),
        (
            ParallelConfig(pp=2, dp=2, schedule=Schedule.ZB_H1, zero_stage=3, dp_shard=2),
            "zb-h1 works out gradients of weights for a whole stage at a time: it runs zero_stage 0 and 1, found 3",
        ),
        (
            ParallelConfig(pp=8, dp=8, vpp=2, schedule=Schedule.DUALPIPEV),
            "dualpipev with pp=8 needs at least 16 micro-batches on each data rank, found 8",
        ),
        (ParallelConfig(cp=2, cp_ring=2), None),
        (ParallelConfig(ep_chunks=2), "does not run ep_chunks=2: it runs 1, 2, 4 where ep > 1"),
        (ParallelConfig(dp=4, dp_shard=2, zero_stage=3), "shards over all of dp*cp=4, found dp_shard=2"),
        (ParallelConfig(tp=2), "with tp=2, meshwright runs vocab_parallel on only"),
        (ParallelConfig(pp=16, dp=8), "1f1b with pp=16 needs at least 16 micro-batches on each data rank, found 8"),
        (
            ParallelConfig(pp=3, dp=8, vpp=2, schedule=Schedule.INTERLEAVED, micro_batch_size=1),
            None,  # 8 micro-batches over 3 stages: 2 rounds, and 2 divides 8
        ),
        (
            ParallelConfig(pp=4, dp=4, vpp=2, schedule=Schedule.INTERLEAVED, micro_batch_size=1),
            None,
        ),
        (
            ParallelConfig(pp=5, dp=4, vpp=2, schedule=Schedule.INTERLEAVED, micro_batch_size=1),
            "interleaved over pp=5 runs 3 rounds, which must divide 16 micro-batches",
        ),
        (
            ParallelConfig(pp=5, dp=4, schedule=Schedule.ZB_H1, micro_batch_size=1),
            "zb-h1 over pp=5 runs 3 rounds, which must divide 16 micro-batches",
        ),
    ],
)
def test_what_the_target_does_not_run_is_said(config: ParallelConfig, sentence: str | None) -> None:
    found = why_illegal(config, LLAMA, WORKLOAD, MESHWRIGHT)
    assert found is None if sentence is None else sentence in (found or "")


def test_a_schedule_that_the_target_lacks_is_said() -> None:
    config = ParallelConfig(pp=2, vpp=2, schedule=Schedule.ZBV)
    found = why_illegal(config, LLAMA, WORKLOAD, framework_named("megatron-bridge"))
    assert found == "megatron-bridge does not run schedule=zbv: it runs 1f1b, interleaved"


def test_recompute_under_torchs_own_split_is_said() -> None:
    config = ParallelConfig(pp=2, vpp=2, schedule=Schedule.ZBV, recompute=Recompute.FULL)
    found = why_illegal(config, LLAMA, WORKLOAD, framework_named("torchtitan"))
    assert found == (
        "zbv splits backward, in which torch would recompute a block once for each of its weights: "
        "it runs recompute=none only, found full"
    )


def test_every_reason_has_a_sentence() -> None:
    assert set(SENTENCES) == set(Reason)
