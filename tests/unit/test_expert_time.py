"""Time of expert layers by hand: rows, groups, exchanges, chunks, gradients of experts, routing skew, recipes.

The toy cluster is two nodes of four devices, 1 us and 10 GB/s inside a node, 10 us and 1 GB/s a device across; its
devices reach 0.5 TFLOP/s and 100 GB/s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from meshwright import InputError
from meshwright.cost_models import expert_exchange
from meshwright.cost_models.blocks import block_kinds
from meshwright.cost_models.collectives import groups_of
from meshwright.cost_models.compute import block_seconds
from meshwright.cost_models.expert_traffic import expert_traffic
from meshwright.cost_models.expert_traits import Dispatch, ExpertTraits
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.parts import BlockParts, block_parts
from meshwright.cost_models.placement import Placement, rank_grid
from meshwright.cost_models.published_recipes import expert_variant
from meshwright.cost_models.published_rows import Row
from meshwright.cost_models.routing import Skew, skew_of
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.traffic import block_traffic
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import Block, BlockKind, ModelSpec

FRAMEWORK = replace(MESHWRIGHT, expert_parallel=True, tensor_parallel_moe=True, expert_chunks=(1, 2, 4))
LAYER = MoeLayer(hidden=64, num_experts=8, top_k=2, expert_ffn_size=128)
WORKLOAD = Workload(seq_len=32, global_batch_size=64)  # bf16: 2 bytes a number


def batch_of(**degrees: Any) -> ConfigBatch:
    return ConfigBatch.from_configs([ParallelConfig(**degrees)])


def moe(toy: Any, layer: MoeLayer = LAYER) -> ModelSpec:
    model: ModelSpec = toy.model(hidden=layer.hidden)
    blocks = [
        replace(block, layers=(*block.layers[:-1], layer)) if block.kind is BlockKind.DECODER else block
        for block in model.blocks
    ]
    return replace(model, blocks=tuple(blocks))


def parts_of(
    toy: Any,
    device: str = "cpu",
    framework: Framework = FRAMEWORK,
    workload: Workload = WORKLOAD,
    layer: MoeLayer = LAYER,
    **degrees: Any,
) -> BlockParts:
    model, cluster = moe(toy, layer), toy.cluster(device=toy.device(device))
    kinds = block_kinds(model)
    return block_parts(kinds, model, workload, cluster, framework, batch_of(**degrees), Placement())[1]


# -- rows and groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "sent", "here", "gathers"),
    [
        ({"dp": 8, "ep": 4}, 64, 64, False),  # 32 tokens, 2 experts each
        ({"dp": 4, "tp": 2, "ep": 8, "sequence_parallel": True}, 32, 32, False),  # half of the tokens
        ({"dp": 4, "tp": 2, "ep": 4, "etp": 2, "sequence_parallel": True}, 32, 64, True),  # gathered from both
        ({"dp": 4, "tp": 2, "ep": 4, "etp": 2}, 64, 64, False),  # both have all tokens, half of the width
        ({"dp": 8, "ep": 4, "etp": 2}, 64, 128, True),  # two data ranks' tokens
        ({"dp": 2, "cp": 4, "cp_ring": 4, "ep": 8}, 16, 16, False),
    ],
)
def test_rows_of_a_rank(degrees: dict[str, Any], sent: int, here: int, gathers: bool) -> None:
    rows = expert_exchange.rows_of(LAYER, WORKLOAD, batch_of(**degrees))
    assert (rows.sent[0], rows.here[0], rows.slower[0]) == (sent, here, 1.0)
    assert bool(expert_exchange.gathers(batch_of(**degrees))[0]) is gathers


@pytest.mark.parametrize("order", [("tp", "cp", "dp", "pp"), ("dp", "tp", "cp", "pp"), ("tp", "pp", "cp", "dp")])
def test_groups_of_experts_are_those_of_the_mesh(order: tuple[str, ...], toy: Any) -> None:
    """Against the folded grid itself (``executors/mesh.py``): size, ranks inside a node, for every axis."""
    cluster = toy.cluster(num_nodes=8)
    for tp, cp, dp, pp, ep, etp in ((2, 2, 4, 2, 4, 2), (4, 1, 8, 1, 8, 1), (2, 4, 2, 2, 8, 2), (1, 2, 8, 2, 16, 1)):
        config = ParallelConfig(tp=tp, cp=cp, cp_ring=cp, dp=dp, pp=pp, ep=ep, etp=etp)
        placement = Placement(order=order)
        grid = rank_grid(config, placement).reshape(pp, config.edp, ep, etp)
        for place, axis in enumerate(("edp", "ep", "etp"), start=1):
            groups = groups_of(ConfigBatch.from_configs([config]), cluster, placement, axis)
            ranks = np.moveaxis(grid, place, -1).reshape(-1, grid.shape[place])
            inside = max(np.bincount(group // 4).max() for group in ranks)
            assert (groups.size[0], groups.inside[0, 0]) == (grid.shape[place], inside), (config, axis)


# -- exchange ---------------------------------------------------------------------------------------------------------


def test_an_exchange_by_hand(toy: Any) -> None:
    """8 ranks on two nodes: 7/8 of the rows leave the rank, half of them the node."""
    cluster, batch = toy.cluster(), batch_of(dp=8, ep=8)
    groups = groups_of(batch, cluster, Placement(), "ep")
    message, layer = np.array([8e6]), LAYER
    plain = expert_exchange.exchange_seconds(cluster, "all_to_all", groups, message, layer, ExpertTraits())
    assert plain[0] == pytest.approx(1e-6 + 1e-5 + 0.5 * 8e6 / 1e9)
    # once for each node: a token's 2 of 8 experts are on 2 (1 - C(4, 2) / C(8, 2)) of two nodes, instead of 2
    once = replace(ExpertTraits(), dispatch=Dispatch.EACH_RANK, exchange_factor=1.5)
    nodes = 2 * (1 - 6 / 28)
    fewer = expert_exchange.exchange_seconds(cluster, "all_to_all", groups, message, layer, once)
    assert fewer[0] == pytest.approx(1.5 * (1.1e-5 + nodes / 2 * 0.5 * 8e6 / 1e9))


def test_places_reached_by_hand() -> None:
    reached = expert_exchange.places_reached(LAYER, np.array([1.0, 2.0, 4.0, 8.0]))
    assert reached == pytest.approx([1, 2 * (1 - 6 / 28), 4 * (1 - 15 / 28), 2])  # C(4,2), C(6,2) of C(8,2)


def test_collectives_of_a_layer() -> None:
    """Dispatch and combine forward and backward; gathered over etp before, scattered after; sizes ahead."""
    batch = batch_of(dp=4, tp=2, ep=4, etp=2, sequence_parallel=True)
    found = [
        (entry.axis, entry.op, entry.phase, entry.calls[0], entry.message_bytes[0])
        for entry in expert_traffic(Block(kind=BlockKind.DECODER, layers=(LAYER,)), WORKLOAD, batch, FRAMEWORK)
        if entry.calls[0]
    ]
    rows = 32 * 64 * 2.0
    exchange = [("all_to_all", "ep", 2.0, rows), ("all_gather", "etp", 1.0, 2 * rows)]
    exchange += [("reduce_scatter", "etp", 1.0, 2 * rows)]
    for phase in ("forward", "backward"):
        for op, axis, calls, num_bytes in exchange:
            assert (axis, op, phase, calls, num_bytes) in found
    assert ("ep", "all_to_all", "forward", 1.0, 8.0 * 8) in found  # 8 bytes for each of 8 experts
    assert ("etp", "all_gather", "forward", 1.0, 2 * 8.0 * 8) in found
    assert len(found) == 8


def played(x: float, y: float, chunks: int) -> float:
    """Seconds of dispatches and combines on one stream, in the order that the executor issues them, beside experts."""
    stream = worker = 0.0
    arrived: dict[int, float] = {}
    order: list[tuple[str, int]] = [("d", 0)]
    for chunk in range(chunks):
        order += [("d", chunk + 1)] * (chunk + 1 < chunks) + [("r", chunk)]
    for kind, chunk in order:
        if kind == "r":
            worker = max(worker, arrived[chunk]) + y
            stream = max(stream, worker)
        stream += x
        arrived[chunk] = stream
    return stream


def test_chunks_beside_experts_as_played() -> None:
    """The closed form is the two streams played, from exchanges that cost nothing to ones that cost all."""
    for chunks in (1, 2, 3, 4, 8):
        for y in (0.0, 0.3, 0.9, 1.0, 1.3, 1.9, 2.0, 2.7, 9.0):
            exchange, compute = np.array([2.0 * chunks]), np.array([chunks * y])
            visible = expert_exchange.exposed(exchange, compute, np.array([float(chunks)]))[0]
            assert visible + chunks * y == pytest.approx(played(1.0, y, chunks)), (chunks, y)


def test_chunks_pay_where_rows_are_many_and_streams_exist(toy: Any) -> None:
    wide = replace(LAYER, hidden=1024, expert_ffn_size=8192)
    many = replace(WORKLOAD, seq_len=8192)

    def spent(workload: Workload, layer: MoeLayer) -> list[float]:
        found = []
        for chunks in (1, 2, 4):
            part = parts_of(toy, "gpu", workload=workload, layer=layer, dp=8, ep=8, ep_chunks=chunks)
            found.append(float((part.ep_forward + part.compute_forward)[0]))
        return found

    one, two, four = spent(many, wide)
    assert four < two < one  # half, then three quarters of the exchange behind the experts
    one, two, four = spent(WORKLOAD, LAYER)
    assert one < two < four  # latency, and experts' weights read again for each chunk
    part = parts_of(toy, "cpu", workload=many, layer=wide, dp=8, ep=8, ep_chunks=4)
    assert part.ep_forward[0] >= parts_of(toy, "cpu", workload=many, layer=wide, dp=8, ep=8).ep_forward[0]


def test_another_micro_batch_hides_the_exchange(toy: Any) -> None:
    hiding = replace(FRAMEWORK, experts=replace(FRAMEWORK.experts, overlap=1.0))
    long, wide = replace(WORKLOAD, seq_len=4096), replace(LAYER, expert_ffn_size=8192)
    alone, beside = (parts_of(toy, "gpu", target, long, wide, dp=8, ep=4) for target in (FRAMEWORK, hiding))
    assert alone.ep_forward[0] > 0 == beside.ep_forward[0]
    assert beside.hidden[0] - alone.hidden[0] == pytest.approx((alone.ep_forward + alone.ep_backward)[0])


# -- compute ----------------------------------------------------------------------------------------------------------


def test_experts_of_a_rank_by_hand(toy: Any) -> None:
    """ep cuts how many experts' weights are read, not the FLOPs of a rank; etp cuts both ways."""
    block = block_kinds(moe(toy)).kinds[1]
    device = toy.device(memory_bytes_per_s=1e30)

    def experts(**degrees: Any) -> float:
        return float(block_seconds(block, WORKLOAD, device, FRAMEWORK, batch_of(**degrees)).experts_forward[0])

    flops = 2 * 64 * (2 * 128 * 64 + 128 * 64)  # 64 rows through gate and up together, and down
    assert experts(dp=8) == pytest.approx(flops / 0.5e12)
    assert experts(dp=8, ep=8) == pytest.approx(flops / 0.5e12)
    assert experts(dp=4, tp=2, etp=2, sequence_parallel=True) == pytest.approx(flops / 2 / 0.5e12)
    slow = toy.device(memory_bytes_per_s=1e6)  # weights read for each expert, rows in and out
    bytes_of = {ep: 2 * (64 * (64 + 256) + 8 / ep * 64 * 256 + 64 * (128 + 64) + 8 / ep * 64 * 128) for ep in (1, 8)}
    for ep, num_bytes in bytes_of.items():
        found = block_seconds(block, WORKLOAD, slow, FRAMEWORK, batch_of(dp=8, ep=ep)).experts_forward[0]
        activation = FRAMEWORK.pointwise.gated_activation.forward_passes * 64 * 128 * 2
        assert found == pytest.approx((num_bytes + activation) / 1e6)


def test_launches_for_each_expert_and_graphs(toy: Any) -> None:
    block = block_kinds(moe(toy)).kinds[1]
    device = toy.device("gpu", launch_s=1.0)
    target = replace(FRAMEWORK, experts=ExpertTraits(calls_each_expert=1.0))
    grouped, each = (
        block_seconds(block, WORKLOAD, device, framework, batch_of(dp=8, ep=2)) for framework in (FRAMEWORK, target)
    )
    assert each.forward_host[0] - grouped.forward_host[0] == 2 * (4 - 1)  # two projections of four experts
    assert each.backward_host[0] - grouped.backward_host[0] == 4 * (4 - 1)
    graph = replace(target, experts=replace(target.experts, dense_in_graph=True))
    replayed = block_seconds(block, WORKLOAD, device, graph, batch_of(dp=8, ep=2))
    assert replayed.forward_host[0] == each.experts_forward_host[0] < each.forward_host[0]


# -- gradients and states of experts ----------------------------------------------------------------------------------


def test_gradients_of_experts_go_over_their_own_group(toy: Any) -> None:
    """ep 4 over dp 8: two ranks hold the same two experts; 3 * 64 * 128 weights each, 4 bytes of gradient."""
    model = moe(toy)
    kinds = block_kinds(model)
    for zero, op in ((0, "all_reduce"), (1, "reduce_scatter"), (3, "reduce_scatter")):
        batch = batch_of(dp=8, ep=4, zero_stage=zero, dp_shard=8 if zero else 1)
        entries = block_traffic(kinds, 1, model, WORKLOAD, batch, FRAMEWORK)
        found = [entry for entry in entries if entry.axis == "edp" and entry.op == op and entry.calls[0]]
        assert [entry.message_bytes[0] for entry in found] == [2 * 3 * 64 * 128 * 4.0]
        dense = [entry for entry in entries if entry.axis == "dp" and entry.op == op and entry.calls[0]]
        attention = 64 * (64 + 2 * 32) + 64 * 64
        assert [entry.message_bytes[0] for entry in dense] == [(attention + 2 * 64 + 8 * 64) * 4.0]
    alone = block_traffic(kinds, 1, model, WORKLOAD, batch_of(dp=8, ep=8), FRAMEWORK)
    assert not any(entry.calls[0] for entry in alone if entry.axis == "edp")


def test_the_update_of_experts_is_cut_by_their_own_group(toy: Any) -> None:
    """Under ZeRO 1 a rank updates an eighth of the dense weights and of its own experts what edp leaves."""
    dense = 64 * (64 + 2 * 32) + 64 * 64 + 2 * 64 + 8 * 64
    one = 3 * 64 * 128
    owned = {1: dense / 8 + 8 * one / 8, 2: dense / 8 + 4 * one / 4, 8: dense / 8 + one}
    updates = {ep: parts_of(toy, dp=8, ep=ep, zero_stage=1, dp_shard=8).optimizer[0] for ep in owned}
    for ep, numbers in owned.items():
        assert updates[ep] / updates[1] == pytest.approx(numbers / owned[1])


# -- routing ----------------------------------------------------------------------------------------------------------


def test_skew_of_a_measured_load() -> None:
    skew = skew_of([[4, 2, 1, 1], [2, 2, 2, 2]])
    assert skew.ranks == (1, 2, 4)
    # layer 0: 6 of 8 on the first of two ranks (1.5 times the mean), 4 of 8 on the first of four (twice); layer 1 even
    assert skew.slowest == pytest.approx((1.0, 1.25, 1.5))
    assert skew.of(np.array([1, 2, 4, 8])) == pytest.approx([1.0, 1.25, 1.5, 1.5])
    assert skew_of([1, 1, 2]).slowest == pytest.approx((1.0, 1.5))
    for wrong in ([[[1.0]]], [[1.0, -1.0]], [[0.0, 0.0]], [[1.0, float("nan")]], []):
        with pytest.raises(InputError):
            skew_of(wrong)
    with pytest.raises(InputError):
        Skew(ranks=(1, 2), slowest=(1.0, 0.5))


def test_the_most_loaded_rank_decides(toy: Any) -> None:
    uneven = replace(WORKLOAD, routing=Skew(ranks=(1, 8), slowest=(1.0, 3.0)))
    even, skewed = (parts_of(toy, workload=workload, dp=8, ep=8) for workload in (WORKLOAD, uneven))
    assert skewed.ep_forward[0] == pytest.approx(3 * even.ep_forward[0])
    assert even.compute_forward[0] < skewed.compute_forward[0] < 3 * even.compute_forward[0]
    together = [parts_of(toy, workload=workload, dp=8, ep=1) for workload in (WORKLOAD, uneven)]
    assert together[0].compute_forward[0] == together[1].compute_forward[0]
    bounded = replace(LAYER, capacity_factor=1.25, group_tokens=16)  # no rank works on more
    rows = expert_exchange.rows_of(bounded, uneven, batch_of(dp=8, ep=8))
    assert rows.slower[0] == 1.25


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "model", "precision", "release", "variant"),
    [
        ("GB300", "qwen3-235b-a22b", "mxfp8", "26.06.01", "graph"),
        ("GB300", "qwen3-235b-a22b", "mxfp8", "26.04", "hybridep"),
        ("GB200", "qwen3-30b-a3b", "fp8", "25.09", "padded"),
        ("B300", "qwen3-30b-a3b", "mxfp8", "26.06", "graph"),
        ("H100", "qwen3-235b-a22b", "fp8", "26.04", "overlap"),
        ("H100", "gpt-oss-120b", "bf16", "26.04", ""),
        ("GB300", "kimi-k2", "mxfp8", "26.06", "hybridep-eager"),
    ],
)
def test_the_recipe_of_a_row(gpu: str, model: str, precision: str, release: str, variant: str) -> None:
    columns = {"gpu_type": gpu, "model": model, "precision": precision, "notes": f"{release} NeMo Container; MoE"}
    assert expert_variant(Row(columns, 2)) == variant
    assert framework_named(f"megatron-bridge-{variant}" if variant else "megatron-bridge").experts.exchange_factor > 1


def test_the_recipe_where_no_container_is_named() -> None:
    columns = {"gpu_type": "GB200", "model": "deepseek-v3", "notes": "", "framework": "Megatron-Core"}
    assert expert_variant(Row(columns, 2)) == "hybridep"
    assert expert_variant(Row(columns | {"gpu_type": "H800"}, 2)) == "hybridep-eager"
    assert expert_variant(Row(columns | {"gpu_type": "H100", "model": "mixtral-8x7b"}, 2)) == ""
    assert expert_variant(Row(columns | {"framework": "NeMo / Megatron-Core"}, 2)) == "dropping"
    assert expert_variant(Row(columns | {"notes": "token-drop training, capacity factor 1"}, 2)) == "dropping"


def test_float8_experts_are_cast_and_fused_ones_are_not(toy: Any) -> None:
    device = toy.device("gpu")
    curves = tuple(replace(curve, dtype="float8") for curve in device.efficiencies if "matmul" in curve.op)
    device = replace(device, efficiencies=device.efficiencies[::2] + curves[::2])
    block = block_kinds(moe(toy)).kinds[1]
    narrow = replace(WORKLOAD, recipe=RECIPES["fp8"])
    target = replace(FRAMEWORK, float8=True)
    fused = replace(target, experts=replace(target.experts, fused=True))
    padded = replace(target, experts=replace(target.experts, pads_rows=True))
    plain, less, more = (
        float(block_seconds(block, narrow, device, framework, batch_of(dp=8, ep=2)).forward[0])
        for framework in (target, fused, padded)
    )
    rows, cast = 64, FRAMEWORK.pointwise.quantize.forward_passes
    activation = FRAMEWORK.pointwise.gated_activation.forward_passes
    assert plain - less == pytest.approx((cast + activation) * rows * 128 * 2 / 1e11)
    routing = FRAMEWORK.pointwise.routing.forward_passes
    assert more - plain == pytest.approx(4 * routing * rows * 64 * 2 / 1e11)
