"""The legal space against a nested-loop enumerator written from the design's rules alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest

from meshwright import InputError
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Reason, Recompute, Schedule
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.workload import Workload
from meshwright.planner import tails as tails_module
from meshwright.planner.constraints import parse_constraints
from meshwright.planner.space import divisors, legal_space
from meshwright.profiler.model import (
    AttentionKind,
    AttentionLayer,
    Block,
    BlockKind,
    EmbeddingLayer,
    HeadLayer,
    LayerSpec,
    MlpLayer,
    ModelSpec,
    MoeLayer,
    load_model,
)

FIVE = (4, 8, 12, 16, 24, 32, 48, 64)  # devices of problems in which cp, ep, etp and chunks are all above 1 somewhere
LARGE_SPACES = [1, 2, 3, 4, 6, 8, 9, 10, 12, 16, 18, 24, 30, 32, 64]

UNRESTRICTED = replace(
    MESHWRIGHT,
    name="everything",
    schedules=tuple(Schedule),
    recomputes=tuple(Recompute),
    context_parallel=True,
    expert_parallel=True,
    partial_sharding=True,
    tensor_parallel_moe=True,
)


@dataclass(frozen=True)
class Problem:
    world: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    experts: int  # 0: a dense model
    expert_ffn: int
    seq_len: int
    batch: int
    chunks: tuple[int, ...] = (1,)  # of the expert exchange, that the target runs
    group: int = 0  # tokens that share a capacity
    dense_ffn: int = 0  # of a first layer without experts

    def model(self) -> ModelSpec:
        attention = AttentionLayer(
            attention_kind=AttentionKind.GQA,
            hidden=64,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=8,
            value_head_dim=8,
        )
        layers: list[LayerSpec] = [attention]
        if self.ffn:
            layers.append(MlpLayer(hidden=64, ffn_size=self.ffn))
        if self.experts:
            layers.append(
                MoeLayer(
                    hidden=64,
                    num_experts=self.experts,
                    top_k=1,
                    expert_ffn_size=self.expert_ffn,
                    capacity_factor=1.0 if self.group else 0.0,
                    group_tokens=self.group,
                )
            )
        first: list[LayerSpec] = [attention, MlpLayer(hidden=64, ffn_size=self.dense_ffn)] if self.dense_ffn else []
        decoder = [Block(kind=BlockKind.DECODER, layers=tuple(layers), repeat=self.layers - bool(first))]
        if first:
            decoder.insert(0, Block(kind=BlockKind.DECODER, layers=tuple(first)))
        embedding = EmbeddingLayer(vocab_size=100, hidden=64)
        return ModelSpec(
            name="test",
            architecture="test",
            max_seq_len=self.seq_len,
            blocks=(
                Block(kind=BlockKind.EMBEDDING, layers=(embedding,)),
                *decoder,
                Block(kind=BlockKind.HEAD, layers=(HeadLayer(hidden=64, vocab_size=100),)),
            ),
        )

    def workload(self) -> Workload:
        return Workload(seq_len=self.seq_len, global_batch_size=self.batch)


def up_to(limit: int) -> range:
    return range(1, limit + 1)


def degrees(p: Problem) -> Iterator[dict[str, object]]:
    for tp in up_to(p.world):
        for cp_ring in up_to(p.world // tp):
            for cp_ulysses in up_to(p.world // tp // cp_ring):
                for pp in up_to(p.world // tp // cp_ring // cp_ulysses):
                    if p.world % (tp * cp_ring * cp_ulysses * pp):
                        continue
                    cp = cp_ring * cp_ulysses
                    dp = p.world // (tp * cp * pp)
                    if p.heads % (tp * cp_ulysses) or (p.kv_heads % tp and tp % p.kv_heads):
                        continue
                    if (p.ffn and p.ffn % tp) or (p.dense_ffn and p.dense_ffn % tp):
                        continue
                    if p.seq_len % cp or (cp_ring > 1 and p.seq_len % (2 * cp)):
                        continue
                    if p.batch % dp or p.layers < pp:
                        continue
                    shared = dp * cp * tp
                    for ep in up_to(shared if p.experts else 1):
                        for etp in up_to(shared if p.experts else 1):
                            if shared % (ep * etp):
                                continue
                            if p.experts and (p.experts % ep or p.expert_ffn % etp):
                                continue
                            yield {
                                "tp": tp,
                                "cp": cp,
                                "pp": pp,
                                "dp": dp,
                                "ep": ep,
                                "etp": etp,
                                "cp_ring": cp_ring,
                                "cp_ulysses": cp_ulysses,
                            }


def schedules(p: Problem, pp: int, runs: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    if pp == 1:
        yield "1f1b", 1
        return
    for chunks in up_to(p.layers):
        if p.layers < pp * chunks:
            break
        for schedule in runs:
            one_chunk = schedule in ("gpipe", "1f1b", "zb-h1") and chunks == 1
            two_in_a_v = schedule in ("zbv", "dualpipev") and chunks == 2
            if one_chunk or two_in_a_v or (schedule == "interleaved" and chunks >= 2):
                yield schedule, chunks


def enumerate_legal(p: Problem, *, everything: bool) -> set[tuple[object, ...]]:
    """Nested loops over the rules as the design states them; nothing of ``strategy`` or ``space`` is used."""
    found: set[tuple[object, ...]] = set()
    runs = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev")
    for d in degrees(p):
        tp, cp, pp, dp, etp = (int(str(d[name])) for name in ("tp", "cp", "pp", "dp", "etp"))
        for sp in (False, True):
            if sp and (tp == 1 or (p.seq_len // cp) % tp):
                continue
            if p.experts and tp > 1 and etp != tp and not sp:
                continue
            together = p.seq_len // (2 * cp if int(str(d["cp_ring"])) > 1 else cp)  # a causal ring's rank holds halves
            own = p.seq_len // cp // (tp if sp else 1)
            if p.experts and p.group and (together % p.group or own % p.group):
                continue
            for schedule, chunks in schedules(p, pp, runs):
                for size in up_to(p.batch // dp):
                    if p.batch % (dp * size):
                        continue
                    micro_batches = p.batch // (dp * size)
                    if not everything and pp > 1 and schedule == "1f1b" and micro_batches < pp:
                        continue  # torch refuses
                    rounds = max(1, micro_batches // pp)
                    if not everything and schedule in ("interleaved", "zb-h1") and micro_batches % rounds:
                        continue  # torch wants whole rounds
                    if not everything and schedule == "dualpipev" and micro_batches < 2 * pp:
                        continue
                    whole = everything or schedule in ("gpipe", "1f1b", "interleaved")  # backwards, none split
                    for stage in (0, 1, 2, 3):
                        for shard in up_to(dp * cp):
                            sharded = stage > 0 and shard > 1 and dp * cp % shard == 0
                            if not (sharded or (stage == 0 and shard == 1)):
                                continue
                            if sharded and not everything and shard != dp * cp:
                                continue
                            if stage >= 2 and not whole:
                                continue
                            for recompute, parts in product(("none", "selective", "full"), p.chunks):
                                if parts > 1 and (d["ep"] == 1 or (own * size) % parts):
                                    continue
                                found.add(
                                    (
                                        tp,
                                        cp,
                                        pp,
                                        dp,
                                        d["ep"],
                                        etp,
                                        chunks,
                                        d["cp_ring"],
                                        d["cp_ulysses"],
                                        parts,
                                        shard,
                                        size,
                                        stage,
                                        sp,
                                        tp > 1,  # vocab_parallel: both targets split the vocabulary whenever tp > 1
                                        schedule,
                                        recompute,
                                    )
                                )
    return found


def as_set(batch: ConfigBatch) -> set[tuple[object, ...]]:
    names = ConfigBatch.__dataclass_fields__
    columns = {name: getattr(batch, name).tolist() for name in names}
    columns["schedule"] = [list(Schedule)[code].value for code in columns["schedule"]]
    columns["recompute"] = [list(Recompute)[code].value for code in columns["recompute"]]
    return set(zip(*(columns[name] for name in names), strict=True))


def problems(seed: int, count: int, worlds: list[int]) -> list[Problem]:
    draw = random.Random(seed)
    return [
        Problem(
            world=draw.choice(worlds),
            layers=draw.choice([1, 2, 3, 4, 5, 6, 7, 8, 12]),
            heads=(heads := draw.choice([1, 2, 3, 4, 6, 8, 12, 16])),
            kv_heads=draw.choice(divisors(heads)),
            ffn=(ffn := draw.choice([0, 24, 48, 64, 90, 96])),
            experts=draw.choice([2, 3, 4, 6, 8]) if ffn == 0 or draw.random() < 0.4 else 0,
            expert_ffn=draw.choice([6, 8, 12, 16]),
            seq_len=draw.choice([12, 16, 24, 30, 32, 48, 63, 64]),
            batch=draw.choice([1, 2, 3, 4, 6, 8, 12]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("p", problems(1, 50, [1, 2, 3, 4, 5, 6, 8, 9, 12, 15, 16, 24, 32, 36, 48, 64]), ids=str)
def test_space_of_our_executors_equals_nested_loops(p: Problem) -> None:
    found = legal_space(p.model(), p.workload(), p.world, replace(MESHWRIGHT, expert_chunks=p.chunks))
    assert as_set(found.batch) == enumerate_legal(p, everything=False)
    assert len(as_set(found.batch)) == len(found.batch), "a config stands twice"
    assert len(found.batch) + sum(each.count for each in found.rejected) == found.num_candidates


@pytest.mark.parametrize("p", problems(2, 50, LARGE_SPACES), ids=str)
def test_space_of_a_target_that_runs_everything_equals_nested_loops(
    p: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rules in ("runs_pipeline", "combines"):
        monkeypatch.setattr(tails_module, rules, lambda batch, *_: np.ones(len(batch), dtype=np.bool_))
    found = legal_space(p.model(), p.workload(), p.world, replace(UNRESTRICTED, expert_chunks=p.chunks))
    assert as_set(found.batch) == enumerate_legal(p, everything=True)
    assert len(as_set(found.batch)) == len(found.batch), "a config stands twice"
    assert len(found.batch) + sum(each.count for each in found.rejected) == found.num_candidates


def five_dimensional(count: int) -> list[Problem]:
    """Problems with experts in which every dimension can be above 1, some with a dense layer first or capacities."""
    draw = random.Random(3)
    return [
        Problem(
            world=draw.choice(FIVE),
            layers=draw.choice([2, 3, 4]),
            heads=draw.choice([4, 6, 8, 12]),
            kv_heads=2,
            ffn=0,
            experts=draw.choice([4, 6, 8]),
            expert_ffn=draw.choice([6, 8, 12]),
            seq_len=draw.choice([24, 32, 48, 64]),
            batch=draw.choice([2, 4, 6, 8]),
            chunks=draw.choice([(1,), (1, 2), (1, 2, 3), (1, 2, 4)]),
            group=draw.choice([0, 0, 2, 4]),
            dense_ffn=draw.choice([0, 12, 16]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("p", five_dimensional(50), ids=str)
def test_five_dimensional_spaces_equal_nested_loops(p: Problem) -> None:
    everything = replace(UNRESTRICTED, expert_chunks=p.chunks, partial_sharding=False)
    found = legal_space(p.model(), p.workload(), p.world, everything)
    wanted = {config for config in enumerate_legal(p, everything=True) if runs_on_torch(config, p)}
    assert as_set(found.batch) == wanted
    assert found.num_legal == len(found.batch) == len(wanted)
    assert found.num_legal + sum(each.count for each in found.rejected) == found.num_candidates


def runs_on_torch(config: tuple[object, ...], p: Problem) -> bool:
    """What our executors run of what is legal: weights sharded over all data ranks, and schedules as torch has them."""
    values = dict(zip(ConfigBatch.__dataclass_fields__, config, strict=True))
    pp, dp, cp = (int(str(values[name])) for name in ("pp", "dp", "cp"))
    stage, schedule = int(str(values["zero_stage"])), values["schedule"]
    if stage and values["dp_shard"] != dp * cp:
        return False
    if schedule in ("zb-h1", "zbv", "dualpipev") and stage >= 2:
        return False
    micro_batches = p.batch // (dp * int(str(values["micro_batch_size"])))
    if pp > 1 and schedule == "1f1b" and micro_batches < pp:
        return False
    if schedule == "dualpipev" and micro_batches < 2 * pp:
        return False
    return schedule not in ("interleaved", "zb-h1") or micro_batches % max(1, micro_batches // pp) == 0


def test_five_dimensional_problems_have_all_dimensions() -> None:
    unseen = {"tp", "cp_ring", "cp_ulysses", "pp", "dp", "ep", "etp", "ep_chunks"}
    at_once = 0
    for p in five_dimensional(50):
        batch = legal_space(p.model(), p.workload(), p.world, replace(UNRESTRICTED, expert_chunks=p.chunks)).batch
        five = (batch.tp > 1) & (batch.cp > 1) & (batch.pp > 1) & (batch.dp > 1) & (batch.ep > 1)
        at_once += bool(five.any())
        unseen -= {name for name in unseen if (getattr(batch, name) > 1).any()}
    assert not unseen and at_once >= 10


def test_the_problems_reach_every_rule() -> None:
    reasons: set[Reason] = set()
    for p in problems(2, 50, LARGE_SPACES):
        reasons |= {each.reason for each in legal_space(p.model(), p.workload(), p.world, UNRESTRICTED).rejected}
    never = {Reason.FIXED, Reason.SCHEDULE}  # asked for; canonical by construction
    never |= {Reason.OUT_OF_MEMORY, Reason.MEMORY_MARGIN}  # not legality
    assert reasons == set(Reason) - never


SMALL = Problem(
    world=4, layers=3, heads=2, kv_heads=2, ffn=8, experts=0, expert_ffn=0, seq_len=8, batch=2
)  # counted by hand below


def count(reason: Reason, framework: Framework = MESHWRIGHT, **constraints: object) -> int:
    found = legal_space(SMALL.model(), SMALL.workload(), SMALL.world, framework, constraints)
    return sum(each.count for each in found.rejected if each.reason is reason)


def test_candidates_of_a_small_problem_by_hand() -> None:
    # cp = dp = 1 below; 3 recomputes each; on 4 devices (tp, pp) is (1, 4): 6 schedules (interleaved with vpp=2 only),
    # batch 2 splits as 1 or 2: 36. (2, 2): 6 schedules, sp on/off, vocab on/off, 2 sizes: 144. (4, 1): 2*2*2*3 = 24.
    tp_pp = {"cp_ring": 1, "cp_ulysses": 1, "dp": 1}
    found = legal_space(SMALL.model(), SMALL.workload(), 4, UNRESTRICTED, tp_pp)
    assert found.num_candidates - sum(each.count for each in found.rejected if each.reason is Reason.FIXED) == 204


def test_rejections_are_counted_by_hand() -> None:
    # heads 2: tp=4 is out; with cp=1, vocab on and what torch runs: sp on/off, 2 sizes, 3 recomputes = 12
    assert count(Reason.HEADS, tp=4) == 12
    # 3 layers on 4 stages: 6 schedules, 2 sizes, 3 recomputes
    assert count(Reason.LAYERS, pp=4) == 36
    # dp=4 and a batch of 2: zero 0 to 3, 3 recomputes
    assert count(Reason.BATCH, dp=4) == 12
    assert (
        count(Reason.FIXED, tp=4) == count(Reason.FIXED, tp=4, sequence_parallel=True) - 12
    )  # sp off, vocab, sizes, recomputes


def test_constraints_keep_exactly_the_configs_with_those_values() -> None:
    model, workload = load_model("llama3-8b"), Workload(seq_len=4096, global_batch_size=64)
    everything = legal_space(model, workload, 16, MESHWRIGHT)
    fixed = parse_constraints(["tp=4", "schedule=1f1b", "recompute=full", "sequence-parallel=on", "zero_stage=1"])
    some = legal_space(model, workload, 16, MESHWRIGHT, fixed)
    wanted = [config for config in everything.batch.configs() if all(getattr(config, n) == v for n, v in fixed.items())]
    assert list(some.batch.configs()) == wanted
    assert some.num_candidates == everything.num_candidates
    assert all(isinstance(config, ParallelConfig) for config in wanted) and wanted


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tp"], "expected FIELD=VALUE"),
        (["tq=8"], "did you mean tp"),
        (["schedule=1b1f"], "expected one of gpipe, 1f1b"),
        (["tp=eight"], "tp must be a whole number of at least 1, found 'eight'"),
        (["zero_stage=-1"], "zero_stage must be a whole number of at least 0"),
        (["sequence_parallel=maybe"], "on or off"),
        (["tp=2", "tp=4"], "fixed twice"),
    ],
)
def test_bad_constraints_are_answered_with_a_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_constraints(words)


def test_a_value_that_no_candidate_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"tp=3 is not possible here: it can be 1, 2, 4$"):
        legal_space(SMALL.model(), SMALL.workload(), 4, MESHWRIGHT, {"tp": 3})
    with pytest.raises(InputError, match=r"recompute.*none, selective, full"):
        legal_space(SMALL.model(), SMALL.workload(), 4, MESHWRIGHT, {"recompute": "some"})


def test_divisors() -> None:
    assert [divisors(n) for n in (1, 2, 12, 16, 49)] == [[1], [1, 2], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16], [1, 7, 49]]
