"""The harness of the equality tests: a model on one process and the same model split over ranks, by tensor."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ParallelConfig, Recompute, Schedule
from meshwright.cost_models.workload import RECIPES, Workload
from meshwright.executors.apply import parallelize
from meshwright.executors.counting import count_collectives
from meshwright.executors.parallel_model import ParallelModel
from meshwright.planner.plan import Plan, default_stages
from meshwright.profiler.launch import Rank, RankError, run_ranks
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.model import ModelSpec, load_model

SEQUENCE = 8
CASE_TIMEOUT_S = 60.0
STEPS, LEARNING_RATE, MAX_NORM = 5, 1e-2, 1e-3  # a max-norm this small binds every step


def _example_llama() -> Any:
    path = Path(__file__).parents[2] / "examples" / "llama.py"
    spec = importlib.util.spec_from_file_location("example_llama", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_llama"] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a way of splitting it, and the batch it is compared on; written as one line by ``parse``."""

    model: str
    model_options: dict[str, Any]
    config: ParallelConfig
    micro_batches: tuple[int, ...]  # of each data rank
    ignored: float  # the share of targets that do not count, drawn unevenly: from 0 to twice this, by sequence
    dtype: torch.dtype
    recipe: str

    @property
    def steps(self) -> int:
        """How many are compared: in float32 rounding alone is looked at, in the gradients of one."""
        return STEPS if self.dtype is torch.float64 else 1


AXES = ("tp", "pp", "dp", "vpp", "mbs", "zero")
# words of a model, and what its config calls them
OPTIONS = {"vocab": "vocab_size", "kv": "num_kv_heads", "layers": "num_layers"}
HF_NAMES = {
    "vocab": "vocab_size", "kv": "num_key_value_heads", "layers": "num_hidden_layers", "window": "sliding_window",
}  # fmt: skip
EXPERT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts")
AUXILIARY_LOSS = 0.5  # its coefficient under the word "aux": large, so that it cannot hide


def parse(line: str) -> Case:
    """``"gpt2 tied vocab65 | tp2 dp2 zero1 sp full | n4 ignored0.5 float32"``: model | config | batch.

    ``n3+5``: data rank 0 takes 3 micro-batches and rank 1 takes 5; ``n4``: each takes 4. ``bf16``: master weights.
    """
    model_words, config_words, batch_words = (part.split() for part in line.split("|"))
    kind, *model_words = model_words
    names = OPTIONS if kind in ("example", "moe") else HF_NAMES
    model_options: dict[str, Any] = {}
    for word in model_words:
        if word == "aux":
            model_options["router_aux_loss_coef"] = AUXILIARY_LOSS
            model_options |= {"output_router_logits": True} if kind != "moe" else {}
        elif word == "capacity":
            model_options |= {"capacity_factor": 1.0, "group_tokens": 2}
        elif word.startswith("experts"):
            name = next(name for name in EXPERT_NAMES if name in MOE_SIZES[kind])
            model_options[name] = int(word.removeprefix("experts"))
        elif word == "dynamic":  # rotary frequencies that follow from the length of the sequence
            rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
            model_options |= {"rope_parameters": rope, "max_position_embeddings": SEQUENCE - 2}
        elif word == "twoway":
            model_options["causal"] = False
        elif word == "tied":
            model_options["tied" if kind == "example" else "tie_word_embeddings"] = True
        else:
            name = word.rstrip("0123456789")
            model_options[names[name]] = int(word.removeprefix(name))
    axes: dict[str, Any] = {}
    for word in config_words:
        name = word.rstrip("0123456789")
        if word in [schedule.value for schedule in Schedule]:
            axes["schedule"] = Schedule(word)
            axes.setdefault("vpp", 2 if word in ("interleaved", "zbv", "dualpipev") else 1)
        elif word in ("selective", "full"):
            axes["recompute"] = Recompute(word)
        elif word == "sp":
            axes["sequence_parallel"] = True
        else:
            names_of = {"mbs": "micro_batch_size", "zero": "zero_stage", "chunks": "ep_chunks"}
            axes[names_of.get(name, name)] = int(word.removeprefix(name))
    for name in ("ring", "ulysses"):  # of cp, which they make up
        if name in axes:
            axes[f"cp_{name}"] = axes.pop(name)
            axes["cp"] = axes.get("cp_ring", 1) * axes.get("cp_ulysses", 1)
    axes["dp_shard"] = axes.get("dp", 1) * axes.get("cp", 1) if axes.get("zero_stage") else 1
    config = ParallelConfig(vocab_parallel=axes.get("tp", 1) > 1, **axes)
    counts, *rest = batch_words
    assert all(word.startswith("ignored") or word in ("float32", "bf16") for word in rest), f"cannot read {rest}"
    shares = tuple(int(count) for count in counts.removeprefix("n").split("+"))
    ignored = [float(word.removeprefix("ignored")) for word in rest if word.startswith("ignored")]
    return Case(
        model=kind,
        model_options=model_options,
        config=config,
        micro_batches=shares if len(shares) == config.dp else shares * config.dp,
        ignored=ignored[0] if ignored else 0.0,
        dtype=torch.float32 if {"float32", "bf16"} & set(rest) else torch.float64,
        recipe="bf16" if "bf16" in rest else "fp32" if "float32" in rest else "fp64",
    )


# -- models ---------------------------------------------------------------------------------------------------------

LLAMA_SIZES = {
    "vocab_size": 64, "hidden": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48,
}  # fmt: skip


def _plain(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    example = _example_llama()
    config = example.LlamaConfig(**{**LLAMA_SIZES, **options})
    fields = {
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.hidden,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_seq_len, "tie_word_embeddings": config.tied,
    }  # fmt: skip
    return example.Llama(config), fields


def _example_moe(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    from moe import Moe, MoeConfig

    config = MoeConfig(**{**LLAMA_SIZES, "ffn_size": 0, "expert_ffn_size": 16, **options})
    fields = {
        "model_type": "mixtral", "vocab_size": config.vocab_size, "hidden_size": config.hidden,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "intermediate_size": config.expert_ffn_size,
        "num_local_experts": config.num_experts, "num_experts_per_tok": config.top_k,
    }  # fmt: skip
    return Moe(config), fields


HF_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 16,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 48,
            "max_position_embeddings": 16, "word_embed_proj_dim": 32, "dropout": 0.0},
}  # fmt: skip
DEFAULT_HF_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip


MOE_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2,
                  "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 8},
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
                    "topk_group": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 12,
                    "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 8,
                "sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}  # fmt: skip


def _hugging_face(kind: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    sizes = {**HF_SIZES.get(kind, DEFAULT_HF_SIZES), **MOE_SIZES.get(kind, {}), **options}
    if kind == "gpt_neox":
        sizes.pop("num_key_value_heads", None)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    attention = "eager" if kind == "gpt_oss" else "sdpa"  # all it has
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if kind in MOE_SIZES:
        model.set_experts_implementation("eager")
    return _exact(model), config.to_dict()


def _exact(model: nn.Module) -> nn.Module:
    """Norms and routers that compute in their input's dtype: Hugging Face's own round to float32, which hides what we
    look for."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            norm = nn.RMSNorm(weight.shape[0], eps=1e-6)
            norm.weight = weight
            model.set_submodule(name, norm)
        elif type(module).__name__.endswith("Router"):
            module.forward = partial(_in_own_dtype, module.forward)
    return model


def _in_own_dtype(forward: Callable[..., Any], x: Tensor) -> Any:
    if x.dtype is not torch.float64:
        return forward(x)
    with _Double():
        return forward(x)


class _Double(TorchFunctionMode):
    """What is asked to be rounded to float32 is not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float or (func is Tensor.type and args[1:] == (torch.float32,)):
            return args[0]
        kwargs = {key: value for key, value in (kwargs or {}).items() if value is not torch.float32}
        return func(*args, **kwargs)


def build_model(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    options = case.model_options
    examples: dict[str, Callable[..., tuple[nn.Module, dict[str, Any]]]] = {"example": _plain, "moe": _example_moe}
    build = examples.get(case.model, partial(_hugging_face, case.model))
    model, fields = build(**options)
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms too: their gradients must not hide behind zeros and ones
            weight.add_(0.1 * torch.randn(weight.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.rand(buffer.shape))
    return model.to(case.dtype), fields


def build_plan(case: Case, fields: dict[str, Any]) -> Plan:
    config, spec = case.config, _with_capacity(load_model(fields), case)
    batch = sum(case.micro_batches) * config.micro_batch_size
    return Plan(
        framework="meshwright", model=spec,
        workload=Workload(seq_len=SEQUENCE, global_batch_size=batch, recipe=RECIPES[case.recipe]),
        cluster_name="test", cluster_digest="", environment=None, config=config, placement=Placement(),
        stages=default_stages(spec, config, "cpu"), micro_batches_per_data_rank=case.micro_batches,
        cost=None, memory=None, search=None,
    )  # fmt: skip


def _with_capacity(spec: ModelSpec, case: Case) -> ModelSpec:
    changed = {
        name: case.model_options[name] for name in ("capacity_factor", "group_tokens") if name in case.model_options
    }
    blocks = tuple(
        replace(
            block,
            layers=tuple(replace(layer, **changed) if isinstance(layer, MoeLayer) else layer for layer in block.layers),
        )
        for block in spec.blocks
    )
    return replace(spec, blocks=blocks)


def batch_of(case: Case, plan: Plan, step: int) -> tuple[Tensor, Tensor]:
    """The global batch of one step: tokens, and targets of which an uneven share is ignored."""
    draw = torch.Generator().manual_seed(step)
    shape = (plan.workload.global_batch_size, SEQUENCE)
    tokens = torch.randint(plan.model.vocab_size, shape, generator=draw)
    targets = torch.randint(plan.model.vocab_size, shape, generator=draw)
    share = 2 * case.ignored * torch.rand((shape[0], 1), generator=draw)
    targets[torch.rand(shape, generator=draw) < share] = -100
    targets[0, 0] = 1
    return tokens, targets


# -- one process ----------------------------------------------------------------------------------------------------


def logits_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    assert isinstance(logits, Tensor)
    return logits


def _mean_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = logits_of(model(tokens))
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum()


def _auxiliary_loss(case: Case, model: Any, tokens: Tensor) -> Tensor:
    """Of each layer over each micro-batch, averaged over these: ``coefficient * experts * sum(share * mean)``."""
    found: list[Tensor] = []
    routers = [part for part in model.modules() if type(part).__name__.endswith("Router")]
    handles = [part.register_forward_hook(lambda _, args, output: found.append(output[0])) for part in routers]
    parts = tokens.split(case.config.micro_batch_size)
    for part in parts:
        model(part)
    for handle in handles:
        handle.remove()
    top_k = getattr(model.config, "num_experts_per_tok", None) or model.config.top_k
    total = torch.zeros((), dtype=torch.float64)
    for logits in found:
        probabilities = logits.softmax(-1)
        chosen = torch.zeros_like(logits).scatter(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        total = total + (chosen.mean(0) * probabilities.mean(0)).sum() * logits.shape[-1]
    return model.config.router_aux_loss_coef * total / len(parts)


@dataclass
class Reference:
    """What one process finds: the first step's loss and gradients, then five steps of AdamW under clipping."""

    loss: float
    grads: dict[str, Tensor]
    norms: list[float]
    weights: dict[str, Tensor]


def reference(case: Case, model: nn.Module, plan: Plan) -> Reference:
    grads: dict[str, Tensor] = {}
    norms, first_loss = [], 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-3)
    for step in range(case.steps):
        batch = batch_of(case, plan, step)
        loss = _mean_loss(model, *batch)
        (
            loss + _auxiliary_loss(case, model, batch[0]) if "router_aux_loss_coef" in case.model_options else loss
        ).backward()
        if step == 0:
            first_loss = loss.item()
            grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return Reference(loss=first_loss, grads=grads, norms=norms, weights=weights)


# -- ranks ----------------------------------------------------------------------------------------------------------


def share_of(plan: Plan, parallel: ParallelModel, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of the global batch that this data rank takes."""
    rows = [count * plan.config.micro_batch_size for count in plan.micro_batches_per_data_rank]
    start = sum(rows[: parallel.data_rank])
    stop = start + rows[parallel.data_rank]
    return batch[0][start:stop], batch[1][start:stop]


@dataclass
class Outcome:
    """One rank's distance from one process, by name of the parameter."""

    loss: float
    norms: list[float]
    grads: dict[str, float]
    weights: dict[str, float]


def run_split(rank: Rank, case: Case, model: nn.Module, plan: Plan, expected: Reference) -> Outcome:
    parallel = parallelize(model, plan)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=LEARNING_RATE, eps=1e-3)
    grads: dict[str, float] = {}
    norms, first_loss = [], 0.0
    for step in range(case.steps):
        loss = parallel.step(share_of(plan, parallel, batch_of(case, plan, step)))
        if step == 0:
            first_loss = loss.item()
            grads = errors_of(parallel.full_gradients(), expected.grads)
        norms.append(parallel.clip_grad_norm_(MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    trained = parallel.state_dict(full=True)
    assert trained.keys() >= expected.weights.keys()
    weights = {name: float((trained[name] - weight).abs().max()) for name, weight in expected.weights.items()}
    return Outcome(loss=first_loss, norms=norms, grads=grads, weights=weights)


def errors_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """max|found - expected| over max(max|expected|, a thousandth of the largest of all), by name."""
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return {
        name: float((found[name] - tensor).abs().max()) / max(float(tensor.abs().max()), 1e-3 * largest)
        for name, tensor in expected.items()
        if name in found
    }


def gradient_bounds(expected: dict[str, Tensor], *, double: bool) -> dict[str, float]:
    """How far apart gradients may be, in the measure of ``errors_of``.

    A key's bias has no gradient in exact arithmetic, as softmax ignores a shift; in float32 what is found is all
    rounding, so that such a tensor (a millionth of the largest gradient) is only held to three times the bound there.
    """
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return {
        name: 1e-10 if double else 1e-5 if float(tensor.abs().max()) > 1e-6 * largest else 3e-5
        for name, tensor in expected.items()
    }


def _ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """``run_ranks``, once more where a rank crashed: inside gloo, one in some thousand runs on a busy machine does."""
    try:
        return run_ranks(function, num_ranks, *args, timeout_s=CASE_TIMEOUT_S)
    except RankError as error:
        if "SIGSEGV" not in str(error) and "SIGABRT" not in str(error):
            raise
    return run_ranks(function, num_ranks, *args, timeout_s=CASE_TIMEOUT_S)


@pytest.fixture
def assert_equal() -> Callable[[str], None]:
    """Run a case on one process and on ranks, and compare loss, gradients, norms and weights after training."""

    def check(line: str) -> None:
        torch.set_num_threads(1)
        case = parse(line)
        model, fields = build_model(case)
        plan = build_plan(case, fields)
        expected = reference(case, build_model(case)[0], plan)
        outcomes = _ranks(run_split, plan.config.world_size, case, model, plan, expected)
        double = case.dtype is torch.float64
        bounds = gradient_bounds(expected.grads, double=double)
        for outcome in outcomes:
            assert outcome.loss == pytest.approx(expected.loss, rel=1e-12 if double else 1e-5)
            apart = {name: error for name, error in outcome.grads.items() if not error < bounds[name]}
            assert not apart, apart
            if double:
                assert outcome.norms == pytest.approx(expected.norms, rel=1e-10)
                assert max(outcome.weights.values()) < 1e-9, outcome.weights
        assert {name for outcome in outcomes for name in outcome.grads} == expected.grads.keys()

    return check


def _counted(parallel: ParallelModel, batch: tuple[Tensor, Tensor]) -> dict[tuple[str, str], tuple[int, int]]:
    with count_collectives(parallel) as counter:
        parallel.step(batch)
    return {key: (traffic.calls, traffic.message_bytes) for key, traffic in counter.table().items()}


def _applied(rank: Rank, case: Case, model: nn.Module, plan: Plan, function: Callable[..., Any]) -> Any:
    parallel = parallelize(model, plan)
    parallel.step(share_of(plan, parallel, batch_of(case, plan, 0)))
    return function(parallel, share_of(plan, parallel, batch_of(case, plan, 1)))


@pytest.fixture
def on_split() -> Callable[[str, Callable[..., Any]], list[Any]]:
    """``function(parallel, batch)`` after a first step, on each rank."""

    def call(line: str, function: Callable[..., Any]) -> list[Any]:
        case = parse(line)
        model, fields = build_model(case)
        plan = build_plan(case, fields)
        return run_ranks(_applied, plan.config.world_size, case, model, plan, function, timeout_s=CASE_TIMEOUT_S)

    return call


@pytest.fixture
def count_step(on_split: Callable[..., Any]) -> Callable[[str], list[dict[tuple[str, str], tuple[int, int]]]]:
    """The second step's (calls, bytes) by (operator, axis), of each rank; the first step of a pipeline votes."""
    return lambda line: on_split(line, _counted)


@pytest.fixture
def in_one_process() -> Callable[[str], tuple[Any, Plan, list[tuple[Tensor, Tensor]]]]:
    """The model of a case as it was before it was split, its plan, and the global batches of the first two steps."""

    def build(line: str) -> tuple[Any, Plan, list[tuple[Tensor, Tensor]]]:
        case = parse(line)
        model, fields = build_model(case)
        plan = build_plan(case, fields)
        return model, plan, [batch_of(case, plan, step) for step in range(2)]

    return build
