"""What columns say of memory: kinds and units of peaks, and what they leave open of precision, sharding, recompute."""

from __future__ import annotations

import pytest

from meshwright.cost_models.published import run_of
from meshwright.cost_models.published_hardware import target_of
from meshwright.cost_models.published_measured import PeakKind
from meshwright.cost_models.published_rows import Row
from meshwright.cost_models.strategy import Recompute
from meshwright.cost_models.workload import DType

GIB, GB = 1024**3, 10**9
GPT = {
    "id": "a-1", "family": "a", "gpu_type": "A100-80GB-SXM", "gpus_per_node": "8", "num_gpus": "8",
    "interconnect": "NVLink", "framework": "Megatron-LM", "model": "gpt-4B", "arch_family": "gpt",
    "layers": "32", "hidden": "3072", "heads": "24", "kv_heads": "24", "ffn": "12288", "vocab": "32000",
    "seq_len": "2048", "precision": "bf16", "tp": "1", "pp": "8", "vpp": "1.0", "dp": "1", "cp": "1.0", "ep": "1.0",
    "micro_batch": "1.0", "global_batch": "128.0", "recompute": "none", "schedule": "1f1b", "step_time_s": "5",
    "usable_for": "time", "status": "ok", "attn_impl": "flash",
}  # fmt: skip


def row(**changes: str) -> Row:
    return Row(GPT | changes, 2)


class TestPeaks:
    @pytest.mark.parametrize(
        ("said", "kind"),
        [
            ("GiB, max reserved over GPUs (torchtitan metric)", PeakKind.RESERVED),
            ("column matching the paper peak memory (max allocated); reserved column 16702 MB", PeakKind.ALLOCATED),
            ("GiB, params+optimizer 45.5 + activations 12.3", PeakKind.ALLOCATED),
            ("unspecified (nanotron logs max_memory_allocated and max_memory_reserved)", PeakKind.UNSPECIFIED),
            ("", PeakKind.UNSPECIFIED),
        ],
    )
    def test_kinds(self, said: str, kind: PeakKind) -> None:
        assert run_of(row(peak_mem_gb="10", mem_kind=said)).measured.peak_kind is kind

    def test_a_row_without_a_peak_has_no_kind(self) -> None:
        assert run_of(row(mem_kind="max reserved")).measured.peak_kind is PeakKind.UNSPECIFIED

    def test_tables_of_internevo_are_what_the_driver_shows(self) -> None:
        assert run_of(row(peak_mem_gb="10", framework="InternEvo")).measured.peak_kind is PeakKind.DEVICE

    @pytest.mark.parametrize(
        ("changes", "unit"),
        [
            ({}, GIB),
            ({"framework": "Megatron-Core / Megatron-Bridge"}, GB),
            ({"source": "Zero Bubble Pipeline Parallelism (arXiv 2401.10241) Table 4"}, GB),
        ],
    )
    def test_units(self, changes: dict[str, str], unit: int) -> None:
        assert run_of(row(peak_mem_gb="10", **changes)).measured.peak_bytes == 10 * unit


class TestWhatColumnsLeaveOpen:
    def test_forks_that_train_in_float16(self) -> None:
        run = run_of(row(framework="Megatron-LM fork", precision="bf16/fp16 (not stated)"))
        assert run.workload.recipe.compute is DType.FLOAT16
        assert "fp16 assumed" in run.notes

    @pytest.mark.parametrize(
        ("schedule", "target"),
        [
            ("Vocab-1", "megatron-lm-vocab-1"),
            ("1F1B Vocab-2", "megatron-lm-vocab-2"),
            ("1F1B Redis", "megatron-lm"),
            ("Interlaced", "megatron-lm-interlaced"),
        ],
    )
    def test_vocabulary_parallelism_is_a_target_of_its_own(self, schedule: str, target: str) -> None:
        assert target_of(row(schedule=schedule)) == target

    def test_the_loss_of_torchtitan_by_date(self) -> None:
        columns = {"framework": "torchtitan (FSDP2)", "precision": "fp8", "tp": "1", "pp": "1", "dp": "8"}
        old = "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
        new = "pytorch/torchtitan benchmarks/llama3-8b_h200_202506_trainy.md"
        assert target_of(row(**columns, source_path=old)) == "torchtitan-2024"
        assert target_of(row(**columns, source_path=new)) == "torchtitan"

    def test_recipes_with_fsdp_keep_activations_on_the_host(self) -> None:
        columns = {"gpu_type": "GB200", "gpus_per_node": "72", "pp": "1", "dp": "8", "zero_stage": "3"}
        assert target_of(row(framework="Megatron-Bridge", **columns)) == "megatron-bridge-offload"
        assert target_of(row(framework="Megatron-Core", **columns)) == "megatron-bridge"

    def test_deepspeed_where_only_the_sharding_says_so(self) -> None:
        columns = {"framework": "", "optimizer_sharding": "zero3 (DeepSpeed)", "source": "arXiv 2104.04473"}
        assert target_of(row(**columns, attn_impl="")) == "deepspeed-2021"

    def test_states_that_exceed_a_device_are_sharded(self) -> None:
        # 16 bytes for each of 3.8 billion parameters: 30 GB on each of two stages
        columns = {"framework": "Megatron-DeepSpeed", "precision": "fp16", "dp": "4", "pp": "2", "attn_impl": ""}
        assert run_of(row(**columns, gpu_type="A100-40GB-SXM")).config.zero_stage == 0
        large = {"hidden": "6144", "heads": "48", "kv_heads": "48", "ffn": "24576"}  # 14.7 billion: 118 GB a stage
        run = run_of(row(**columns, **large, gpu_type="A100-40GB-SXM"))
        assert (run.config.zero_stage, run.config.dp_shard) == (1, 4)
        assert any(note.startswith("ZeRO not published: stage 1") for note in run.notes)

    def test_accumulation_of_a_variant_in_parentheses(self) -> None:
        note = "this is the parenthesised finer-granularity variant; published GA=1 (64)"
        columns = {"framework": "Megatron-Bridge", "gpu_type": "H100", "pp": "4", "dp": "2", "micro_batch": "2"}
        assert run_of(row(**columns, notes=note)).config.micro_batch_size == 1
        assert run_of(row(**columns, notes="published GA=1 (64)")).config.micro_batch_size == 2

    @pytest.mark.parametrize(("pp", "micro"), [("1", "2"), ("4", "2")])
    def test_a_recipe_where_a_table_is_misprinted(self, pp: str, micro: str) -> None:
        columns = {"framework": "Megatron-Core / Megatron-Bridge (NeMo)", "model": "llama3-70b", "gpu_type": "GB300"}
        columns |= {"gpus_per_node": "72", "arch_family": "llama", "layers": "80", "precision": "mxfp8", "schedule": ""}
        columns |= {"num_gpus": "64", "pp": pp, "dp": str(64 // int(pp)), "vpp": "", "micro_batch": micro}
        run = run_of(row(**columns, zero_stage="1", recompute=""))
        assert (run.config.pp, run.config.vpp, run.config.dp, run.config.micro_batch_size) == (4, 5, 16, 1)
        fsdp = run_of(row(**columns, zero_stage="3", recompute=""))
        assert (fsdp.config.pp, fsdp.config.micro_batch_size) == (int(pp), 2)

    def test_recompute_of_whole_blocks(self) -> None:
        columns = {"framework": "fms-fsdp (FSDP1 + compile)", "pp": "1", "dp": "8", "zero_stage": "3.0"}
        columns |= {"precision": "bf16", "arch_family": "llama", "recompute": "selective"}
        some = run_of(row(**columns, mfu_pct="43", notes="HFU 46%"))
        most = run_of(row(**columns, mfu_pct="38", notes="HFU 47%"))
        assert (some.config.recompute, most.config.recompute) == (Recompute.SELECTIVE, Recompute.FULL)

    def test_megatrons_largest_model_recomputes_its_scores(self) -> None:
        assert run_of(row(model="gpt-530B", recompute="")).config.recompute is Recompute.SELECTIVE
        assert run_of(row(model="gpt-4B", recompute="")).config.recompute is Recompute.NONE
