"""What changed between two clusters, in percent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright import load_cluster
from meshwright.profiler.cluster import CollectiveCurve, Provenance, Source
from meshwright.profiler.cluster_diff import Change, diff_clusters, reference_rate

SOURCE = Source(provenance=Provenance.MEASURED, reference="a test")


def make_curve(seconds: tuple[float, ...], num_ranks: int = 8) -> CollectiveCurve:
    return CollectiveCurve(
        op="all_reduce",
        num_ranks=num_ranks,
        ranks_per_node=8,
        message_bytes=(1e3, 1e6, 1e9)[: len(seconds)],
        seconds=seconds,
        spread=(0.0,) * len(seconds),
        source=SOURCE,
    )


def test_a_cluster_and_itself() -> None:
    cluster = load_cluster("h100-sxm:2")
    diff = diff_clusters(cluster, cluster)
    assert {change.percent for change in diff.changes} == {0.0}
    assert diff.only_before == diff.only_after == diff.environment == ()


def test_h200_against_h100_by_hand() -> None:
    changes = {
        change.what: change for change in diff_clusters(load_cluster("h100-sxm"), load_cluster("h200-sxm")).changes
    }
    assert changes["memory bandwidth"].percent == pytest.approx(100 * (4.8 / 3.35 - 1))
    assert changes["memory"].percent == pytest.approx(76.25)
    assert changes["matmul float32"].percent == 0
    limit = {name: load_cluster(name).device.efficiency("matmul", "bfloat16") for name in ("h100-sxm", "h200-sxm")}
    ratio = (limit["h200-sxm"].max_share / (1024 + limit["h200-sxm"].half_k)) / (
        limit["h100-sxm"].max_share / (1024 + limit["h100-sxm"].half_k)
    )
    assert changes["matmul bfloat16"].percent == pytest.approx(100 * (ratio - 1), abs=1e-6)


def test_what_only_one_side_has_is_named() -> None:
    diff = diff_clusters(load_cluster("v100-sxm"), load_cluster("a100-sxm:2"))
    assert "matmul bfloat16" in diff.only_after
    assert "cluster latency" in diff.only_after
    assert diff.only_before == ()


def test_collectives_are_compared_at_the_largest_common_size() -> None:
    cluster = load_cluster("h100-sxm")
    before = replace(cluster, collectives=(make_curve((1e-5, 1e-3)), make_curve((1.0,), num_ranks=4)))
    after = replace(cluster, collectives=(make_curve((1e-5, 2e-3, 1.0)),))
    diff = diff_clusters(before, after)
    change = next(change for change in diff.changes if change.what.startswith("all_reduce"))
    assert (change.before, change.after, change.percent) == pytest.approx((1e-3, 2e-3, 100.0))
    assert diff.only_before == ("all_reduce over 4 ranks, 8 a node",)


def test_from_nothing_to_something_is_infinite() -> None:
    assert Change(what="x", before=0.0, after=1.0, unit="").percent == float("inf")
    assert Change(what="x", before=0.0, after=0.0, unit="").percent == 0.0


def test_reference_rate_by_hand() -> None:
    curve = load_cluster("h100-sxm").device.efficiency("matmul", "float32")
    share = 0.85 * 1024 / (1024 + 64) * 1024 / (1024 + 64) * 1024 / (1024 + 128)
    assert reference_rate(curve) == pytest.approx(share * 67e12)
    assert reference_rate(replace(curve, tile_exponent=0.5, overhead_s=1.0)) == pytest.approx(share * 67e12)
