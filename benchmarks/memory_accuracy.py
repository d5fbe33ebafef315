"""Predicted peaks of plans for our own executors against the dry run's: per plan, per kind of tensor, and by axis.

Run it with ``python benchmarks/memory_accuracy.py [--ends] [--drawn N] [WORDS...]``; with words only plans whose
description has, for each, a word that starts so (``llama pp zero1``). Every plan's model is Hugging Face's, built on
the meta device. The dry run is of a rank of the stage predicted to hold the most, with ``--ends`` also of the first and
the last stage. About seven minutes on two cores, twice that with ``--ends``. With ``--drawn`` it is ``N`` plans drawn
at random, always the same, from all that are legal for a small Llama and a small Mixtral on 16 GPUs, every stage run.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from meshwright.cost_models.estimate import KINDS, MemoryBreakdown
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.step import estimate
from meshwright.cost_models.strategy import ParallelConfig, Recompute, Schedule
from meshwright.cost_models.targets import framework_named
from meshwright.cost_models.workload import Workload, recipe_named
from meshwright.executors.dry_run import DryRun, dry_run_ranks, stage_ranks
from meshwright.planner.plan import Plan, default_stages
from meshwright.planner.space import legal_space
from meshwright.profiler.cluster import load_cluster
from meshwright.profiler.model import load_model
from meshwright.profiler.record import record

SEED, DRAWN_GPUS, DRAWN_BATCH = 11, 16, 32
RESIDENT = ("params", "grads", "optimizer", "activations")

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
GPT2_XL = {
    "model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 16, "n_head": 25, "n_positions": 2048,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
# shapes of the models named, with fewer layers: what a layer holds is the same, and a dry run takes time for each
MODELS: dict[str, dict[str, Any]] = {
    "llama-1b": {**LLAMA_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
                 "head_dim": 64, "tie_word_embeddings": True},
    "llama-8b": LLAMA_8B,
    "llama-70b": {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 32,
                  "num_attention_heads": 64},
    "qwen3-4b": {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
                 "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                 "tie_word_embeddings": True},
    "gpt2-xl": GPT2_XL,
    "gpt-13b": {**GPT2_XL, "n_embd": 5120, "n_layer": 16, "n_head": 40},
    "opt-6.7b": {"model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384,
                 "num_hidden_layers": 12, "num_attention_heads": 32, "max_position_embeddings": 2048,
                 "word_embed_proj_dim": 4096, "dropout": 0.0},
    "mixtral-8x7b": MIXTRAL,
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
                      "moe_intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 32,
                      "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
                      "tie_word_embeddings": False},
    "qwen2-57b-a14b": {"model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 3584, "intermediate_size": 18944,
                       "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480,
                       "num_hidden_layers": 4, "num_attention_heads": 28, "num_key_value_heads": 4, "num_experts": 64,
                       "num_experts_per_tok": 8, "tie_word_embeddings": False},
    "deepseek-v3": {"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
                    "moe_intermediate_size": 2048, "num_hidden_layers": 4, "first_k_dense_replace": 1,
                    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
                    "num_local_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
                    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
                    "v_head_dim": 128, "tie_word_embeddings": False},
    "drawn-llama": {**LLAMA_8B, "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
                    "num_hidden_layers": 8, "num_attention_heads": 16},
    "drawn-mixtral": {**MIXTRAL, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
                      "num_attention_heads": 16},
}  # fmt: skip


@record
class Case:
    """One plan: a model of ``MODELS`` under a config."""

    model: str
    config: ParallelConfig
    seq_len: int = 2048
    microbatches: int = 2  # of each data rank
    recipe: str = "bf16"

    @property
    def words(self) -> str:
        """What tells it from others."""
        config = self.config.describe()
        return f"{self.model} {config} seq {self.seq_len} x{self.microbatches} {self.recipe}"


def case(model: str, words: str, **options: Any) -> Case:
    """``tp8 pp4 dp2 1f1b zero1 mbs1 sp full``: axes with their degrees, schedule, switches; cp as its two degrees."""
    fields: dict[str, Any] = {}
    names = {"zero": "zero_stage", "mbs": "micro_batch_size"}
    for word in words.split():
        letters = word.rstrip("0123456789")
        if word in list(Schedule):
            schedule = Schedule(word)
            chunks = {Schedule.INTERLEAVED: 2, Schedule.ZBV: 2, Schedule.DUALPIPEV: 2}.get(schedule, 1)
            fields |= {"schedule": schedule, "vpp": fields.get("vpp", chunks)}
        elif word in list(Recompute):
            fields["recompute"] = Recompute(word)
        elif word == "sp":
            fields["sequence_parallel"] = True
        else:
            fields[names.get(letters, letters)] = int(word[len(letters) :])
    fields["vocab_parallel"] = fields.get("tp", 1) > 1
    fields["cp"] = fields.get("cp_ring", 1) * fields.get("cp_ulysses", 1)
    if fields.get("zero_stage", 0):
        fields["dp_shard"] = fields.get("dp", 1) * fields["cp"]
    return Case(model=model, config=ParallelConfig(**fields), **options)


def cases() -> Iterator[Case]:
    """The grid: every schedule, ZeRO stage and recompute, sp, accumulation, recipes, 4 to 512 ranks."""
    for zero in range(4):
        for recompute in Recompute:
            yield case("llama-1b", f"dp8 zero{zero} {recompute}", microbatches=1 if recompute is Recompute.FULL else 4)
    for zero in (1, 2, 3):
        yield case("llama-8b", f"tp2 dp4 zero{zero} sp selective", microbatches=3)
        yield case("gpt2-xl", f"dp16 zero{zero} mbs2", microbatches=2)
        yield case("mixtral-8x7b", f"dp64 zero{zero} full", microbatches=2)
    for schedule, degrees in (
        (Schedule.GPIPE, "pp4"), (Schedule.ONE_F_ONE_B, "pp4"), (Schedule.INTERLEAVED, "pp4"), (Schedule.ZB_H1, "pp4"),
        (Schedule.ZBV, "pp2"), (Schedule.DUALPIPEV, "pp2"),
    ):  # fmt: skip
        yield case("llama-1b", f"{degrees} dp2 {schedule} zero1", microbatches=8)
        yield case("llama-1b", f"{degrees} tp2 dp2 {schedule} sp full", microbatches=8)
        yield case("gpt2-xl", f"{degrees} dp16 {schedule} zero1 selective", microbatches=8)
    for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED):
        yield case("qwen3-30b-a3b", f"pp4 dp8 {schedule} zero2 full", microbatches=4)
        yield case("mixtral-8x7b", f"pp4 dp16 {schedule} zero3 selective", microbatches=4)
        yield case("llama-8b", f"tp4 pp4 dp4 {schedule} zero2 sp", microbatches=4, seq_len=4096)
    for recompute in Recompute:
        yield case("llama-70b", f"tp8 pp8 dp8 1f1b zero1 sp {recompute}", microbatches=10, seq_len=4096)
        yield case("gpt-13b", f"tp4 pp2 dp8 1f1b zero1 {recompute}", microbatches=4)
        yield case("opt-6.7b", f"tp2 dp8 zero2 {recompute}", microbatches=2)
        yield case("qwen3-4b", f"dp4 zero2 {recompute}", microbatches=2, seq_len=4096)
        yield case("qwen3-4b", f"tp4 dp2 zero1 sp mbs2 {recompute}", microbatches=1)
        yield case("qwen3-30b-a3b", f"dp32 zero3 {recompute}", microbatches=2)
    yield case("llama-70b", "tp8 pp4 dp16 zero3 sp full 1f1b", microbatches=6, seq_len=8192)
    yield case("llama-70b", "dp512 zero3 full", microbatches=1, seq_len=4096)
    yield case("llama-8b", "tp8 dp64 zero1 sp mbs4", microbatches=2)
    yield case("llama-8b", "tp4 zero0", microbatches=2)
    yield case("llama-8b", "tp16 dp2 zero0 full", microbatches=2)
    yield case("gpt-13b", "pp8 dp2 1f1b zero0 full", microbatches=8)
    yield case("opt-6.7b", "pp4 dp2 interleaved zero1", microbatches=4)
    for recipe in ("bf16-pure", "bf16-grads"):
        yield case("llama-1b", "dp4 zero0 mbs2", microbatches=2, recipe=recipe)
        yield case("llama-1b", "dp4 zero1", microbatches=3, recipe=recipe)
        yield case("llama-1b", "pp2 dp4 1f1b zero2 selective", microbatches=4, recipe=recipe)
        yield case("gpt2-xl", "tp5 dp8 zero3", microbatches=2, recipe=recipe)


def five_dimensions() -> Iterator[Case]:
    """Context and expert parallelism, apart and folded, beside all else."""
    yield case("llama-8b", "cp_ring8 zero3 full", seq_len=65536, microbatches=1)
    yield case("llama-8b", "cp_ulysses8 zero3 selective", seq_len=32768, microbatches=1)
    yield case("llama-8b", "cp_ring4 cp_ulysses2 dp4 zero1", seq_len=32768, microbatches=2)
    yield case("llama-8b", "tp4 cp_ring2 dp2 zero2 sp full mbs2", seq_len=8192, microbatches=2)
    yield case("llama-70b", "tp8 cp_ring16 pp4 dp2 1f1b zero1 sp full", seq_len=131072, microbatches=4)
    yield case("llama-70b", "tp8 cp_ulysses4 pp2 dp2 interleaved zero1 sp selective", seq_len=16384, microbatches=4)
    yield case("qwen3-4b", "cp_ring2 cp_ulysses2 dp2 zero3", seq_len=16384, microbatches=2)
    for zero, recompute in zip((0, 1, 2, 3), (Recompute.NONE, *Recompute), strict=True):
        yield case("mixtral-8x7b", f"dp16 ep8 zero{zero} {recompute}", microbatches=2)
    yield case("mixtral-8x7b", "tp2 dp8 ep4 etp2 sp zero1", seq_len=4096, microbatches=2)
    yield case("mixtral-8x7b", "tp4 dp4 ep8 sp zero3 full", seq_len=4096, microbatches=2)
    yield case("mixtral-8x7b", "tp2 dp8 ep8 etp2 zero1 full", microbatches=2)
    yield case("mixtral-8x7b", "dp8 ep8 ep_chunks4 zero1 selective mbs2", microbatches=2)
    yield case("mixtral-8x7b", "tp2 cp_ring2 pp2 dp2 ep8 sp 1f1b zero1 full", seq_len=8192, microbatches=4)
    yield case("mixtral-8x7b", "pp4 dp8 ep4 zb-h1 zero1", microbatches=6)
    yield case("mixtral-8x7b", "pp2 dp8 ep8 zbv zero1 full", microbatches=4)
    yield case("qwen3-30b-a3b", "tp2 cp_ulysses2 dp4 ep16 sp zero2", seq_len=8192, microbatches=2)
    yield case("qwen3-30b-a3b", "pp2 dp16 ep16 interleaved zero2 full", microbatches=4)
    yield case("qwen2-57b-a14b", "tp2 dp16 ep8 etp2 sp zero1 selective", seq_len=4096, microbatches=2)
    yield case("qwen2-57b-a14b", "dp32 ep8 zero3 full ep_chunks2", seq_len=4096, microbatches=2)
    yield case("deepseek-v3", "dp64 ep64 zero1 full", seq_len=4096, microbatches=2)
    yield case("deepseek-v3", "pp2 dp32 ep32 1f1b zero1", seq_len=4096, microbatches=4)
    yield case("deepseek-v3", "tp4 dp16 ep16 sp zero1 selective", seq_len=4096, microbatches=2)
    yield case("deepseek-v3", "tp2 cp_ring4 dp8 ep64 sp zero3 full", seq_len=16384, microbatches=2)


def drawn(number: int) -> Iterator[Case]:
    """As many plans at random, the same each time."""
    generator = np.random.default_rng(SEED)
    for model in ("drawn-llama", "drawn-mixtral"):
        workload = Workload(seq_len=2048, global_batch_size=DRAWN_BATCH, recipe=recipe_named("bf16"))
        legal = legal_space(load_model(MODELS[model]), workload, DRAWN_GPUS, framework_named("meshwright")).batch
        chosen = generator.choice(len(legal), number // 2 + number % 2 * (model == "drawn-llama"), replace=False)
        for config in legal.take(chosen).configs():
            microbatches = DRAWN_BATCH // (config.dp * config.micro_batch_size)
            yield Case(model=model, config=config, microbatches=microbatches)


def plan_of(given: Case) -> Plan:
    """The plan of a case, for which no search is needed."""
    config, spec = given.config, load_model(MODELS[given.model])
    batch = given.microbatches * config.dp * config.micro_batch_size
    workload = Workload(seq_len=given.seq_len, global_batch_size=batch, recipe=recipe_named(given.recipe))
    return Plan(
        framework="meshwright", model=spec, workload=workload, cluster_name="h100-sxm", cluster_digest="",
        environment=None, config=config, placement=Placement(), stages=default_stages(spec, config, "h100"),
        micro_batches_per_data_rank=(given.microbatches,) * config.dp, cost=None, memory=None, search=None,
    )  # fmt: skip


def hugging_face(fields: dict[str, Any]) -> Any:
    """The model on the meta device."""
    import torch
    import transformers

    fields = dict(fields)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def compare(given: Case, *, ends: bool = False, everywhere: bool = False) -> tuple[MemoryBreakdown, DryRun]:
    """What is predicted of the fullest stage, and what the dry run of the fullest rank finds, of those that are run."""
    plan = plan_of(given)
    nodes = -(-given.config.world_size // 8)
    predicted = estimate(plan.model, plan.workload, load_cluster(f"h100-sxm:{max(nodes, 1) * 8}"), given.config).memory
    ranks = stage_ranks(plan)
    chosen = sorted({ranks[predicted.stage], *((ranks[0], ranks[-1]) if ends else ())})
    chosen = list(ranks) if everywhere else chosen
    found = dry_run_ranks(partial(hugging_face, MODELS[given.model]), plan, chosen)
    return predicted, max(found, key=lambda run: run.peak_bytes)


def error_of(predicted: MemoryBreakdown, found: DryRun, kind: str = "peak") -> float:
    """Relative error; of a kind that is under a hundredth of the peak, in shares of that hundredth."""
    said, counted = getattr(predicted, f"{kind}_bytes"), getattr(found, f"{kind}_bytes")
    return float((said - counted) / max(counted, 0.01 * found.peak_bytes))


def show(results: Sequence[tuple[Case, MemoryBreakdown, DryRun]], console: Console) -> None:
    """The table of plans and the summary by axis."""
    table = Table("plan", "dry run", "predicted", "error", *KINDS, "moment", "module")
    groups: dict[str, list[float]] = defaultdict(list)
    for given, predicted, found in results:
        error = error_of(predicted, found)
        kinds = [f"{100 * error_of(predicted, found, kind):+.1f}" for kind in KINDS]
        table.add_row(
            given.words, f"{found.peak_bytes / 1e9:.3f}", f"{predicted.peak_bytes / 1e9:.3f}", f"{100 * error:+.2f} %",
            *kinds, f"{predicted.moment}@{predicted.stage}", f"{found.phase} {found.module or found.operator}",
        )  # fmt: skip
        for name in axes(given):
            groups[name].append(abs(error))
        for kind in RESIDENT:
            groups[f"kind {kind}"].append(abs(error_of(predicted, found, kind)))
    console.print(table)
    summary = Table("group", "plans", "median", "worst", "within 2 %")
    for name in sorted(groups):
        errors = groups[name]
        within = sum(error <= 0.02 for error in errors)
        summary.add_row(
            name, str(len(errors)), f"{100 * median(errors):.2f} %", f"{100 * max(errors):.2f} %", str(within)
        )
    console.print(summary)


def axes(given: Case) -> Iterator[str]:
    """The groups that a plan belongs to."""
    config = given.config
    yield "all"
    yield f"model {given.model}"
    yield f"zero {config.zero_stage}"
    yield f"recompute {config.recompute}"
    yield f"schedule {config.schedule if config.pp > 1 else 'none'}"
    yield f"tp {'sp' if config.sequence_parallel else config.tp > 1}"
    if config.cp > 1:
        yield f"cp {'ring' * (config.cp_ring > 1)}{'x' * (1 < config.cp_ring < config.cp)}" + (
            "ulysses" * (config.cp_ulysses > 1)
        )
    if config.ep * config.etp > 1:
        yield f"ep{' x etp' * (config.etp > 1)}{' in chunks' * (config.ep_chunks > 1)}"
    yield f"recipe {given.recipe}"


def main() -> None:
    import torch  # noqa: F401  # before ranks are forked
    import transformers  # noqa: F401

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--ends", action="store_true")
    parser.add_argument("--drawn", type=int, default=0, metavar="N")
    given_words = parser.parse_args()
    everything = drawn(given_words.drawn) if given_words.drawn else chain(cases(), five_dimensions())
    chosen = [
        given
        for given in everything
        if all(any(said.startswith(word) for said in given.words.split()) for word in given_words.words)
    ]
    results = []
    for number, given in enumerate(chosen, start=1):
        predicted, found = compare(given, ends=given_words.ends, everywhere=bool(given_words.drawn))
        results.append((given, predicted, found))
        said = f"{number}/{len(chosen)} {given.words}: {100 * error_of(predicted, found):+.2f} %"
        print(said, file=sys.stderr, flush=True)
    show(results, Console(width=None if sys.stdout.isatty() else 260))


if __name__ == "__main__":
    main()
