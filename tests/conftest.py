"""A machine and a model with round figures, for tests that recompute formulas by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import pytest

from meshwright.cost_models.framework import Framework, Pointwise, PointwiseCost
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.profiler.cluster import (
    ClusterProfile,
    CollectiveCurve,
    Device,
    Efficiency,
    LinkTier,
    NodeGroup,
    Provenance,
    Source,
)
from meshwright.profiler.layers import (
    AttentionKind,
    AttentionLayer,
    EmbeddingLayer,
    HeadLayer,
    MlpLayer,
    NormKind,
    NormLayer,
)
from meshwright.profiler.model import Block, BlockKind, ModelSpec

ASSUMED = Source(provenance=Provenance.ASSUMED, reference="round figures of a test")


class Toy:
    """Factories; every figure can be given."""

    source = ASSUMED

    @staticmethod
    def device(
        kind: str = "cpu",
        *,
        half_m: float = 0.0,
        half_n: float = 0.0,
        half_k: float = 0.0,
        overhead_s: float = 0.0,
        **changes: Any,
    ) -> Device:
        """1 TFLOP/s reached at half its share, 100 GB/s, 1 GiB of 16 reserved."""
        ops: Any = ("matmul", "attention_forward", "attention_backward", "grouped_matmul")
        curves = tuple(
            Efficiency(
                op=op,
                dtype=dtype,
                peak_flops_per_s=1e12,
                max_share=0.5,
                half_m=half_m,
                half_n=half_n,
                half_k=half_k,
                overhead_s=overhead_s,
                source=ASSUMED,
            )
            for op in ops
            for dtype in ("bfloat16", "float32")
        )
        device = Device(
            kind=kind,
            memory_bytes=16 * 2**30,
            reserved_bytes=2**30,
            memory_bytes_per_s=1e11,
            launch_s=0.0,
            communication_slowdown=0.0,
            efficiencies=curves,
            source=ASSUMED,
        )
        return replace(device, **changes)

    @staticmethod
    def cluster(
        num_nodes: int = 2,
        devices_per_node: int = 4,
        *,
        device: Device | None = None,
        node: tuple[float, float] = (1e-6, 1e10),
        network: tuple[float, float] = (1e-5, 1e9),
        collectives: Iterable[CollectiveCurve] = (),
    ) -> ClusterProfile:
        """Nodes of four; latency and bandwidth inside a node and across."""
        device = device or Toy.device()
        sizes = (devices_per_node, num_nodes * devices_per_node)
        tiers = tuple(
            LinkTier(
                name=name,
                group_size=size,
                latency_s=latency,
                bytes_per_s=rate,
                contended_bytes_per_s=rate,
                source=ASSUMED,
            )
            for name, size, (latency, rate) in zip(("node", "cluster"), sizes, (node, network), strict=True)
        )
        return ClusterProfile(
            name="toy",
            devices=(device,),
            node_groups=(NodeGroup(device=device.kind, num_nodes=num_nodes, devices_per_node=devices_per_node),),
            tiers=tiers if num_nodes > 1 else tiers[:1],
            collectives=tuple(collectives),
        )

    @staticmethod
    def model(
        *,
        num_layers: int = 4,
        hidden: int = 64,
        num_heads: int = 8,
        num_kv_heads: int = 4,
        ffn_size: int = 128,
        vocab_size: int = 256,
        tied: bool = False,
        gated: bool = True,
        window: int = 0,
        norm: NormKind = NormKind.RMS,
    ) -> ModelSpec:
        """A small Llama."""
        head_dim = hidden // num_heads
        attention = AttentionLayer(
            attention_kind=AttentionKind.GQA if num_kv_heads < num_heads else AttentionKind.MHA,
            hidden=hidden,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=head_dim,
            window=window,
        )
        norm_layer = NormLayer(norm_kind=norm, hidden=hidden)
        mlp = MlpLayer(hidden=hidden, ffn_size=ffn_size, gated=gated)
        return ModelSpec(
            name="toy",
            architecture="toy",
            max_seq_len=4096,
            blocks=(
                Block(kind=BlockKind.EMBEDDING, layers=(EmbeddingLayer(vocab_size=vocab_size, hidden=hidden),)),
                Block(kind=BlockKind.DECODER, layers=(norm_layer, attention, norm_layer, mlp), repeat=num_layers),
                Block(
                    kind=BlockKind.HEAD,
                    layers=(norm_layer, HeadLayer(hidden=hidden, vocab_size=vocab_size, tied=tied)),
                ),
            ),
        )

    @staticmethod
    def framework(**changes: Any) -> Framework:
        """Meshwright's traits, with memory-bound operators that cost nothing unless given."""
        free = PointwiseCost(forward_kernels=0, forward_passes=0, backward_kernels=0, backward_passes=0)
        table = Pointwise(**{field.name: free for field in fields(Pointwise)})
        pointwise = {name: changes.pop(name) for name in list(changes) if hasattr(table, name)}
        return replace(MESHWRIGHT, pointwise=replace(table, **pointwise), **changes)


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    """Round figures: ``toy.device()``, ``toy.cluster()``, ``toy.model()``, ``toy.framework()``."""
    return Toy
