"""Ranks that a launcher started: who this process is among them, and who is gone when they lose each other.

torchrun says it by RANK, WORLD_SIZE and MASTER_ADDR; Slurm by SLURM_PROCID in a step of several tasks.
"""

from __future__ import annotations

import os
import re
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from meshwright import InputError

SIGN_OF_LIFE_S = 6.0  # how long a rank that lost its peers waits for the others to say that they saw it too

# what a lost connection or an answer that did not come looks like in messages of gloo, NCCL and the store
_LOST = ("gloo/transport", "NCCL", "onnection closed", "onnection reset", "onnection refused", "imed out")


def launcher_ranks() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) that a launcher gave this process; None when it was started by hand.

    For Slurm, MASTER_ADDR and MASTER_PORT are set where they are not, the same on every rank of the step.

    Raises:
        InputError: a variable that is not a number, or Slurm's list of hosts is missing.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK", 0)
    if "SLURM_PROCID" in os.environ and _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_STEP_NODELIST", "")))
        os.environ.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0) % 20000))
        return _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_LOCALID", 0)
    return None


def _number(variable: str, default: int | None = None) -> int:
    text = os.environ.get(variable, default)
    try:
        return int(text)  # type: ignore[arg-type]  # only asked without a default where it is set
    except ValueError:
        raise InputError(f"the variable {variable} must be a whole number, found {text!r}") from None


def _first_host(node_list: str) -> str:
    """The first name of a Slurm node list: ``node[03-07,09],gpu1`` is ``node03``."""
    if not node_list:
        raise InputError("SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the first host")
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", node_list)
    if not match:
        raise InputError(f"SLURM_STEP_NODELIST {node_list!r} names no host: set MASTER_ADDR to the first host")
    return match[1] + (match[2] or "")


def lost_a_peer(error: BaseException) -> bool:
    """Whether ``error`` is what a rank sees when another one died or hangs, rather than a bug."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST)


def silent_ranks() -> list[int]:
    """Ranks that do not say within ``SIGN_OF_LIFE_S`` that they, too, saw the failure: those that died or hang.

    Every rank of the default process group that lost its peers calls this; ``[0]`` where the store, which is on rank
    0, is gone itself.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        store = _get_default_store()
        store.set(f"meshwright/saw/{rank}", "1")
        deadline = time.monotonic() + SIGN_OF_LIFE_S
        silent = list(range(size))
        while silent and time.monotonic() < deadline:
            time.sleep(0.1)
            silent = [other for other in silent if not store.check([f"meshwright/saw/{other}"])]
        return silent
    except RuntimeError:  # dist.DistError is one
        return [0]
