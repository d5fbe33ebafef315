"""What the parent of started ranks says when one of them gives up."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from meshwright import InfeasibleError, InputError, RunError
from meshwright.profiler.launch import Rank, RankError, run_ranks


def _gives_up(rank: Rank, error: Exception) -> None:
    raise error


@pytest.mark.parametrize("kind", [InputError, InfeasibleError])
def test_what_a_user_gave_wrong_stays_that_kind_of_error(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^tp=3 does not divide 8$"):
        run_ranks(_gives_up, 2, kind("tp=3 does not divide 8"), timeout_s=20, backend=None)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(RunError("lost its peers"), r"^rank 0 of 1 on \S+: lost its peers$"), (KeyError("x"), r"(?s)raised:.*KeyError")],
)
def test_another_failure_names_the_rank(error: Exception, sentence: str) -> None:
    with pytest.raises(RankError, match=sentence):
        run_ranks(_gives_up, 1, error, timeout_s=20, backend=None)


SLEEPER = r"""
import os, time
from meshwright.profiler.launch import run_ranks

def sleep(rank):
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(60)

run_ranks(sleep, 2, timeout_s=60, backend=None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can promise it")
def test_ranks_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        ranks = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 20
    while any(_runs(rank) for rank in ranks):
        assert time.monotonic() < deadline, f"still there: {ranks}"
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"  # a zombie of an init that does not reap
    except FileNotFoundError:
        return False


def test_the_parents_environment_is_left_alone() -> None:
    before = dict(os.environ)
    assert run_ranks(_own_number, 2, timeout_s=20, backend=None) == [(0, "0"), (1, "1")]
    assert dict(os.environ) == before


def _own_number(rank: Rank) -> tuple[int, str]:
    return rank.rank, os.environ["RANK"]
