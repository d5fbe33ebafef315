"""Context parallelism in time: kernels of a ring's steps, what is exchanged and what of it hides, by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost_models.attention import attended_pairs, kernel_steps
from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.collectives import groups_of
from meshwright.cost_models.compute import block_seconds
from meshwright.cost_models.context import context_traffic, exchanged_kv_heads, hop_seconds
from meshwright.cost_models.context_traits import ContextTraits, Merge
from meshwright.cost_models.framework import supported
from meshwright.cost_models.parts import BlockParts, block_parts
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.traffic import rank_traffic
from meshwright.cost_models.workload import RECIPES, Workload

WORKLOAD = Workload(seq_len=64, global_batch_size=2, recipe=RECIPES["fp32"])


def batch(**degrees: Any) -> ConfigBatch:
    ring, ulysses = degrees.get("cp_ring", 1), degrees.get("cp_ulysses", 1)
    return ConfigBatch.from_configs([ParallelConfig(**(degrees | {"cp": ring * ulysses}))])


def parts(toy: Any, framework: Any, workload: Workload = WORKLOAD, **degrees: Any) -> BlockParts:
    model, cluster = toy.model(), toy.cluster(device=toy.device("gpu"))
    return block_parts(block_kinds(model), model, workload, cluster, framework, batch(**degrees), Placement())[1]


def test_groups_of_ulysses_are_neighbours_and_rings_go_round_them(toy: Any) -> None:
    # 4 devices a node, tp 2: a node holds 2 of cp, both of one Ulysses group; a ring has one rank there
    config, cluster = batch(tp=2, cp_ring=2, cp_ulysses=2), toy.cluster()
    ulysses, ring = (groups_of(config, cluster, Placement(), axis) for axis in ("cp_ulysses", "cp_ring"))
    assert (ulysses.size[0], ulysses.inside[0, 0]) == (2, 2)
    assert (ring.size[0], ring.inside[0, 0]) == (2, 1)
    whole = groups_of(config, cluster, Placement(), "cp")
    assert (whole.size[0], whole.inside[0, 0]) == (4, 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "ulysses", "exchanged"),
    [(8, 4, 1, 2, 4), (8, 2, 1, 4, 4), (8, 1, 1, 8, 8), (8, 4, 2, 4, 4), (8, 2, 4, 2, 2), (12, 4, 1, 3, 12)],
)
def test_heads_of_keys_are_repeated_as_often_as_ulysses_takes(
    toy: Any, heads: int, kv_heads: int, tp: int, ulysses: int, exchanged: int
) -> None:
    layer = toy.model(hidden=8 * heads, num_heads=heads, num_kv_heads=kv_heads).attention
    config = batch(tp=tp, cp_ulysses=ulysses)
    assert exchanged_kv_heads(layer, config, MESHWRIGHT) == [exchanged]
    assert exchanged_kv_heads(layer, config, replace(MESHWRIGHT, context=ContextTraits(whole_heads=True))) == [
        heads / tp
    ]


def test_what_a_ring_of_ulysses_groups_issues(toy: Any) -> None:
    # 16 of 64 tokens, 8 heads and 4 of keys and values, 8 wide, 4 bytes: 4 blocks, 2 micro-batches
    found = rank_traffic(toy.model(), WORKLOAD, ParallelConfig(cp=4, cp_ring=2, cp_ulysses=2), 0)
    queries, keys = 4 * 16 * 8 * 8, 4 * 16 * 4 * 16
    assert found["all_to_all", "cp_ulysses"] == (8 * 4, 8 * 2 * (queries + keys + queries))
    assert found["send", "cp_ring"] == (8 * 3, 8 * 3 * keys)  # keys and values both ways, their gradients
    full = rank_traffic(
        toy.model(), WORKLOAD, ParallelConfig(cp=4, cp_ring=2, cp_ulysses=2, recompute=Recompute.FULL), 0
    )
    assert full["all_to_all", "cp_ulysses"][0] == 8 * 6
    assert full["send", "cp_ring"] == (8 * 4, 8 * 4 * keys)


def test_gathered_keys_and_whole_heads_of_other_targets(toy: Any) -> None:
    block, config = toy.model().decoder_blocks[0], batch(cp_ring=4)
    layer_bytes = 4 * 64 * 4 * 16  # keys and values of all 64 tokens

    def entries(traits: ContextTraits) -> list[tuple[str, str, float, float]]:
        target = replace(MESHWRIGHT, context=traits)
        return [
            (entry.op, entry.phase, float(entry.calls[0]), float(entry.message_bytes[0]))
            for entry in context_traffic(block, WORKLOAD, config, target)
            if entry.calls[0]
        ]

    assert entries(ContextTraits(gathers=True)) == [
        ("all_gather", "forward", 1, layer_bytes),
        ("all_gather", "backward", 1, layer_bytes),
        ("reduce_scatter", "backward", 1, layer_bytes),
    ]
    twice = entries(ContextTraits(whole_heads=True))
    assert twice[0] == ("send", "forward", 3, 2 * layer_bytes / 4)


def test_a_rings_kernels_work_out_its_share_of_the_pairs(toy: Any) -> None:
    layer, config = toy.model().attention, batch(cp_ring=4)

    def pairs(layer: Any, **traits: Any) -> float:
        steps = kernel_steps(layer, 64, replace(MESHWRIGHT, context=ContextTraits(**traits)), config)
        return float(sum((step.times * step.pairs)[0] for step in steps))

    whole = 64 * 65 / 2
    assert pairs(layer) == pytest.approx(whole / 4)
    assert pairs(layer, gathers=True) == pytest.approx(whole / 4)
    assert pairs(layer, balanced=False) == 16 * 17 / 2 + 3 * 16 * 16  # the last place meets all of the others
    assert pairs(replace(layer, causal=False)) == 64 * 64 / 4
    windowed = replace(layer, window=8)
    assert pairs(windowed) == attended_pairs(64, 8, True, True) / 4
    assert pairs(windowed, windows=False) == 64 * 64 / 4


def test_a_window_leaves_a_place_its_chunks_neighbours(toy: Any) -> None:
    # 8 places of 2 chunks of 16 tokens: a window of 17 keys reaches one chunk back, from both ends of the sequence
    layer = replace(toy.model().attention, window=17)
    (step,) = kernel_steps(layer, 256, MESHWRIGHT, batch(cp_ring=8))
    assert step.times == [3]
    (step,) = kernel_steps(replace(layer, window=200), 256, MESHWRIGHT, batch(cp_ring=8))
    assert step.times == [8]


def test_seconds_of_attention_over_exchanged_heads_and_on_a_ring(toy: Any) -> None:
    # 0.5 TFLOP/s, no ramp: 4 * pairs * width FLOPs a head, and half of them again five times backward
    framework, block = toy.framework(context=ContextTraits(ulysses=True)), toy.model().decoder_blocks[0]
    flops = 4 * 8 * 8 * 64 * 65 / 2
    for degrees in ({"cp_ring": 4}, {"cp_ulysses": 4}, {"cp_ring": 2, "cp_ulysses": 2}):
        found = block_seconds(block, WORKLOAD, toy.device(memory_bytes_per_s=1e18), framework, batch(**degrees))
        assert found.attention_forward == pytest.approx([flops / 4 / 5e11])
        assert found.attention_backward == pytest.approx([2.5 * flops / 4 / 5e11])


def test_results_of_steps_are_put_together_in_passes(toy: Any) -> None:
    merge = Merge(output_passes=3, query_float32_passes=2, kv_passes=1)
    plain, merged = (
        block_seconds(
            toy.model().decoder_blocks[0],
            WORKLOAD,
            toy.device(),
            toy.framework(context=ContextTraits(merge=each)),
            batch(cp_ring=4),
        )
        for each in (Merge(), merge)
    )
    # three steps on 16 tokens, three quarters of them: outputs of 8 heads, keys and values of 4, 8 wide, 4 bytes
    output, keys = 4 * 16 * 64, 4 * 16 * 64
    more = 3 * 0.75 / 1e11
    assert merged.attention_forward - plain.attention_forward == pytest.approx([more * 3 * output])
    assert merged.attention_backward - plain.attention_backward == pytest.approx([more * (2 * output + keys)])
    assert merged.forward - plain.forward == pytest.approx([more * 3 * output])


def test_a_message_waits_for_the_slowest_link_of_its_ring(toy: Any) -> None:
    cluster = toy.cluster()  # 4 devices a node: 1 us and 10 GB/s inside, 10 us and 1 GB/s across

    def hop(**degrees: Any) -> float:
        groups = groups_of(batch(**degrees), cluster, Placement(), "cp_ring")
        return float(hop_seconds(cluster, groups, 1e6)[0])

    assert hop(cp_ring=4) == pytest.approx(1e-6 + 1e-4)
    assert hop(cp_ring=2, tp=4) == pytest.approx(1e-5 + 1e-3)  # all 4 of a node send across
    assert hop(cp_ring=1) == 0.0
    faster = replace(cluster, tiers=(cluster.tiers[0], replace(cluster.tiers[1], bytes_per_s=4e9)))
    groups = groups_of(batch(cp_ring=8), faster, Placement(), "cp_ring")
    assert hop_seconds(faster, groups, 1e6) == pytest.approx([1e-5 + 1e6 / 4e9])  # one of 4 sends across


def test_messages_hide_behind_all_steps_but_the_last(toy: Any) -> None:
    framework = toy.framework(context=ContextTraits())
    kernels = block_seconds(toy.model().decoder_blocks[0], WORKLOAD, toy.device("gpu"), framework, batch(cp_ring=4))
    found = parts(toy, framework, cp_ring=4)
    message = 4 * 16 * 4 * 16
    total = 3 * (1e-6 + message / 1e10)
    assert found.cp_forward == pytest.approx([total - 0.75 * float(kernels.attention_forward[0])])
    backward = 2 * total - 0.75 * float(kernels.attention_backward[0])
    assert found.cp_backward == pytest.approx([max(backward, 0.0)])
    assert found.cp_forward + found.cp_backward + found.hidden == pytest.approx([3 * total])
    exposed = parts(toy, replace(framework, context=ContextTraits(overlap=0.0)), cp_ring=4)
    assert exposed.cp_forward == pytest.approx([total])
    assert exposed.hidden == pytest.approx([0.0])


def test_the_last_message_of_gradients_may_have_no_kernel_beside_it(toy: Any) -> None:
    # in 16 bits gradients travel in 32: messages of 1 and 2, three of each; fast links, so that all others hide
    workload = Workload(seq_len=4096, global_batch_size=1, recipe=RECIPES["bf16"])
    framework = toy.framework(context=ContextTraits(last_waits=True, float32_grads=True))
    found = parts(toy, framework, workload, cp_ring=4)
    keys = 2 * 1024 * 4 * 16
    assert found.cp_forward == pytest.approx([0.0])
    assert found.cp_backward == pytest.approx([2 / 9 * (6e-6 + 9 * keys / 1e10)])


def test_ulysses_waits_for_its_exchange_and_its_copies(toy: Any) -> None:
    framework = toy.framework(context=ContextTraits(ulysses=True, exchanges_together=True, exchange_copies=0.0))
    found = parts(toy, framework, cp_ulysses=2)
    queries, keys = 4 * 32 * 64, 4 * 32 * 64
    expected = 2 * 1e-6 + (queries + keys + queries) / 2 / 1e10
    assert found.cp_forward == pytest.approx([expected])
    assert found.cp_backward == pytest.approx([expected])
    copied = parts(toy, replace(framework, context=replace(framework.context, exchange_copies=4.0)), cp_ulysses=2)
    assert copied.cp_forward - found.cp_forward == pytest.approx([4 * (2 * queries + keys) / 1e11])


def test_queries_and_outputs_travel_both_ways_at_once(toy: Any) -> None:
    one_way, both = (
        parts(toy, toy.framework(context=ContextTraits(overlap=0.0, bidirectional=value, whole_heads=True)), cp_ring=2)
        for value in (False, True)
    )
    keys = 4 * 32 * 8 * 16
    assert one_way.cp_forward == pytest.approx([1e-6 + keys / 1e10])
    assert both.cp_forward == pytest.approx([1e-6 + (keys / 2 + 4 * 32 * 8) / 1e10])  # outputs, and a sum a head


def test_what_a_target_does_not_run(toy: Any) -> None:
    configs = [ParallelConfig(cp=4, cp_ring=4), ParallelConfig(cp=4, cp_ulysses=4), ParallelConfig(cp=1, dp=4)]
    every = ConfigBatch.from_configs(configs)

    def runs(window: int = 0, **traits: Any) -> list[bool]:
        target = replace(MESHWRIGHT, context_parallel=True, context=ContextTraits(**traits))
        return supported(every, target, toy.model(window=window), replace(WORKLOAD, global_batch_size=8)).tolist()

    assert runs(ulysses=True) == [True, True, True]
    assert runs() == [True, False, True]
    assert runs(ring=False, ulysses=True) == [False, True, True]
    assert runs(window=8, ulysses=True, ring_windows=False) == [False, True, True]


@settings(max_examples=25)
@given(
    ring=st.sampled_from([1, 2, 4, 8]),
    ulysses=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([1, 2]),
    seq_len=st.sampled_from([256, 4096, 65536]),
    gathers=st.booleans(),
    recompute=st.sampled_from(list(Recompute)),
)
def test_laws(toy: Any, ring: int, ulysses: int, tp: int, seq_len: int, gathers: bool, recompute: Recompute) -> None:
    workload = Workload(seq_len=seq_len, global_batch_size=1, recipe=RECIPES["bf16"])
    degrees = {"cp_ring": ring, "cp_ulysses": ulysses, "tp": tp, "recompute": recompute}
    hides, waits = (
        toy.framework(context=ContextTraits(ulysses=True, gathers=gathers, overlap=overlap)) for overlap in (1.0, 0.0)
    )
    found, exposed = parts(toy, hides, workload, **degrees), parts(toy, waits, workload, **degrees)
    for part in (found, exposed):
        assert all(np.all(getattr(part, field.name) >= 0) for field in fields(BlockParts))
    both, all_of_it = found.cp_forward + found.cp_backward, exposed.cp_forward + exposed.cp_backward
    assert np.all(both <= all_of_it * (1 + 1e-12))
    assert both + found.hidden - exposed.hidden == pytest.approx(all_of_it)
    assert bool(all_of_it > 0) == (ring * ulysses > 1)
    if gathers and ring > 1:
        assert found.cp_forward == exposed.cp_forward
