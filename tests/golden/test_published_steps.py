"""Predictions on datasheet presets against published step times of PyTorch FSDP2 runs.

The rows are those of the measurements folder (``MESHWRIGHT_VALIDATION``, by default ``../shared/validation``) that
torchtitan published for dense Llama models on 64 A100 without tensor or pipeline parallelism: what our own executor
would run, FSDP2 over torch. Nothing is fitted to them. The bound is wide on purpose: presets hold datasheet figures and
assumed efficiencies, and some of the rows are compiled, which the target's traits do not know.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from meshwright import ParallelConfig, Workload, estimate, load_cluster, load_model
from meshwright.cost_models.strategy import Recompute

FOLDER = Path(os.environ.get("MESHWRIGHT_VALIDATION", Path(__file__).parents[2] / ".." / "shared" / "validation"))
MODELS = {"llama3.1-8B": "llama3.1-8b", "llama3.1-70B": "llama3.1-70b", "llama2-13B": "llama2-13b"}


def rows() -> list[dict[str, str]]:
    file = FOLDER / "dev.csv"
    if not file.exists():
        pytest.skip(f"no published measurements at {file}: set MESHWRIGHT_VALIDATION to their folder")
    with file.open(encoding="utf-8") as text:
        return [
            row
            for row in csv.DictReader(text)
            if row["family"] == "torchtitan"
            and row["model"] in MODELS
            and row["precision"] == "bf16"
            and row["gpu_type"].startswith("A100")
            and (float(row["tp"]), float(row["pp"]), float(row["cp"] or 1)) == (1, 1, 1)
            and row["step_time_s_derived"]
        ]


def predicted_s(row: dict[str, str]) -> float:
    dp = int(float(row["dp"]))
    config = ParallelConfig(
        dp=dp,
        dp_shard=dp,
        zero_stage=int(float(row["zero_stage"])),
        micro_batch_size=int(float(row["micro_batch"])),
        recompute=Recompute(row["recompute"]),
    )
    workload = Workload(seq_len=int(float(row["seq_len"])), global_batch_size=int(float(row["global_batch"])))
    cluster = load_cluster(f"a100-sxm:{int(float(row['num_gpus'])) // 8}")
    return estimate(load_model(MODELS[row["model"]]), workload, cluster, config).cost.step_s


def test_fsdp2_steps_on_64_a100() -> None:
    published = rows()
    assert len(published) >= 4
    errors = [predicted_s(row) / float(row["step_time_s_derived"]) - 1 for row in published]
    print([f"{row['id']} {error:+.1%}" for row, error in zip(published, errors, strict=True)])
    assert np.median(np.abs(errors)) < 0.25
    assert max(map(abs, errors)) < 0.35
