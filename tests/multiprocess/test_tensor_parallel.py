"""Tensor parallelism over real ranks: loss and every gradient equal the whole model's, for all families and options."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from meshwright import InputError
from meshwright.executors.counting import CollectiveCounter
from meshwright.executors.loss import cross_entropy, loss_on_shards
from meshwright.executors.tensor_parallel import TensorParallel, apply_tensor_parallel, find_tensor_parallel_rules
from meshwright.profiler.launch import Rank, run_ranks

pytestmark = pytest.mark.multiprocess

BATCH, SEQUENCE = 3, 8


def example() -> Any:
    """The module examples/llama.py."""
    path = Path(__file__).parents[2] / "examples" / "llama.py"
    spec = importlib.util.spec_from_file_location("example_llama_tp", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(family: str, *, heads: int = 4, kv_heads: int = 2, vocab: int = 63, tied: bool = False) -> nn.Module:
    """A small model of that family, two layers, with weights and biases of ordinary size, in float64."""
    torch.manual_seed(0)
    model = _unscaled(family, heads, kv_heads, vocab, tied).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = weight.dim() == 1 and name.endswith("weight")
            weight.copy_(torch.randn(weight.shape) * 0.05 + is_norm)
    if family == "qwen3":
        _keep_double_precision(model)
    return model.train()


def _keep_double_precision(model: nn.Module) -> None:
    """Hugging Face's RMSNorm computes in float32 whatever it is given. Where tp exceeds the key/value heads, the norm
    on keys sees a part of the gradient on each rank, so that rounding alone would differ by 1e-7."""
    for name, norm in list(model.named_modules()):
        if type(norm).__name__ == "Qwen3RMSNorm":
            values: Any = norm
            exact = nn.RMSNorm(values.weight.shape[0], eps=values.variance_epsilon)
            exact.weight = values.weight
            model.set_submodule(name, exact)


def _unscaled(family: str, heads: int, kv_heads: int, vocab: int, tied: bool) -> nn.Module:
    if family == "example":
        sizes: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "vocab_size": vocab, "tied": tied}
        llama = example()
        return llama.Llama(llama.LlamaConfig(hidden=32, ffn_size=48, num_layers=2, **sizes))
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
    return transformers.AutoModelForCausalLM.from_config(config)


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
        block.forward = lambda *args, forward=forward, **kwargs: checkpoint(
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
    *({"family": family, "sp": True} for family in FAMILIES),
    *({"family": family, "tied": True} for family in FAMILIES if family != "mistral"),
    *({"family": family, "recompute": True, "sp": sp} for family in ("example", "gpt2") for sp in (False, True)),
    *({"family": family, "kv_heads": 1, "sp": sp} for family in ("example", "qwen3") for sp in (False, True)),
    {"family": "opt", "recompute": True, "sp": True, "tied": True, "vocab": 61},
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


def run_fsdp_cases(rank: Rank, cases: list[dict[str, Any]]) -> list[tuple[float, str]]:
    return [run_fsdp_case(case) for case in cases]


def run_fsdp_case(case: dict[str, Any]) -> tuple[float, str]:
    """dp2 x tp2, each dp rank another batch row: gradients against the whole model on all rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    options = {key: case[key] for key in ("heads", "kv_heads", "tied") if key in case}
    model = build(case["family"], **options)
    _, expected = reference(copy.deepcopy(model), 63)
    rules = find_tensor_parallel_rules(model)
    split = apply_tensor_parallel(model, rules, mesh["tp"], sequence_parallel=case.get("sp", False))
    if case.get("recompute"):
        recompute_blocks(model, rules.anatomy.blocks)
    for part in (*model.get_submodule(rules.anatomy.blocks).children(), model):
        fully_shard(part, mesh=mesh["dp"], reshard_after_forward=case["reshard"])
    tokens, targets = batch(63)
    count = (targets != -100).sum()
    mine = slice(0, 1) if mesh.get_local_rank("dp") == 0 else slice(1, BATCH)
    total, _ = loss_on_shards(None, group=mesh["tp"].get_group(), vocab_size=63)(
        logits(model, tokens[mine]), targets[mine]
    )
    (2 * total / count).backward()  # FSDP averages over the two
    split.finish_gradients()
    return error(split_gradients(split, model), expected)


FSDP_CASES: list[dict[str, Any]] = [
    {"family": "example", "reshard": True, "sp": True, "tied": True},
    {"family": "example", "reshard": False, "kv_heads": 1},
    {"family": "qwen3", "reshard": True, "kv_heads": 1, "sp": True, "recompute": True},
    {"family": "gpt2", "reshard": True, "sp": True, "recompute": True},
    {"family": "gpt_neox", "reshard": False, "sp": True, "tied": True},
]


def test_under_fsdp() -> None:
    for results in run_ranks(run_fsdp_cases, 4, FSDP_CASES, timeout_s=100):
        for case, (gradient_error, worst) in zip(FSDP_CASES, results, strict=True):
            assert gradient_error < 1e-10, (case, gradient_error, worst)


Counts = dict[str, tuple[int, int]]


def count_cases(rank: Rank, cases: list[dict[str, Any]]) -> list[Counts]:
    return [count_case(case) for case in cases]


def count_case(case: dict[str, Any]) -> Counts:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = build(case["family"], vocab=63)
    rules = find_tensor_parallel_rules(model)
    split = apply_tensor_parallel(model, rules, mesh, sequence_parallel=case["sp"])
    if case.get("recompute"):
        recompute_blocks(model, rules.anatomy.blocks)
    tokens, targets = batch(63)
    loss_fn = loss_on_shards(case.get("loss"), group=mesh.get_group(), vocab_size=63)
    counter = CollectiveCounter({mesh.get_group().group_name: "tp"})
    with counter:
        total, _ = loss_fn(logits(model, tokens), targets)
        total.backward()
    if not case["sp"]:
        with CollectiveCounter({}) as end:
            split.finish_gradients()
        assert end.table() == {}
    return {name: (found.calls, found.message_bytes) for (name, _), found in counter.table().items()}


TOKENS = BATCH * SEQUENCE
MESSAGE = 8 * TOKENS * 32  # batch * sequence * hidden, float64
LOSS = (2, 8 * 3 * TOKENS)  # maxima, then sums and the targets' logits
BLOCKS = 2


def expected_counts(*, sp: bool, recompute: bool = False, positions: bool = False, user_loss: bool = False) -> Counts:
    """The table of ``tensor_parallel``, in numbers of messages."""
    reduced = 0 if sp else (4 + recompute) * BLOCKS + 1 + 1  # blocks, embedding, head
    gathered = scattered = 0
    if sp:
        gathered = (4 + 2 * recompute) * BLOCKS + 1 + 1  # embedding backward, head forward
        scattered = (4 + recompute) * BLOCKS + 1 + 1  # embedding forward, head backward
        if positions:
            reduced, scattered = 1, scattered - 1
    reduce_calls, reduce_bytes = reduced, reduced * MESSAGE
    gather_calls, gather_bytes = gathered, gathered * MESSAGE
    if user_loss:
        gather_calls, gather_bytes = gather_calls + 1, gather_bytes + 8 * TOKENS * 64
    else:
        reduce_calls, reduce_bytes = reduce_calls + LOSS[0], reduce_bytes + LOSS[1]
    counts = {
        "all_gather": (gather_calls, gather_bytes),
        "all_reduce": (reduce_calls, reduce_bytes),
        "reduce_scatter": (scattered, scattered * MESSAGE),
    }
    return {name: count for name, count in counts.items() if count[0]}


COUNTED: list[tuple[dict[str, Any], Counts]] = [
    *(
        ({"family": family, "sp": sp, "recompute": recompute}, expected_counts(sp=sp, recompute=recompute))
        for family in ("example", "qwen2", "gpt_neox")
        for sp in (False, True)
        for recompute in (False, True)
    ),
    ({"family": "gpt2", "sp": True}, expected_counts(sp=True, positions=True)),
    ({"family": "opt", "sp": True}, expected_counts(sp=True, positions=True)),
    ({"family": "opt", "sp": False}, expected_counts(sp=False)),
    ({"family": "example", "sp": False, "loss": cross_entropy}, expected_counts(sp=False, user_loss=True)),
]


def test_collectives_are_those_documented() -> None:
    cases = [case for case, _ in COUNTED]
    for results in run_ranks(count_cases, 2, cases, timeout_s=100):
        for (case, expected), found in zip(COUNTED, results, strict=True):
            assert found == expected, case


def run_oddities(rank: Rank) -> dict[str, Any]:
    """What is seen from inside: padding, copies, finished gradients, half precision, indivisible sequences."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    found: dict[str, Any] = {}
    model = build("example", kv_heads=2, vocab=61)
    rules = find_tensor_parallel_rules(model)
    whole = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    split = apply_tensor_parallel(model, rules, mesh, sequence_parallel=True)
    tokens, targets = batch(61)
    total, _ = loss_on_shards(None, group=mesh.get_group(), vocab_size=61)(logits(model, tokens), targets)
    total.backward()
    with CollectiveCounter({mesh.get_group().group_name: "tp"}) as counter:
        split.finish_gradients()
    found["finish"] = {key: (item.calls, item.message_bytes) for key, item in counter.table().items()}
    stored = dict(model.named_parameters())  # get_parameter would read the local tensor
    head = stored["head.weight"]
    found["head"] = tuple(head.shape), tuple(head.to_local().shape)  # type: ignore[attr-defined]
    found["padding"] = [float(t.detach().full_tensor()[61:].abs().max()) for t in (head, head.grad)]  # type: ignore[union-attr]
    found["copies"] = {name: split.copies(name) for name in whole if name.startswith(("blocks.0", "norm", "head"))}
    found["parts"] = all(
        torch.equal(split.stored_part(name, value), stored[name].to_local())  # type: ignore[attr-defined]
        for name, value in whole.items()
    )
    try:
        logits(model, tokens[:, :6])
    except InputError as refusal:
        found["sequence"] = str(refusal)
    half = build("example").bfloat16()
    _, expected = reference(copy.deepcopy(half).float(), 63)
    apply_half = apply_tensor_parallel(half, find_tensor_parallel_rules(half), mesh, sequence_parallel=True)
    tokens, targets = batch(63)
    total, count = loss_on_shards(None, group=mesh.get_group(), vocab_size=63)(logits(half, tokens), targets)
    (total / count).backward()
    apply_half.finish_gradients()
    found["half"] = error(
        {name: gradient.float() for name, gradient in split_gradients(apply_half, half).items()}, expected
    )[0]
    return found


def test_padding_copies_and_refusals() -> None:
    for found in run_ranks(run_oddities, 4, timeout_s=100):
        # five norms of 32; 2 kv heads: two slots of each copied matrix [8, 32], k and v, two blocks
        assert found["finish"] == {("all_reduce", "tp"): (1, 8 * (5 * 32 + 2 * 2 * 2 * 8 * 32))}
        assert found["head"] == ((64, 32), (16, 32))
        assert found["padding"] == [0.0, 0.0]
        assert found["copies"] == {
            "blocks.0.attention_norm.weight": 4,
            "blocks.0.attention.q_proj.weight": 1,
            "blocks.0.attention.k_proj.weight": 2,
            "blocks.0.attention.v_proj.weight": 2,
            "blocks.0.attention.o_proj.weight": 1,
            "blocks.0.mlp_norm.weight": 4,
            "blocks.0.mlp.gate_proj.weight": 1,
            "blocks.0.mlp.up_proj.weight": 1,
            "blocks.0.mlp.down_proj.weight": 1,
            "norm.weight": 4,
            "head.weight": 1,
        }
        assert found["parts"]
        assert found["sequence"] == "sequence_parallel needs tp=4 to divide the sequence of 6 tokens"
        assert found["half"] < 0.1  # eight bits of mantissa through two blocks; a wrong gradient is off by 1


def test_float64_on_four_ranks() -> None:
    check(4, CASES, 1e-10)


def test_float64_on_two_ranks() -> None:
    check(2, [case for case in CASES if case.get("sp", True)], 1e-10)


def test_float32_on_four_ranks() -> None:
    check(4, [{**case, "dtype": torch.float32} for case in CASES[: len(FAMILIES)]], 1e-5)
