"""A profile of real local ranks end to end, also as a launcher's ranks, and what is kept when one dies."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from meshwright import ClusterProfile, InputError, RunError, load_cluster
from meshwright.profiler import measure as measure_module
from meshwright.profiler.artifact import save
from meshwright.profiler.cluster import Provenance
from meshwright.profiler.collectives_bench import OPS, group_shapes, monotone, monotone_mean
from meshwright.profiler.launch import Rank, run_ranks
from meshwright.profiler.peers import launcher_ranks
from meshwright.profiler.profile import core_shares, profile_cluster

pytestmark = pytest.mark.multiprocess

SHORT_S = 1.0


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MESHWRIGHT_DEVICE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def check(profile: ClusterProfile | None, num_ranks: int) -> ClusterProfile:
    assert profile is not None
    assert profile.num_devices == num_ranks and profile.num_nodes == 1
    assert profile.measured_at and profile.environment and profile.environment.backend == "gloo"
    matrix = profile.link_matrix
    assert matrix is not None
    for table in (matrix.latency_s, matrix.bytes_per_s, matrix.contended_bytes_per_s):
        assert len(table) == num_ranks
        for row, values in enumerate(table):
            assert values[row] == 0
            assert all(value > 0 for column, value in enumerate(values) if column != row)
    assert [tier.name for tier in profile.tiers] == ["node"]
    shapes = {(curve.op, curve.num_ranks) for curve in profile.collectives}
    assert shapes == {(op, size) for op in OPS for size in (2, 4) if size <= num_ranks}
    for curve in profile.collectives:
        assert list(curve.seconds) == sorted(curve.seconds) and curve.seconds[0] > 0
        assert len(curve.seconds) >= 3 and curve.seconds[-1] > curve.seconds[-2]  # larger messages cost more
    return profile


def test_two_local_ranks(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    profile = check(
        profile_cluster(
            num_ranks=2,
            device="cpu",
            budget_s=SHORT_S,
            name="two",
            on_progress=lambda share, text: told.append((share, text)),
        ),
        2,
    )
    assert told[-1] == (1.0, "done")
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    device = profile.device
    assert device.kind.startswith("cpu ")
    assert {curve.op for curve in device.efficiencies} == {
        "matmul",
        "attention_forward",
        "attention_backward",
        "grouped_matmul",
    }
    for curve in device.efficiencies:
        assert curve.source.provenance is Provenance.MEASURED
        assert 0 < curve.max_share <= 1 and curve.residual > 0
    assert {sample.op for sample in device.samples} >= {"memory_copy", "elementwise", "optimizer_step"}
    assert device.launch_s > 0 and device.memory_bytes_per_s > 1e6
    save(profile, tmp_path / "cluster.json")
    assert load_cluster(tmp_path / "cluster.json") == profile


def test_four_local_ranks_have_groups_of_two_and_four() -> None:
    check(profile_cluster(num_ranks=4, device="cpu", budget_s=SHORT_S), 4)


def test_a_virtual_device_is_measured_as_described() -> None:
    profile = profile_cluster(num_ranks=1, device="virtual:h100/1000", dtypes=["float32"], budget_s=SHORT_S)
    assert profile is not None
    assert profile.tiers == () and profile.link_matrix is None and profile.collectives == ()  # a single rank
    device = profile.device
    assert (device.kind, device.launch_s, device.memory_bytes) == ("virtual:h100/1000", 0.0, 80 * 2**30)
    curve = device.efficiency("matmul", "float32")
    assert (curve.peak_flops_per_s, curve.max_share, curve.half_m) == pytest.approx((67e9, 0.85, 0.0))  # as stated
    assert curve.residual > 0  # and held against what was slept


def test_a_rank_that_dies_is_named_and_what_was_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    monkeypatch.setattr(measure_module, "_kernels", die)
    path = tmp_path / "cluster.partial.json"
    with pytest.raises(RunError, match=r"rank 1 of 2 died of signal 9 .*what was measured before is in .*partial"):
        profile_cluster(num_ranks=2, device="cpu", budget_s=SHORT_S, keep_partial=path)
    text = path.read_text()
    assert '"link_matrix": {' in text and '"all_reduce"' in text and "died of signal 9" in text
    with pytest.raises(InputError, match="is not a cluster file"):
        load_cluster(path)


def as_launched(rank: Rank, port: int, folder: str, dies: bool) -> ClusterProfile | None:
    """What a rank started by torchrun does."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GROUP_RANK=str(rank.rank))
    if dies:

        def die(*args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == 1:
                os._exit(1)
            dist.barrier()

        measure_module._kernels = die
    return profile_cluster(device="cpu", budget_s=SHORT_S, keep_partial=Path(folder) / "p.partial.json")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_among_a_launchers_ranks_rank_0_answers(tmp_path: Path) -> None:
    answers = run_ranks(as_launched, 2, free_port(), str(tmp_path), False, timeout_s=120, backend=None)
    assert answers[1] is None
    profile = answers[0]
    assert profile.num_nodes == 2  # each rank said that it is on a node of its own
    assert [tier.name for tier in profile.tiers] == ["cluster"]
    assert not list(tmp_path.iterdir())


def test_among_a_launchers_ranks_the_survivor_says_who_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no answer from rank 1 on .*what was measured before is in .*p\.partial"):
        run_ranks(_patient, 2, free_port(), str(tmp_path), timeout_s=120, backend=None)
    assert '"link_matrix": {' in (tmp_path / "p.partial.json").read_text()


def _patient(rank: Rank, port: int, folder: str) -> ClusterProfile | None:
    """Rank 1 dies; its body stays, or ``run_ranks`` would end rank 0 before it has said anything."""
    if rank.rank == 1 and (child := os.fork()):
        os.waitpid(child, 0)
        signal.pause()
    return as_launched(rank, port, folder, True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "tpu"}, "unknown device 'tpu': expected cpu, cuda or virtual"),
        ({"device": "cpu", "dtypes": ["int4"]}, "unknown dtype 'int4'"),
        ({"device": "virtual:h100"}, "as a virtual device"),
    ],
)
def test_wrong_settings_get_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises((InputError, RunError), match=sentence):
        profile_cluster(num_ranks=1, budget_s=SHORT_S, **settings)


def test_nproc_among_launched_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "a")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="8 ranks were started by a launcher"):
        profile_cluster(num_ranks=2, device="cpu")


def test_slurm_variables_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SLURM_STEP_NUM_TASKS", "16"),
        ("SLURM_PROCID", "9"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_STEP_NODELIST", "node[03-07,09],gpu1"),
        ("SLURM_JOB_ID", "4711"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "x")  # so that it is put back
    monkeypatch.delenv("MASTER_ADDR")
    assert launcher_ranks() == (9, 16, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node03", "24711")


def test_each_rank_gets_its_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 9})
    assert core_shares(2) == [[4, 5], [6, 7]]
    assert core_shares(5) == [[4], [5], [6], [7], [9]]
    assert core_shares(6) is None


def test_shapes_of_groups_on_two_nodes_of_four() -> None:
    shapes = group_shapes([[0, 1, 2, 3], [4, 5, 6, 7]])
    found = {(shape.num_ranks, shape.ranks_per_node): shape.groups for shape in shapes}
    assert found == {
        (2, 2): ((0, 1), (2, 3), (4, 5), (6, 7)),
        (4, 4): ((0, 1, 2, 3), (4, 5, 6, 7)),
        (2, 1): ((0, 4), (1, 5), (2, 6), (3, 7)),
        (4, 2): ((0, 1, 4, 5), (2, 3, 6, 7)),
        (8, 4): ((0, 1, 2, 3, 4, 5, 6, 7),),
    }


def test_disturbances_are_taken_out_of_a_curve() -> None:
    sizes = (1e3, 1e4, 1e5, 1e6)
    assert monotone(sizes, (1.0, 2.0, 4.0, 31.0)) == (1.0, 2.0, 4.0, 31.0)
    assert monotone(sizes, (9.0, 2.0, 4.0, 31.0)) == (2.0, 2.0, 4.0, 31.0)  # what disturbs adds time
    # level at the end: half of the mean slope (31 - 1) / 999e3 over the last 900e3 bytes
    lowered = 31.0 - 0.5 * 30.0 / 999e3 * 900e3
    assert monotone(sizes, (1.0, 2.0, 90.0, 31.0)) == pytest.approx((1.0, 2.0, lowered, 31.0))
    assert monotone((1e3,), (1.0,)) == (1.0,)


def test_means_lie_between_their_monotone_bounds() -> None:
    assert monotone_mean((1.0, 2.0, 4.0)) == (1.0, 2.0, 4.0)
    assert monotone_mean((3.0, 1.0, 4.0)) == (2.0, 2.0, 4.0)  # 3 then 3 from above, 1 then 1 from below
