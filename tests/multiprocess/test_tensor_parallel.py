"""Tensor parallelism over real ranks: loss and every gradient equal the whole model's, for all families and options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from examples.llama import Llama, LlamaConfig
from meshwright.executors.loss import cross_entropy, loss_on_shards
from meshwright.executors.tensor_parallel import TensorParallel, apply_tensor_parallel, find_tensor_parallel_rules
from meshwright.profiler.launch import Rank, run_ranks

pytestmark = pytest.mark.multiprocess

BATCH, SEQUENCE = 3, 8


def build(family: str, *, heads: int = 4, kv_heads: int = 2, vocab: int = 63, tied: bool = False) -> nn.Module:
    """A small model of that family, two layers, with weights and biases of ordinary size, in float64."""
    torch.manual_seed(0)
    model = _unscaled(family, heads, kv_heads, vocab, tied).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * (0.2 if weight.dim() > 1 else 0.3) + (weight.dim() == 1))
    return model.train()


def _unscaled(family: str, heads: int, kv_heads: int, vocab: int, tied: bool) -> nn.Module:
    if family == "example":
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "vocab_size": vocab, "tied": tied}
        return Llama(LlamaConfig(hidden=32, ffn_size=48, num_layers=2, **sizes))
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "use_cache": False,
    }
    gated = {**common, "intermediate_size": 48, "num_key_value_heads": kv_heads}
    if family == "gpt2":
        config: Any = transformers.GPT2Config(**common, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    elif family.startswith("opt"):
        other = {"word_embed_proj_dim": 16, "do_layer_norm_before": False} if family == "opt-350m" else {}
        sizes = {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32, **other}
        config = transformers.OPTConfig(**common, **sizes)
    elif family == "gpt_neox":
        sizes = {"intermediate_size": 48, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        config = transformers.GPTNeoXConfig(**common, **sizes)
    else:
        extra = {"head_dim": 32 // heads} if family == "qwen3" else {}
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        config = getattr(transformers, f"{name}Config")(**gated, **extra)
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def batch(vocab: int) -> tuple[Tensor, Tensor]:
    """Tokens, and targets of which an uneven part is ignored (one row wholly)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, vocab, (BATCH, SEQUENCE), generator=generator)
    targets = torch.randint(0, vocab, (BATCH, SEQUENCE), generator=generator)
    targets[0, 2:] = -100
    targets[1] = -100
    targets[2, 5] = vocab - 1
    return tokens, targets


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits


def reference(model: nn.Module, vocab: int) -> tuple[Tensor, dict[str, Tensor]]:
    tokens, targets = batch(vocab)
    total, count = cross_entropy(logits(model, tokens), targets)
    loss = total / count
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest of max|g - ref| / max(max|ref|, 1e-3 * largest gradient of the model) over all parameters, and where."""
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    errors = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        scale = max(value.abs().max().item(), 1e-3 * largest)
        errors[name] = (found[name] - value).abs().max().item() / scale
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def recompute_blocks(model: nn.Module, blocks: str) -> None:
    for block in model.get_submodule(blocks).children():
        forward = block.forward
        block.forward = lambda *args, forward=forward, **kwargs: checkpoint(  # type: ignore[method-assign]
            forward, *args, use_reentrant=False, **kwargs
        )


def split_gradients(split: TensorParallel, model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert weight.grad.placements == weight.placements  # type: ignore[attr-defined]
        gradients[name] = split.whole(name, weight.grad)
    return gradients


def run_case(mesh: DeviceMesh, case: dict[str, Any]) -> tuple[float, float, str, bool]:
    """Error of the loss and of the gradients against the whole model; and whether whole weights come back exactly."""
    options = {key: case[key] for key in ("heads", "kv_heads", "vocab", "tied") if key in case}
    vocab = case.get("vocab", 63)
    model = build(case["family"], **options).to(case.get("dtype", torch.float64))
    expected_loss, expected = reference(copy.deepcopy(model), vocab)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rules = find_tensor_parallel_rules(model)
    split = apply_tensor_parallel(model, rules, mesh, sequence_parallel=case.get("sp", False))
    if case.get("recompute"):
        recompute_blocks(model, rules.anatomy.blocks)
    tokens, targets = batch(vocab)
    loss_fn = loss_on_shards(case.get("loss"), group=mesh.get_group(), vocab_size=vocab)
    total, count = loss_fn(logits(model, tokens), targets)
    (total / count).backward()
    split.finish_gradients()
    found = split_gradients(split, model)
    same = all(
        torch.equal(split.whole(name, weight.detach()), weights[name]) for name, weight in model.named_parameters()
    )
    loss_error = abs((total / count).item() - expected_loss.item()) / abs(expected_loss.item())
    return loss_error, *error(found, expected), same


def run_cases(rank: Rank, cases: list[dict[str, Any]]) -> list[tuple[float, float, str, bool]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return [run_case(mesh, case) for case in cases]


FAMILIES = ("example", "llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "opt-350m", "gpt_neox")
CASES: list[dict[str, Any]] = [
    *({"family": family, "sp": sp} for family in FAMILIES for sp in (False, True)),
    *({"family": family, "sp": True, "recompute": True, "tied": True} for family in FAMILIES),
    *({"family": family, "recompute": True} for family in ("example", "qwen3", "gpt2")),
    *({"family": family, "kv_heads": 1, "sp": sp} for family in ("example", "qwen2", "qwen3") for sp in (False, True)),
    *({"family": family, "tied": True, "vocab": 61} for family in ("llama", "gpt2", "opt")),
    {"family": "gpt_neox", "vocab": 13},  # with tp=4, rank 3 holds one real column
    {"family": "example", "loss": cross_entropy, "vocab": 61},
    {"family": "qwen3", "loss": cross_entropy, "sp": True},
]


def check(num_ranks: int, cases: list[dict[str, Any]], limit: float) -> None:
    for results in run_ranks(run_cases, num_ranks, cases, timeout_s=200):
        for case, (loss_error, gradient_error, worst, same) in zip(cases, results, strict=True):
            assert loss_error < limit, (case, loss_error)
            assert gradient_error < limit, (case, gradient_error, worst)
            assert same, case


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_float64(num_ranks: int) -> None:
    check(num_ranks, CASES, 1e-10)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_float32(num_ranks: int) -> None:
    check(num_ranks, [{**case, "dtype": torch.float32} for case in CASES], 1e-5)
