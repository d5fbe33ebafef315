"""A dry run of a rank counts what the same rank really allocates, over gloo ranks on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from meshwright import InputError
from meshwright.cost_models.estimate import KINDS
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ParallelConfig, Recompute, Schedule
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.executors.apply import parallelize
from meshwright.executors.data_parallel import torch_dtype
from meshwright.executors.dry_run import dry_run_ranks
from meshwright.executors.expert_modules import find_experts
from meshwright.executors.memory_peak import Peak
from meshwright.executors.memory_steps import track_steps
from meshwright.executors.spec_model import build_spec_model
from meshwright.executors.trained import Trained
from meshwright.planner.plan import Plan, default_stages
from meshwright.profiler.launch import Rank, run_ranks
from meshwright.profiler.model import load_model

pytestmark = pytest.mark.multiprocess

SEQUENCE = 32
ATTEMPTS = 3  # gloo's threads may hold a message for a moment after it was waited for
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek": {**LLAMA, "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
                 "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8,
                 "num_local_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                 "moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_hidden_layers": 2},
    "opt": {"model_type": "opt", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "ffn_dim": 160,
            "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "dropout": 0.0},
}  # fmt: skip

CASES = [
    "bf16 n2 dp2 zero0",
    "fp32 n2 dp2 zero1 selective",
    "bf16 n2 dp2 zero3 full",
    "fp32 n1 dp2 zero3 tp2 sp",
    "bf16 n2 tp2 sp selective",
    "bf16 n4 pp2 dp2 zero1 1f1b",
    "fp32 n4 pp2 dp2 zero3 1f1b selective",
    "bf16 n4 pp2 interleaved full",
    "fp32 n4 pp2 tp2 sp 1f1b",
    "bf16 n4 pp2 zbv dp2 zero1",
    "fp32 n4 pp2 dualpipev full",
    "mixtral bf16 n2 dp2 zero2",
    "qwen3 fp32 n4 pp2 1f1b",
    "opt bf16 n2 full",
    "fp32 n2 cp_ring2 tp2 sp",
    "bf16 n2 cp_ring2 cp_ulysses2 zero1 selective",
    "bf16 n4 cp_ulysses2 pp2 1f1b full",
    "mixtral bf16 n2 dp2 ep2 zero1",
    "mixtral fp32 n2 tp2 dp2 ep2 etp2 sp zero2 full",
    "deepseek bf16 n2 dp2 cp_ring2 ep4 ep_chunks2 zero3 full",
]


def plan_of(line: str) -> tuple[Plan, Callable[[], nn.Module]]:
    """The plan that a line of ``CASES`` says, and what makes its model."""
    axes: dict[str, Any] = {}
    recipe, micro_batches, kind = RECIPES["fp32"], 1, ""
    for word in line.split():
        name = word.rstrip("0123456789")
        if word in RECIPES:
            recipe = RECIPES[word]
        elif word in HUGGING_FACE:
            kind = word
        elif word in list(Schedule):
            axes["schedule"] = Schedule(word)
            axes["vpp"] = 2 if word in ("interleaved", "zbv", "dualpipev") else 1
        elif word in list(Recompute):
            axes["recompute"] = Recompute(word)
        elif word == "sp":
            axes["sequence_parallel"] = True
        elif name == "n":
            micro_batches = int(word[1:])
        else:
            axes[{"zero": "zero_stage"}.get(name, name)] = int(word.removeprefix(name))
    axes["cp"] = axes.get("cp_ring", 1) * axes.get("cp_ulysses", 1)
    axes["dp_shard"] = axes.get("dp", 1) * axes["cp"] if axes.get("zero_stage") else 1
    config = ParallelConfig(vocab_parallel=axes.get("tp", 1) > 1, **axes)
    fields = HUGGING_FACE.get(kind, LLAMA)
    spec = load_model(fields)
    plan = Plan(
        framework="meshwright", model=spec,
        workload=Workload(seq_len=SEQUENCE, global_batch_size=micro_batches * config.dp, recipe=recipe),
        cluster_name="test", cluster_digest="", environment=None, config=config, placement=Placement(),
        stages=default_stages(spec, config, "cpu"), micro_batches_per_data_rank=(micro_batches,) * config.dp,
        cost=None, memory=None, search=None,
    )  # fmt: skip
    return plan, lambda: _hugging_face(fields) if kind else build_spec_model(spec)


def _hugging_face(fields: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {name: value for name, value in fields.items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(fields["model_type"], **options)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _chooses_evenly(num_experts: int, router: nn.Module, given: Any, output: Any) -> Any:
    """As a dry run takes it: values it does not have."""
    logits, weights, index = output
    return logits, weights, torch.arange(index.numel()).view(index.shape) % num_experts


def _really(rank: Rank, plan: Plan, build: Callable[[], nn.Module]) -> Peak:
    recipe = plan.workload.recipe
    torch.manual_seed(0)
    model = build().to(torch_dtype(recipe.master or recipe.params))
    if plan.model.moe is not None:
        for place in find_experts(model):
            model.get_submodule(place.router).register_forward_hook(partial(_chooses_evenly, place.shape.num_experts))
    trained = Trained(parallelize(model, plan), plan, torch.device("cpu"))
    return track_steps(trained, 2, kernels="cpu")


@pytest.mark.parametrize("line", CASES)
def test_dry_run_counts_what_a_real_rank_allocates(line: str) -> None:
    plan, build = plan_of(line)
    ranks = sorted({0, plan.config.world_size - 1})
    runs = dry_run_ranks(_on_meta(build), plan, ranks, kernels="cpu", all_microbatches=True)
    counted = [[getattr(run, f"{kind}_bytes") for kind in KINDS] for run in runs]
    attempts = 0
    while True:
        peaks = run_ranks(_really, plan.config.world_size, plan, build, timeout_s=60.0)
        real = [list(peaks[rank].bytes_by_kind) for rank in ranks]
        attempts += 1
        if attempts == ATTEMPTS or counted == [pytest.approx(kinds, rel=0.01) for kinds in real]:
            break
    assert counted == [pytest.approx(kinds, rel=0.01) for kinds in real]
    assert [run.peak_bytes for run in runs] == pytest.approx([sum(kinds) for kinds in real], rel=0.01)
    assert all((run.phase, run.module) == (peaks[run.rank].phase, peaks[run.rank].module) for run in runs)


@pytest.mark.parametrize("line", ["bf16 n9 pp2 dp2 zero1 1f1b", "bf16 n14 pp2 interleaved", "bf16 n14 pp2 zbv"])
def test_a_step_cut_short_peaks_as_the_whole_one(line: str) -> None:
    plan, _ = plan_of(line)
    ranks = [0, plan.config.world_size - 1]
    short, whole = (dry_run_ranks(None, plan, ranks, all_microbatches=everything) for everything in (False, True))
    assert all(run.microbatches_run < run.num_microbatches for run in short)
    kinds = [[[getattr(run, f"{kind}_bytes") for kind in KINDS] for run in runs] for runs in (short, whole)]
    assert kinds[0] == [pytest.approx(run, abs=512) for run in kinds[1]]  # the batch is rounded in one piece
    assert [run.module for run in short] == [run.module for run in whole]


def _refused(rank: Rank, plan: Plan, model: nn.Module) -> str:
    with pytest.raises(InputError) as caught:
        parallelize(model, plan)
    return str(caught.value)


def test_a_model_on_meta_is_for_dry_runs_alone() -> None:
    plan, build = plan_of("fp32 n2")
    said = run_ranks(_refused, 1, plan, _on_meta(build), timeout_s=60.0)
    assert said == [
        "this SpecModel is on the meta device, without weights: build it in memory, or try the plan on it with "
        "meshwright.dry_run"
    ]
