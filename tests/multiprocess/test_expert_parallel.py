"""A layer of experts over real ranks against the same layer in one process: its output, every gradient, what its router
did. Each case is one layer of a family, in float64, whose experts one process runs in a loop."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from moe import MoeConfig, MoeMlp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meshwright.cost_models.placement import Placement
from meshwright.cost_models.strategy import ParallelConfig, Recompute
from meshwright.executors import expert_parallel
from meshwright.executors.counting import CollectiveCounter
from meshwright.executors.expert_compute import run_experts
from meshwright.executors.expert_dispatch import Exchange
from meshwright.executors.expert_parallel import split_experts
from meshwright.executors.mesh import Mesh, build_mesh
from meshwright.executors.recompute import apply_recompute
from meshwright.executors.tp_collectives import enter, leave
from meshwright.profiler.launch import Rank, run_ranks

pytestmark = pytest.mark.multiprocess

HIDDEN, EXPERTS, TOP_K, WIDTH = 16, 8, 2, 8
SEQUENCE, MICRO_BATCHES = 8, 2
COEFFICIENT = 0.5
TIMEOUT_S = 60.0


class Double(TorchFunctionMode):
    """What a router asks to be rounded to float32 is not: rounding would hide what we look for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float or (func is Tensor.type and args[1:] == (torch.float32,)):
            return args[0]
        kwargs = {key: value for key, value in (kwargs or {}).items() if value is not torch.float32}
        return func(*args, **kwargs)


class Layer(nn.Module):
    """A feed-forward layer with experts, and the config of the model that it is from."""

    def __init__(self, mlp: nn.Module, config: Any) -> None:
        super().__init__()
        self.mlp, self.config = mlp, config

    def forward(self, x: Tensor) -> Tensor:
        with Double():
            out = self.mlp(x)
        return out[0] if isinstance(out, tuple) else out


def build(family: str) -> Layer:
    torch.manual_seed(0)
    layer = _layer(family.removesuffix("-starved")).double()
    for name, weight in layer.named_parameters():
        nn.init.normal_(weight, std=0.3)
        if family.endswith("-starved") and name.endswith(("router.weight", "gate.weight")):
            with torch.no_grad():  # all tokens choose the first two experts: most ranks get none
                weight.zero_()
                weight[:2, 0] = 1.0
    return layer


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralSparseMoeBlock",
        {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, "output_router_logits": True,
         "router_aux_loss_coef": COEFFICIENT},
    ),
    "qwen2_moe": (
        "Qwen2MoeSparseMoeBlock",
        {"moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "shared_expert_intermediate_size": 24},
    ),
    "deepseek_v3": (
        "DeepseekV3MoE",
        {"moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2},
    ),
    "gpt_oss": ("GptOssMLP", {"intermediate_size": WIDTH, "num_local_experts": EXPERTS}),
}  # fmt: skip


def _layer(family: str) -> Layer:
    if family.startswith("example"):
        capacity = family.endswith("capacity")
        config = MoeConfig(
            hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, expert_ffn_size=WIDTH,
            ffn_size=24 if family.endswith("shared") else 0, router_aux_loss_coef=COEFFICIENT,
            capacity_factor=1.0 if capacity else 0.0, group_tokens=4 if capacity else 0,
        )  # fmt: skip
        return Layer(MoeMlp(config), config)
    transformers = pytest.importorskip("transformers")
    block, sizes = FAMILIES[family]
    config = transformers.AutoConfig.for_model(
        family, hidden_size=HIDDEN, num_experts_per_tok=TOP_K, experts_implementation="eager", **sizes
    )
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return Layer(getattr(modeling, block)(config), config)


# -- one process ------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """Micro-batches ``[micro_batches, dp, batch, sequence, hidden]`` in one process: outputs, gradients, routing."""

    outputs: Tensor
    to_x: Tensor
    grads: dict[str, Tensor]
    load: Tensor
    dropped: int
    auxiliary_loss: float


def routers_of(layer: Layer) -> nn.Module:
    return next(part for name, part in layer.named_modules() if name.endswith((".gate", ".router")))


def reference(layer: Layer, x: Tensor, out_grad: Tensor, coefficient: float) -> Reference:
    seen: list[Any] = []
    routers_of(layer).register_forward_hook(lambda *call: seen.append(call[2]))
    given: list[Tensor] = []
    experts = next(part for name, part in layer.named_modules() if name.endswith(".experts"))
    experts.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    x = x.clone().requires_grad_()
    outputs, total, load = [], torch.zeros(()), torch.zeros(EXPERTS, dtype=torch.int64)
    for batches in x:  # micro-batches
        for batch in batches:  # data ranks
            outputs.append(layer(batch))
            logits, _, index = seen[-1]
            counts = torch.bincount(index.flatten(), minlength=EXPERTS)
            logits = logits.view(-1, EXPERTS)
            share = counts / logits.shape[0]
            loss = coefficient * EXPERTS * (share.double() * logits.double().softmax(-1).mean(0)).sum()
            total, load = total + loss / (x.shape[0] * x.shape[1]), load + counts
    found = torch.stack(outputs).view_as(out_grad)
    ((found * out_grad).sum() + total).backward()
    assert x.grad is not None
    grads = {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
    dropped = sum(int((index == EXPERTS).sum()) for index in given)
    return Reference(found.detach(), x.grad, grads, load, dropped, total.item())


# -- ranks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    family: str
    ranks: int
    ep: int
    etp: int = 1
    tp: int = 1
    sp: bool = False
    chunks: int = 1
    recompute: Recompute = Recompute.NONE

    def __str__(self) -> str:
        words = [f"{name}{getattr(self, name)}" for name in ("ranks", "ep", "etp", "tp", "chunks")]
        return " ".join([self.family, *words, *["sp"] * self.sp, self.recompute.value])

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(dp=self.ranks // self.tp, tp=self.tp, ep=self.ep, etp=self.etp, sequence_parallel=self.sp)


def mesh_of(config: ParallelConfig) -> Mesh:
    plan: Any = SimpleNamespace(
        config=config,
        placement=Placement(),
        model=SimpleNamespace(moe=True),
        workload=SimpleNamespace(recipe=SimpleNamespace(has_master=False)),
    )
    return build_mesh(plan, torch.device("cpu"))


def own(whole: Tensor, mesh: Mesh, sp: bool) -> Tensor:
    """This rank's share of ``[micro_batches, dp, batch, sequence, hidden]``."""
    share = whole[:, mesh.index("dp")]
    return share.chunk(mesh.size("tp"), dim=2)[mesh.index("tp")] if sp else share


def summed(grad: Tensor, *axes: str, mesh: Mesh) -> Tensor:
    grad = grad.clone()
    for axis in axes:
        dist.all_reduce(grad, group=mesh.axis(axis).get_group())
    return grad


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.abs().max())


@dataclass
class Outcome:
    apart: dict[str, float] = field(default_factory=dict)
    load: list[list[int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    auxiliary_loss: float = 0.0
    note: str = ""


def run(rank: Rank, case: Case, layer: Layer, x: Tensor, out_grad: Tensor, expected: Reference) -> Outcome:
    mesh = mesh_of(case.config)
    whole_weights = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    split = split_experts(
        layer, mesh, sequence_parallel=case.sp, num_chunks=case.chunks, num_microbatches=MICRO_BATCHES * mesh.size("dp")
    )
    apply_recompute(layer, case.recompute)
    if case.tp > 1 and not case.sp:  # what tensor_parallel does around experts, where tp ranks have the same tokens
        group, (experts,) = mesh.axis("tp").get_group(), split.modules.values()
        experts.register_forward_pre_hook(lambda _, args: (enter(args[0], group), args[1], enter(args[2], group)))
        experts.register_forward_hook(lambda *call: leave(call[2], group))
    split.begin_step()
    outcome = Outcome()
    given, wanted, grads = own(x, mesh, case.sp), own(expected.outputs, mesh, case.sp), own(out_grad, mesh, case.sp)
    to_x = own(expected.to_x, mesh, case.sp)
    for number, batch in enumerate(given):
        batch = batch.clone().requires_grad_()
        output = layer(batch)
        output.backward(grads[number])
        assert batch.grad is not None
        outcome.apart[f"output {number}"] = apart(output, wanted[number])
        outcome.apart[f"x {number}"] = apart(batch.grad, to_x[number])
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        if name in split.names:
            found = summed(split.whole(name, weight.grad), "edp", mesh=mesh)
            back = split.stored_part(name, whole_weights[name])
            local: Any = weight
            assert torch.equal(getattr(local, "to_local", lambda: local)(), back)  # noqa: B023
            assert torch.equal(split.whole(name, weight.detach()), whole_weights[name])
        else:
            found = summed(weight.grad, "dp", *["tp"] * case.sp, mesh=mesh)
        outcome.apart[name] = apart(found, expected.grads[name])
    statistics = split.statistics()
    outcome.load, outcome.dropped = statistics.load.tolist(), statistics.dropped.tolist()
    outcome.note = split.note
    outcome.auxiliary_loss = float(statistics.auxiliary_loss.sum())
    return outcome


CASES = (
    Case("example", 1, 1),
    Case("example", 2, 2, chunks=4),
    Case("example", 2, 1, etp=2),
    Case("example-capacity", 4, 4, chunks=2),
    Case("example-shared", 4, 2, etp=2, chunks=2),
    Case("example-starved", 4, 4, chunks=2),
    Case("example-starved", 4, 2, etp=2),
    Case("example-capacity", 4, 2, tp=2, etp=2),  # tp ranks have the same tokens
    Case("example-capacity", 4, 4, tp=2, sp=True),  # ep spans tp and dp
    Case("example", 8, 8, tp=2, sp=True, chunks=2),
    Case("example", 8, 2, etp=2, tp=4, sp=True),  # etp inside tp
    Case("mixtral", 4, 2, chunks=2),
    Case("qwen2_moe", 2, 2),
    Case("deepseek_v3", 4, 4),
    Case("gpt_oss", 4, 2, etp=2),
    Case("gpt_oss", 4, 2, tp=2, etp=2),
    Case("example", 4, 2, etp=2, chunks=2, recompute=Recompute.FULL),
    Case("example-capacity", 4, 4, chunks=2, recompute=Recompute.SELECTIVE),
    Case("gpt_oss", 4, 2, etp=2, recompute=Recompute.SELECTIVE),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_layer(case: Case) -> None:
    torch.set_num_threads(1)
    layer = build(case.family)
    shape = (MICRO_BATCHES, case.ranks // case.tp, 2, SEQUENCE, HIDDEN)
    x, out_grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    if case.family.endswith("-starved"):
        x[..., 0] = x[..., 0].abs() + 1.0
    has_auxiliary = case.family == "mixtral" or case.family.startswith("example")
    expected = reference(copy.deepcopy(layer), x, out_grad, COEFFICIENT if has_auxiliary else 0.0)
    for outcome in run_ranks(run, case.ranks, case, layer, x, out_grad, expected, timeout_s=TIMEOUT_S):
        assert not {name: error for name, error in outcome.apart.items() if not error < 1e-12}
        assert outcome.load == [expected.load.tolist()]
        assert ("auxiliary loss" in outcome.note) == (case.family == "mixtral")  # two micro-batches: not its formula
        assert outcome.dropped == [expected.dropped]
        assert outcome.auxiliary_loss == pytest.approx(expected.auxiliary_loss, rel=1e-12)
    assert (expected.dropped > 0) == case.family.endswith("capacity")


def count(rank: Rank, case: Case, layer: Layer, x: Tensor) -> list[dict[tuple[str, str], tuple[int, int]]]:
    """(calls, bytes) of the forward and of the backward, by (operator, axis)."""
    mesh = mesh_of(case.config)
    split_experts(layer, mesh, sequence_parallel=case.sp, num_chunks=case.chunks, num_microbatches=1)
    apply_recompute(layer, case.recompute)
    share = own(x, mesh, case.sp)[0].clone().requires_grad_()
    tables = []
    output = share
    for phase in ("forward", "backward"):
        with CollectiveCounter(mesh.axis_of_group()) as counted:
            if phase == "forward":
                output = layer(share)
            else:
                output.backward(torch.ones_like(output))
        tables.append({key: (traffic.calls, traffic.message_bytes) for key, traffic in counted.table().items()})
    return tables


@pytest.mark.parametrize("recompute", Recompute)
def test_collectives(recompute: Recompute) -> None:
    """The table of ``expert_parallel``: 4 ranks on sequence shards, ep 2 over dp, etp 2 over tp, 2 parts."""
    torch.set_num_threads(1)
    chunks, tp, dp = 2, 2, 2
    case = Case("example", 4, 2, etp=2, tp=tp, sp=True, chunks=chunks, recompute=recompute)
    layer = build("example")
    x = torch.randn((1, dp, 2, SEQUENCE, HIDDEN), dtype=torch.float64)
    rows = 2 * SEQUENCE // tp * TOP_K  # what a rank sends, all parts together
    number, integer = 8, 8
    exchange = rows * HIDDEN * number
    for forward, backward in run_ranks(count, 4, case, layer, x, timeout_s=TIMEOUT_S):
        auxiliary = {("all_reduce", "tp"): (1, EXPERTS * number)}
        (_, sent), (_, gathered) = forward.pop(("all_to_all", "ep")), forward.pop(("all_gather", "etp"))
        (scatters, scattered) = forward.pop(("reduce_scatter", "etp"))
        assert forward == auxiliary
        sizes = chunks * EXPERTS * integer
        combined = sent - exchange - sizes  # what this rank got, it sends back
        gathered -= sizes * tp
        assert gathered == scattered > 0 and gathered % (tp * HIDDEN * number) == 0
        assert combined > 0 and combined % (HIDDEN * number) == 0
        assert scatters == chunks
        again = recompute is Recompute.FULL
        reduced = backward.pop(("all_reduce", "tp"), None)
        assert reduced == (auxiliary["all_reduce", "tp"] if again else None)
        assert backward == {
            ("all_to_all", "ep"): (2 * chunks + (1 + 2 * chunks) * again, exchange + combined + sent * again),
            ("all_gather", "etp"): (chunks + (1 + chunks) * again, gathered + (gathered + sizes * tp) * again),
            ("reduce_scatter", "etp"): (chunks + chunks * again, gathered + scattered * again),
        }


class Model(nn.Module):
    """Two layers one after the other, as the blocks of a Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        first, second = build("mixtral"), build("mixtral")
        self.first, self.second, self.config = first.mlp, second.mlp, first.config
        with torch.no_grad():
            for weight in self.second.parameters():
                weight.neg_()

    def forward(self, x: Tensor) -> Tensor:
        with Double():
            return self.second(x + self.first(x))


def across(rank: Rank, model: Model, x: Tensor) -> tuple[list[list[float]], float, str, bool]:
    """The gradient of the first router's weight and the auxiliary loss, of one micro-batch over tp."""
    mesh = mesh_of(ParallelConfig(dp=1, tp=2, ep=2, sequence_parallel=True))
    split = split_experts(model, mesh, sequence_parallel=True, num_chunks=1, num_microbatches=1)
    split.begin_step()
    apply_recompute(model, Recompute.FULL)
    (model(x.chunk(2, dim=1)[rank.rank].clone().requires_grad_()) * 0).sum().backward()
    grad = model.get_submodule("first.gate").get_parameter("weight").grad
    assert grad is not None
    loss = split.statistics().auxiliary_loss.sum().item()
    return summed(grad, "tp", mesh=mesh).tolist(), loss, split.note, model.config.output_router_logits


def test_all_layers_together_in_a_step_of_one_micro_batch() -> None:
    """Hugging Face's own formula, computed by Hugging Face's own function."""
    torch.set_num_threads(1)
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model = Model()
    x = torch.randn((2, SEQUENCE, HIDDEN), dtype=torch.float64)
    alone = copy.deepcopy(model)
    logits: list[Tensor] = []
    for router in (alone.get_submodule("first.gate"), alone.get_submodule("second.gate")):
        router.register_forward_hook(lambda *call: logits.append(call[2][0]))
    alone(x)
    loss = COEFFICIENT * modeling.load_balancing_loss_func(tuple(logits), EXPERTS, TOP_K)
    loss.backward()
    expected = alone.get_submodule("first.gate").get_parameter("weight").grad
    assert expected is not None
    for grad, found, note, asks in run_ranks(across, 2, model, x, timeout_s=TIMEOUT_S):
        assert apart(torch.tensor(grad, dtype=torch.float64), expected) < 1e-6  # its sums are in float32
        assert found == pytest.approx(loss.item(), rel=1e-6)
        assert note == "" and not asks


def half(rank: Rank, dtype: torch.dtype, recompute: Recompute, layer: Layer, x: Tensor) -> dict[str, float]:
    """How far a layer's output and gradients are from float64's, ranks over experts, by the grouped kernel."""
    exact = copy.deepcopy(layer)
    out = exact(x.clone())
    out.sum().backward()
    mesh = mesh_of(ParallelConfig(dp=2, ep=2))
    layer.to(dtype)
    split = split_experts(layer, mesh, sequence_parallel=False, num_chunks=2, num_microbatches=2)
    apply_recompute(layer, recompute)
    found = layer(x[rank.rank : rank.rank + 1].to(dtype))
    found.sum().backward()
    result = {"output": apart(found.double(), out.detach()[rank.rank : rank.rank + 1])}
    for name, weight in layer.named_parameters():
        if name in split.names:
            assert weight.grad is not None
            result[name] = apart(split.whole(name, weight.grad).double(), exact.get_parameter(name).grad)  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize(
    ("dtype", "bound", "recompute"),
    [
        (torch.bfloat16, 0.05, Recompute.NONE),
        (torch.float32, 1e-5, Recompute.NONE),
        (torch.float32, 1e-5, Recompute.SELECTIVE),
    ],
)
def test_types_that_have_a_grouped_kernel(dtype: torch.dtype, bound: float, recompute: Recompute) -> None:
    torch.set_num_threads(1)
    layer = build("example")
    layer.config = None
    x = torch.randn((2, SEQUENCE, HIDDEN), dtype=torch.float64).to(dtype).double()
    layer.to(dtype).to(torch.float64)  # the same weights in both
    for apart_by in run_ranks(half, 2, dtype, recompute, layer, x, timeout_s=TIMEOUT_S):
        assert len(apart_by) == 3 and max(apart_by.values()) < bound, apart_by


def events(rank: Rank, layer: Layer, x: Tensor) -> list[str]:
    """What the exchanges of a layer in two parts do, in the order of forward and backward, and the experts between."""
    mesh = mesh_of(ParallelConfig(dp=2, ep=2))
    split_experts(layer, mesh, sequence_parallel=False, num_chunks=2, num_microbatches=1)
    seen: list[str] = []
    known: list[int] = []  # exchanges in the order of their first use: to experts 0 and 1, back from 0 and 1
    names = ("to 0", "to 1", "back 0", "back 1")
    for name in ("forward", "wait", "start_backward", "wait_backward"):
        method = getattr(Exchange, name)

        def noted(self: Exchange, *args: Any, method: Any = method, name: str = name) -> Any:
            if id(self) not in known:
                known.append(id(self))
            seen.append(f"{name} {names[known.index(id(self))]}")
            return method(self, *args)

        setattr(Exchange, name, noted)

    def noted_work(*args: Any, **kwargs: Any) -> Tensor:
        seen.append("work")
        out = run_experts(*args, **kwargs)
        out.register_hook(lambda grad: seen.append("work backward"))
        return out

    with patch.object(expert_parallel, "run_experts", noted_work):
        layer(x[rank.rank].clone().requires_grad_()).sum().backward()
    return seen


def test_the_next_part_travels_beside_the_experts_work_both_ways() -> None:
    torch.set_num_threads(1)
    x = torch.randn((2, 1, SEQUENCE, HIDDEN), dtype=torch.float64)
    for seen in run_ranks(events, 2, build("example"), x, timeout_s=TIMEOUT_S):
        assert seen == [
            "forward to 0", "forward to 1",
            "wait to 0", "work", "forward back 0",
            "wait to 1", "work", "forward back 1",
            "wait back 0", "wait back 1",
            "start_backward back 1", "start_backward back 0",
            "wait_backward back 1", "work backward", "start_backward to 1",
            "wait_backward back 0", "work backward", "start_backward to 0",
            "wait_backward to 1", "wait_backward to 0",
        ]  # fmt: skip
