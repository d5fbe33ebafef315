"""A plan file in, dry runs out: what ``meshwright dry-run`` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from meshwright import InputError
from meshwright.executors.dry_run import DryRun, Kernels, OnProgress, dry_run_ranks, stage_ranks
from meshwright.executors.hf_model import HuggingFaceModel
from meshwright.planner.plan import Plan, load_plan
from meshwright.profiler.cluster import load_cluster


def dry_run_file(
    path: Path,
    *,
    rank: int | None = None,
    all_stages: bool = False,
    model: Path | None = None,
    cluster: str | None = None,
    kernels: Kernels = "cuda",
    all_microbatches: bool = False,
    on_progress: OnProgress = lambda share, text: None,
) -> tuple[Plan, tuple[DryRun, ...]]:
    """The plan in ``path`` and the dry runs of its ranks: of ``rank``, or of one rank of every stage.

    By default the rank is one of the stage that the plan predicts to bind; of a plan without a prediction rank 0.
    ``model`` is a Hugging Face config to build the model from, ``cluster`` the profile (or preset) that the plan was
    made for. Raises ``InputError`` as ``dry_run`` and ``load_plan`` do, or when both ``rank`` and ``all_stages`` are
    given.
    """
    if kernels not in ("cuda", "cpu"):
        raise InputError(f"kernels must be cuda or cpu, found {kernels!r}")
    if all_stages and rank is not None:
        raise InputError(f"give --rank {rank} or --all-stages, not both")
    plan = load_plan(path)
    firsts = stage_ranks(plan)
    if rank is None:
        rank = firsts[plan.memory.stage] if plan.memory else 0
    runs = dry_run_ranks(
        _hugging_face(model, plan) if model else None,
        plan,
        firsts if all_stages else [rank],
        cluster=load_cluster(cluster) if cluster else None,
        kernels=kernels,
        all_microbatches=all_microbatches,
        on_progress=on_progress,
    )
    return plan, runs


def binding(runs: tuple[DryRun, ...]) -> DryRun:
    """The run with the highest peak."""
    return max(runs, key=lambda run: run.peak_bytes)


def _hugging_face(source: Path, plan: Plan) -> Callable[[], nn.Module]:
    build = HuggingFaceModel(source)

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return build(plan.model)

    return on_meta
