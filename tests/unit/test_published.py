from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import InputError
from meshwright.cost_models.published import grouped, predict, read_published, run_of
from meshwright.cost_models.published_hardware import cluster_named, cluster_of, target_of
from meshwright.cost_models.published_measured import hardware_flops
from meshwright.cost_models.published_rows import REQUIRED, Malformed, Row, Skip, read_rows
from meshwright.cost_models.published_stages import redistributed
from meshwright.cost_models.step import estimate_batch
from meshwright.cost_models.strategy import ConfigBatch, Recompute, Schedule
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import DType
from meshwright.profiler.layers import NormKind

# a Megatron-DeepSpeed run of a GPT on half a node of A100s
GPT = {
    "id": "a-1", "family": "a", "gpu_type": "A100-80GB-SXM", "gpus_per_node": "8", "num_gpus": "4",
    "interconnect": "NVLink", "framework": "Megatron-DeepSpeed", "model": "gpt-h1024-l12", "arch_family": "gpt",
    "layers": "12", "hidden": "1024", "heads": "16", "kv_heads": "16", "ffn": "4096.0", "vocab": "50257.0",
    "seq_len": "1024", "precision": "fp16", "tp": "2", "pp": "2", "vpp": "1.0", "dp": "1", "cp": "1.0", "ep": "1.0",
    "micro_batch": "2.0", "global_batch": "16.0", "recompute": "full", "schedule": "1f1b", "step_time_s": "0.2",
    "usable_for": "time", "status": "ok",
}  # fmt: skip
LLAMA = GPT | {
    "id": "b-1", "model": "nanotron-llama-1.34B", "arch_family": "llama", "layers": "16", "hidden": "2048",
    "heads": "32", "kv_heads": "32", "ffn": "8192", "vocab": "131072", "params_b": "1.34", "precision": "bf16",
    "framework": "nanotron", "seq_len": "4096", "gpu_type": "H100-80GB-SXM", "num_gpus": "16", "tp": "2", "pp": "1",
    "dp": "8", "zero_stage": "1.0", "sp": "True", "recompute": "none", "interconnect": "NVLink4; AWS EFA inter-node",
}  # fmt: skip


def row(columns: dict[str, str], **changes: str) -> Row:
    return Row(columns | changes, 2)


def table(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for columns in rows for name in columns)))
        writer.writeheader()
        writer.writerows(rows)
    return path


class TestReading:
    def test_rows_in_order(self, tmp_path: Path) -> None:
        rows = read_rows(table(tmp_path / "runs.csv", GPT, GPT | {"id": "a-2"}))
        assert [one.text("id") for one in rows] == ["a-1", "a-2"]
        assert rows[0].integer("ffn") == 4096
        assert rows[1].line == 3

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("", "is empty"),
            ("\n\n", "is empty"),
            (",".join(REQUIRED) + "\n", "no rows"),
            ("id,family\n1,a\n", "lacks the columns gpu_type, num_gpus"),
            (",".join(REQUIRED) + "\n1,2,3\n", f"line 2: 3 fields, the header has {len(REQUIRED)}"),
            (",".join((*REQUIRED, "id")) + "\n", "column id twice"),
            (",".join(REQUIRED) + '\n"broken,2\n', "line 2"),
            (",".join(REQUIRED) + "\n" + "," * (len(REQUIRED) - 1) + "x\n", "id is blank"),
        ],
    )
    def test_malformed_tables_say_what_is_wrong(self, tmp_path: Path, content: str, said: str) -> None:
        path = tmp_path / "runs.csv"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=said):
            read_rows(path)

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "runs.csv").write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(InputError, match="not a text file in UTF-8"):
            read_rows(tmp_path / "runs.csv")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"cannot read .*none\.csv"):
            read_rows(tmp_path / "none.csv")

    def test_the_same_id_twice(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="line 3: id a-1 stands on line 2 already"):
            read_rows(table(tmp_path / "runs.csv", GPT, GPT))

    @pytest.mark.parametrize("bad", ["many", "nan", "inf", "2.5", "0", "-1"])
    def test_a_degree_that_is_none_is_the_files_fault(self, bad: str) -> None:
        with pytest.raises(Malformed, match=r"line 2 \(a-1\): tp must be"):
            run_of(row(GPT, tp=bad))

    def test_a_malformed_figure_stops_and_a_contradiction_is_skipped(self, tmp_path: Path) -> None:
        found = read_published(table(tmp_path / "runs.csv", GPT, GPT | {"id": "a-2", "kv_heads": "3"}))
        assert [run.row_id for run in found.runs] == ["a-1"]
        assert found.skipped == (("a-2", "a", "num_kv_heads=3 must divide num_heads=16"),)
        with pytest.raises(InputError, match=r"line 3 \(a-2\): hidden must be"):
            read_published(table(tmp_path / "runs.csv", GPT, GPT | {"id": "a-2", "hidden": "wide"}))

    @given(st.dictionaries(st.sampled_from(sorted(GPT)), st.text(max_size=6) | st.integers(-2, 300).map(str)))
    def test_whatever_a_row_holds_it_is_a_run_or_an_input_error(self, changes: dict[str, str]) -> None:
        try:
            assert run_of(row(GPT, **changes)).config.world_size >= 1
        except InputError as error:
            assert str(error)


class TestModels:
    def test_gpt_has_biases_positions_and_a_tied_head(self) -> None:
        model = run_of(row(GPT)).model
        hidden, layers = 1024, 12
        attention = 4 * hidden * hidden + 4 * hidden
        mlp = 8 * hidden * hidden + 5 * hidden
        norms = 4 * hidden
        whole = layers * (attention + mlp + norms) + 2 * hidden + (50257 + 1024) * hidden
        assert model.params == whole
        assert model.tied

    def test_the_number_of_parameters_tells_whether_the_head_is_tied(self) -> None:
        block = 4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048
        tied, apart = (16 * block + 2048 + tables * 131072 * 2048 for tables in (1, 2))
        assert run_of(row(LLAMA)).model.params == tied
        assert run_of(row(LLAMA, params_b="1.61")).model.params == apart
        assert run_of(row(LLAMA, params_b="")).model.params == apart  # Llama's public configs keep them apart
        assert run_of(row(LLAMA, params_b="9.9")).model.params == apart  # a figure that fits neither says nothing

    def test_llama_is_gated_with_rms_norm_and_grouped_heads(self) -> None:
        model = run_of(row(LLAMA, kv_heads="8")).model
        assert model.attention.num_kv_heads == 8
        assert {layer.norm_kind for layer in model.layers() if layer.kind == "norm"} == {NormKind.RMS}

    def test_equal_rows_share_one_record(self) -> None:
        assert run_of(row(GPT)).model is run_of(row(GPT, id="other")).model

    def test_experts(self) -> None:
        changes = {"arch_family": "moe", "experts": "8", "topk": "2", "moe_ffn": "16384", "framework": "Megatron-Core"}
        run = run_of(row(LLAMA, **changes, ep="4", etp=""))
        assert run.scope == "moe"
        assert run.model.moe is not None
        assert (run.model.moe.num_experts, run.model.moe.top_k, run.model.moe.expert_ffn_size) == (8, 2, 16384)
        assert (run.config.ep, run.config.etp) == (4, 2)  # blank: as many as tp

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"arch_family": "mamba"}, "no model of architecture 'mamba'"),
            ({"model": "llama3-8b LoRA"}, "LoRA"),
            ({"model": "deepseek-v9", "arch_family": "moe", "experts": "256"}, "MLA"),
            ({"precision": "int4"}, "no dtype recipe for precision 'int4'"),
            ({"global_batch": ""}, "global_batch is not published"),
        ],
    )
    def test_what_cannot_be_told_is_skipped_with_the_reason(self, changes: dict[str, str], said: str) -> None:
        with pytest.raises(Skip, match=said):
            run_of(row(LLAMA, **changes))

    @pytest.mark.parametrize(
        ("precision", "compute", "matmul"),
        [
            ("bf16", DType.BFLOAT16, None),
            ("fp16", DType.FLOAT16, None),
            ("fp8-cs", DType.BFLOAT16, DType.FLOAT8),
            ("fp8 rowwise", DType.BFLOAT16, DType.FLOAT8),
            ("mxfp8", DType.BFLOAT16, DType.FLOAT8),
            ("nvfp4", DType.BFLOAT16, DType.FLOAT4),
            ("bf16/fp16 (not stated)", DType.BFLOAT16, None),
        ],
    )
    def test_precision(self, precision: str, compute: DType, matmul: DType | None) -> None:
        recipe = run_of(row(LLAMA, precision=precision)).workload.recipe
        assert (recipe.compute, recipe.matmul) == (compute, matmul)

    @pytest.mark.parametrize(
        ("framework", "precision", "grads"),
        [
            ("Megatron-Core / Megatron-Bridge (NeMo)", "fp8", DType.BFLOAT16),
            ("NeMo / Megatron-Core", "bf16", DType.BFLOAT16),
            ("InternEvo", "bf16", DType.BFLOAT16),
            ("Megatron-LM", "bf16", DType.FLOAT32),
        ],
    )
    def test_gradients_are_reduced_as_the_measured_runs_did(self, framework: str, precision: str, grads: DType) -> None:
        assert run_of(row(LLAMA, framework=framework, precision=precision)).workload.recipe.grads is grads

    def test_examples_of_fine_tuning_are_packed_and_attend_to_themselves(self) -> None:
        run, whole = run_of(row(LLAMA, model="llama3-70b SFT")), run_of(row(LLAMA))
        assert (run.model.attention.window, whole.model.attention.window) == (100, 0)
        assert "examples of 200 tokens packed into a sequence assumed" in run.notes
        assert run.measured == whole.measured


class TestConfigs:
    def test_degrees_batch_and_recompute(self) -> None:
        run = run_of(row(GPT))
        assert run.config.describe() == "tp2 pp2 1f1b mbs2 vocab recompute-full"
        assert run.config.num_microbatches(run.workload.global_batch_size) == 8
        assert run.measured_step_s == 0.2

    def test_torchtitan_cuts_a_batch_into_as_many_micro_batches_as_stages(self) -> None:
        columns = {
            "framework": "torchtitan (FSDP2)",
            "tp": "1",
            "pp": "2",
            "dp": "4",
            "num_gpus": "8",
            "zero_stage": "3",
        }
        columns |= {"global_batch": "32", "micro_batch": "1", "notes": "microbatch 1 assumed", "schedule": "1F1B"}
        run = run_of(row(LLAMA, **columns))
        assert (run.config.micro_batch_size, run.config.zero_stage) == (4, 1)  # and keeps weights and gradients whole
        told = run_of(row(LLAMA, **columns | {"notes": "microbatch 1"}))
        assert told.config.micro_batch_size == 1

    def test_reduction_in_bf16_where_the_source_says_so(self) -> None:
        recipe = run_of(row(LLAMA, framework="llm-foundry", notes="MP mode PURE; precision label bf16")).workload.recipe
        assert recipe.grads is DType.BFLOAT16
        assert (
            run_of(row(LLAMA, framework="llm-foundry", notes="MP mode DEFAULT")).workload.recipe.grads is DType.FLOAT32
        )

    def test_zero_over_a_part_of_the_data_ranks(self) -> None:
        whole = run_of(row(LLAMA)).config
        assert (whole.zero_stage, whole.dp_shard) == (1, 8)
        part = run_of(row(LLAMA, optimizer_sharding="zero1 over 4 GPUs")).config
        assert (part.zero_stage, part.dp_shard) == (1, 4)
        node = run_of(row(LLAMA, zero_stage="3", optimizer_sharding="HSDP", gpus_per_node="4")).config
        assert (node.zero_stage, node.dp_shard) == (3, 4)
        alone = run_of(row(LLAMA, num_gpus="2", dp="1", global_batch="2")).config
        assert (alone.zero_stage, alone.dp_shard) == (0, 1)

    def test_blanks_are_filled_as_the_framework_does_and_said(self) -> None:
        run = run_of(row(LLAMA, sp="", recompute="", micro_batch="", grad_accum="2"))
        assert run.config.sequence_parallel
        assert run.config.recompute is Recompute.NONE
        assert run.config.micro_batch_size == 1
        assert "recompute not published: none assumed" in run.notes
        assert "sequence parallelism not published: on, as nanotron has it" in run.notes
        old = run_of(row(GPT, sp=""))
        assert not old.config.sequence_parallel

    @pytest.mark.parametrize(("where", "choice"), [("single", Recompute.NONE), ("multi", Recompute.FULL)])
    def test_a_simulators_input_is_not_a_runs_recompute(self, where: str, choice: Recompute) -> None:
        notes = f"[{where}-node] recompute=full and bucketing-off taken from config/validation/{where}/*.json"
        run = run_of(row(GPT, notes=notes))
        assert run.config.recompute is choice
        assert any("simulator" in note for note in run.notes) == (where == "single")

    @pytest.mark.parametrize(
        ("said", "vpp", "schedule", "chunks"),
        [
            ("1f1b", "1", Schedule.ONE_F_ONE_B, 1),
            ("interleaved 1f1b", "3", Schedule.INTERLEAVED, 3),
            ("1f1b/interleaved (Megatron)", "", Schedule.ONE_F_ONE_B, 1),
            ("Interleaved 1F1B", "", Schedule.INTERLEAVED, 2),
            ("1F1B-I", "2", Schedule.INTERLEAVED, 2),
            ("ZB-1p", "1", Schedule.ZB_H1, 1),
        ],
    )
    def test_schedules(self, said: str, vpp: str, schedule: Schedule, chunks: int) -> None:
        config = run_of(row(GPT, schedule=said, vpp=vpp)).config
        assert (config.schedule, config.vpp) == (schedule, chunks)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"dp": "3"}, r"tp\*cp\*pp\*dp=12 is not num_gpus=4"),
            ({"global_batch": "15"}, "does not divide global_batch=15"),
            ({"schedule": "ZB-2p"}, "no model of the schedule ZB-2p"),
            ({"layers": "2", "vpp": "4", "schedule": "interleaved"}, "2 layers cannot fill"),
        ],
    )
    def test_contradictions_are_skipped(self, changes: dict[str, str], said: str) -> None:
        with pytest.raises(Skip, match=said):
            run_of(row(GPT, **changes))


class TestStages:
    def test_layers_move_away_from_a_large_head(self) -> None:
        # a layer is 12 h^2 + 2 h s = 14 h^2, the head 50 h^2: 3.57 layers; (32 + 3.57) / 8 - 3.57 is 0.88, so one
        model = run_of(row(GPT, vocab="51200", layers="32", num_gpus="8", tp="1", pp="8")).model
        assert redistributed(model, 8, seq_len=1024) == [4, 4, 4, 4, 5, 5, 5, 1]

    def test_embedding_and_head_are_split_over_all_stages(self) -> None:
        run = run_of(row(GPT, schedule="Vocab-1"))
        assert run.counts == (((0.5, 6.0, 0.5),), ((0.5, 6.0, 0.5),))

    def test_ends_with_a_layer_less(self) -> None:
        run = run_of(row(GPT, layers="10", schedule="1F1B-I", vpp="6"))
        assert run.counts is not None
        chunks = np.array(run.counts)[:, :, 1]
        assert chunks.sum() == 10
        assert chunks[0, 0] == chunks[1, 5] == 0

    def test_the_targets_own_partition_otherwise(self) -> None:
        assert run_of(row(GPT)).counts is None


class TestHardware:
    @pytest.mark.parametrize(
        ("gpu", "network", "gpus", "name"),
        [
            ("H100-80GB-SXM", "NVLink4 intra-node; AWS EFA inter-node", "64", "h100-efa:8"),
            ("H100", "NVLink4, 400Gb/s/GPU IB", "64", "h100-sxm:8"),
            ("A100-80GB", "1600 Gbps RoCE inter-node", "16", "a100-roce-1600:2"),
            ("A100-40GB-SXM", "NVSwitch; 4x HDR IB per node", "96", "a100-40gb-4x200:12"),
            ("A100-80GB-SXM", "NVLink; 4x100Gb RoCE per node", "16", "a100-400gbps:2"),
            ("A100", "NVLink 150 GB/s intra; 800 Gbps/node inter (config)", "512", "a100-800gbps:64"),
            ("A100-80GB-SXM", "NVSwitch; 8x200Gb/s HDR IB per node", "64", "a100-sxm:8"),
            ("A100-80GB-SXM", "NVLink", "2", "a100-sxm:1"),
            ("V100-32GB-SXM3 (DGX-2)", "", "16", "v100-sxm3:1"),
        ],
    )
    def test_clusters(self, gpu: str, network: str, gpus: str, name: str) -> None:
        columns = {"gpu_type": gpu, "interconnect": network, "num_gpus": gpus, "gpus_per_node": ""}
        assert cluster_of(row(GPT, **columns)) == (name, ())

    def test_a_network_that_is_not_published_is_said(self) -> None:
        assert cluster_of(row(GPT, interconnect="", num_gpus="16")) == (
            "a100-sxm:2",
            ("network of a100-sxm assumed",),
        )

    def test_an_unknown_gpu_is_skipped(self) -> None:
        with pytest.raises(Skip, match="no preset for GPU 'TPU v5p'"):
            cluster_of(row(GPT, gpu_type="TPU v5p"))

    def test_nodes_with_fewer_devices(self) -> None:
        name, _ = cluster_of(row(GPT, gpus_per_node="4", num_gpus="16"))
        assert name == "a100-sxm:4x4"
        cluster = cluster_named(name)
        assert (cluster.num_devices, cluster.num_nodes, cluster.devices_per_node) == (16, 4, 4)
        assert [tier.group_size for tier in cluster.tiers] == [4, 16]

    @pytest.mark.parametrize(
        ("framework", "gpu", "target"),
        [
            ("nanotron", "H100", "nanotron"),
            ("Megatron-DeepSpeed", "A100", "megatron-deepspeed"),
            ("Megatron-LM", "A100", "megatron-lm"),
            ("Megatron-LM", "H100-80GB-SXM", "megatron-bridge"),
            ("NeMo / Megatron-Core", "GB200", "nemo"),
            ("Megatron-Core / Megatron-Bridge (NeMo)", "GB200", "megatron-bridge"),
            ("llm-foundry (PyTorch FSDP)", "A100", "llm-foundry"),
            ("torchtitan (FSDP2)", "H100", "torchtitan-eager"),
            ("fms-fsdp (FSDP1 + compile)", "H100", "torchtitan"),
            ("DeepSpeed ZeRO-3 in Megatron", "A100", "deepspeed"),
            ("MegaScale", "A100", "megascale"),
            ("InternEvo", "A800", "internevo"),
            ("Megatron Core v0.11", "A100", "megatron-bridge"),
            ("Megatron-LM fork (sail-sg)", "A100", "megatron-lm"),
            ("LLM Foundry", "A100", "llm-foundry"),
            ("MegaScale", "A100", "megascale"),
        ],
    )
    def test_targets(self, framework: str, gpu: str, target: str) -> None:
        assert target_of(row(GPT, framework=framework, gpu_type=gpu)) == target

    @pytest.mark.parametrize(
        ("framework", "columns", "target"),
        [
            ("torchtitan (FSDP2)", {"precision": "fp8"}, "torchtitan"),
            ("torchtitan (FSDP2)", {"notes": "Table 1; FSDP + torch.compile"}, "torchtitan"),
            ("torchtitan (FSDP2)", {"notes": "async TP; torch.compile", "tp": "8"}, "torchtitan-async-tp"),
            ("torchtitan (FSDP2)", {"notes": "async TP; torch.compile", "tp": "1"}, "torchtitan"),
            ("fms-fsdp (FSDP1)", {"notes": "compile=N"}, "torchtitan-eager"),
            ("Megatron-Bridge", {"precision": "nvfp4", "tp": "2"}, "megatron-bridge-nccl"),
            ("Megatron-Bridge", {"precision": "nvfp4", "tp": "1"}, "megatron-bridge"),
            ("Megatron-Bridge", {"precision": "fp8", "tp": "2"}, "megatron-bridge"),
            ("NeMo 24.07", {"interconnect": "NVLink; GPUDirect-TCPXO", "tp": "4"}, "nemo-nccl"),
            ("llm-foundry (PyTorch FSDP)", {"notes": "MP mode PURE; precision label bf16"}, "llm-foundry-torch1"),
            ("llm-foundry (PyTorch FSDP)", {"notes": "MP mode DEFAULT; precision label amp_bf16"}, "llm-foundry"),
        ],
    )
    def test_versions_and_modes(self, framework: str, columns: dict[str, str], target: str) -> None:
        assert target_of(row(GPT, framework=framework, gpu_type="A100", **columns)) == target

    @pytest.mark.parametrize(
        ("source", "attention", "target"),
        [
            ("Korthikanti et al. (arXiv 2205.05198)", "", "megatron-lm-2022"),
            ("Megatron-LM SC21 paper Table 1 (arXiv 2104.04473)", "", "megatron-lm-2021"),
            ("Megatron-LM README tables 2020", "", "megatron-lm-2021"),
            ("Megatron-LM README tables 2020", "flash", "megatron-lm"),
            ("Zero Bubble Pipeline Parallelism (arXiv 2401.10241)", "", "megatron-lm-2022"),
            ("Vocabulary Parallelism (arXiv 2411.05288)", "", "megatron-lm"),
            ("", "", "megatron-lm"),
        ],
    )
    def test_megatron_before_flash_attention(self, source: str, attention: str, target: str) -> None:
        changes = {"framework": "Megatron-LM", "gpu_type": "A100", "source": source, "attn_impl": attention}
        assert target_of(row(GPT, **changes)) == target

    @pytest.mark.parametrize("framework", ["MaxText (JAX)", "Paxml (JAX) TE BF16", "Colossal-AI", ""])
    def test_frameworks_without_a_target_are_skipped(self, framework: str) -> None:
        with pytest.raises(Skip, match=r"no target|not published"):
            target_of(row(GPT, framework=framework))


class TestMeasured:
    def test_a_row_with_blank_measurements_is_a_run_all_the_same(self) -> None:
        run = run_of(row(GPT, step_time_s=""))
        assert run.measured_step_s is None
        assert not run.has_measurement

    def test_throughput_stands_for_a_step(self) -> None:
        run = run_of(row(GPT, step_time_s="", tokens_per_s_per_gpu="1000"))
        assert run.measured_step_s == pytest.approx(16 * 1024 / (1000 * 4))

    def test_hardware_flops_are_the_papers_with_full_recompute(self) -> None:
        run = run_of(row(GPT, vocab="51200"))
        batch, seq, layers, hidden, vocab = 16, 1024, 12, 1024, 51200
        sc21 = 96 * batch * seq * layers * hidden**2 * (1 + seq / (6 * hidden) + vocab / (16 * layers * hidden))
        assert hardware_flops(run.model, run.workload, Recompute.FULL) == pytest.approx(sc21)

    def test_selective_recompute_repeats_attention(self) -> None:
        run = run_of(row(GPT))
        more = hardware_flops(run.model, run.workload, Recompute.SELECTIVE) - hardware_flops(
            run.model, run.workload, Recompute.NONE
        )
        assert more == pytest.approx(4 * 16 * 1024 * 1024 * 1024 * 12)  # 4 B s^2 h a layer

    def test_utilisation_in_the_sources_own_formula(self) -> None:
        columns = {"step_time_s": "", "usable_for": "util", "tflops_per_gpu": "100"}
        hardware = run_of(row(GPT, **columns, notes="TFLOPs are hardware FLOPs")).measured
        model = run_of(row(GPT, **columns)).measured
        assert hardware.step_s is None
        run = run_of(row(GPT))
        expected = hardware_flops(run.model, run.workload, Recompute.FULL) / (100e12 * 4)
        assert hardware.utilisation_step_s == pytest.approx(expected)
        assert model.utilisation_step_s == pytest.approx(
            hardware_flops(run.model, run.workload, Recompute.NONE) / (100e12 * 4)
        )

    def test_a_run_out_of_memory_has_no_time(self) -> None:
        assert run_of(row(GPT, oom="True", status="oom", usable_for="oom")).measured_step_s is None


class TestPredicting:
    def test_runs_in_one_call_get_what_each_would_alone(self, tmp_path: Path) -> None:
        rows = [
            GPT,
            GPT | {"id": "a-2", "tp": "1", "dp": "2"},
            LLAMA | {"id": "b-1"},
            GPT | {"id": "a-3", "global_batch": "32"},
        ]
        runs = read_published(table(tmp_path / "runs.csv", *rows)).runs
        groups = grouped(runs)
        assert [group.positions.tolist() for group in groups] == [[0, 1], [2], [3]]
        found = predict(groups)
        for index, run in enumerate(runs):
            alone = estimate_batch(
                run.model,
                run.workload,
                cluster_named(run.cluster),
                framework_named(run.framework),
                ConfigBatch.from_configs([run.config]),
            )
            assert found.step_s[index] == alone.step_s[0]
            assert found.peak_bytes[index] == alone.peak_bytes[0]
            assert found.fits[index] == alone.fits[0]
        assert found.reasons == (None,) * 4

    def test_clusters_and_targets_are_resolved_when_predicting(self) -> None:
        groups = grouped([run_of(row(GPT))])
        asked: list[str] = []

        def slower(name: str):  # type: ignore[no-untyped-def]
            asked.append(name)
            return cluster_named("v100-sxm:1")

        assert predict(groups, clusters=slower).step_s[0] > predict(groups).step_s[0]
        assert asked == ["a100-sxm:1"]

    def test_an_estimate_that_is_refused_gives_the_reason(self) -> None:
        def unknown(name: str):  # type: ignore[no-untyped-def]
            raise InputError(f"nothing known of {name}")

        found = predict(grouped([run_of(row(GPT))]), clusters=unknown)
        assert np.isnan(found.step_s[0])
        assert found.reasons == ("nothing known of a100-sxm:1",)
