"""Models with experts, split over ranks together with every other way of splitting, train the numbers of one process.

One process runs experts one by one (Hugging Face's written-out loop) in float64; the auxiliary loss, where the case has
one, is that of each layer over each micro-batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from moe import run_with_routing
from torch import Tensor

from meshwright import InputError
from meshwright.executors.parallel_model import ParallelModel

pytestmark = pytest.mark.multiprocess

Arrays = dict[str, np.ndarray[Any, Any]]

# model | config | micro-batches of each data rank, share of targets ignored
FOUR_RANKS = """
mixtral layers2 aux      | dp4 ep4                              | n2 ignored0.3
mixtral layers2 tied     | dp2 pp2 ep2 zero1 mbs2               | n3
mixtral layers2 aux      | tp2 sp dp2 ep4 zero3                 | n2
mixtral layers2          | tp2 etp2 dp2 ep2 zero2 full          | n2
mixtral layers2 aux      | tp4 sp etp2 ep2 selective            | n2
qwen2_moe layers2 aux    | tp2 sp dp2 ep2 zero2 selective mbs2  | n2 ignored0.4
qwen2_moe layers2 aux    | tp2 etp2 pp2                         | n2
qwen2_moe layers2        | ring2 dp2 ep4 chunks2 zero1 full     | n2
qwen3_moe layers2 aux    | ulysses2 dp2 ep2 zero3 chunks2       | n2
qwen3_moe layers2 aux    | dp2 pp2 ep2 zb-h1 zero1 chunks2      | n4
qwen3_moe                | tp2 sp pp2 ep2 interleaved full      | n2
deepseek_v3 layers2      | tp2 sp dp2 ep4 zero2                 | n2 ignored0.4
deepseek_v3 layers2      | tp2 etp2 ring2 ep2 full              | n2
deepseek_v3              | pp2 dp2 ep2 zbv selective            | n4
gpt_oss layers2 aux      | tp2 sp dp2 ep2 etp2 zero1            | n2
gpt_oss layers2          | tp2 sp ring2 ep4 zero2               | n2
moe layers2 aux capacity | tp2 sp dp2 ep4 zero3 full            | n2
"""
EIGHT_RANKS = """
mixtral layers2 aux      | tp2 sp ring2 dp2 ep8 zero1           | n2 ignored0.3
mixtral layers2          | tp4 sp dp2 etp2 ep4 zero3            | n2
mixtral layers2 experts4 | dp8 ep2 zero2                        | n1
mixtral layers2 aux      | tp2 sp pp2 dp2 ep2 zero1             | n2+3
qwen2_moe layers2        | tp2 sp ulysses2 dp2 ep4 chunks2 zero2 selective | n2
qwen3_moe aux            | tp2 sp pp2 dp2 ep4 zbv full          | n4
deepseek_v3 layers2      | tp2 sp ring2 dp2 ep4 etp2 zero3      | n2
"""
# tp, cp, pp, dp and ep all above 1
FIVE_DIMENSIONS = """
mixtral layers2 aux      | tp2 sp ring2 pp2 dp2 ep4 zero1       | n2
deepseek_v3 layers2      | tp2 sp ulysses2 pp2 dp2 ep4 etp2 full | n2
"""


def rows(table: str) -> list[str]:
    return [" ".join(line.split()) for line in table.strip().splitlines()]


@pytest.mark.parametrize("case", [*rows(FOUR_RANKS), *rows(EIGHT_RANKS), *rows(FIVE_DIMENSIONS)])
def test_equals_one_process(case: str, assert_equal: Callable[[str], None]) -> None:
    assert_equal(case)


# -- what the routers did ---------------------------------------------------------------------------------------------


def _routed(parallel: ParallelModel, batch: tuple[Tensor, Tensor]) -> tuple[float, tuple[str, ...], Arrays]:
    loss = parallel.step(batch).item()
    found = parallel.expert_statistics()
    assert found is not None
    fields = ("load", "dropped", "auxiliary_loss")
    return loss, found.layers, {field: getattr(found, field).numpy() for field in fields}


@pytest.mark.parametrize(
    "config", ["tp2 sp dp2 ep4 zero1 | n2", "tp2 etp2 pp2 dp2 ep2 interleaved | n2", "tp2 sp ring2 ep4 mbs2 | n2"]
)
def test_routes_as_one_process_does(
    config: str, on_split: Callable[..., list[Any]], in_one_process: Callable[..., Any]
) -> None:
    line = f"moe aux capacity | {config}"
    model, plan, (_, (tokens, targets)) = in_one_process(line)
    loads, dropped, losses, logits = [], [], [], []
    for part in tokens.split(plan.config.micro_batch_size):
        found, routed = run_with_routing(model, part)
        logits.append(found.detach())
        loads.append(routed.load)
        dropped.append(routed.dropped)
        losses.append(routed.auxiliary_loss)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits).flatten(0, 1), targets.flatten()).item()
    for loss, layers, found in on_split(line, _routed):
        assert loss == pytest.approx(expected, rel=1e-12)
        assert layers == tuple(f"blocks.{layer}.mlp.experts" for layer in range(4))
        assert np.array_equal(found["load"], torch.stack(loads).sum(0).numpy())
        assert np.array_equal(found["dropped"], torch.stack(dropped).sum(0).numpy())
        assert found["auxiliary_loss"] == pytest.approx(torch.stack(losses).mean(0).tolist(), rel=1e-12)
    assert torch.stack(dropped).sum() > 0


# -- weights and optimizers -------------------------------------------------------------------------------------------


def _in_and_out(parallel: ParallelModel, batch: tuple[Tensor, Tensor]) -> Arrays:
    whole = parallel.state_dict()
    own = {name: value.detach().clone() for name, value in parallel.state_dict(full=False).items()}
    with torch.no_grad():
        for weight in parallel.parameters():
            weight.zero_()
    parallel.load_state_dict(whole)
    assert all(torch.equal(value, whole[name]) for name, value in parallel.state_dict().items())
    with torch.no_grad():
        for weight in parallel.parameters():
            weight.zero_()
    parallel.load_state_dict(own, full=False)
    found = parallel.state_dict()
    optimizer = torch.optim.AdamW(parallel.parameter_groups(), lr=0.1, fused=True)  # one mesh a group
    parallel.step(batch)
    optimizer.step()
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize(
    "line",
    [
        "gpt_oss layers2 | tp2 sp dp4 ep2 etp2 zero3 | n1",
        "mixtral layers2 experts4 | dp8 ep2 zero2 | n1",
        "qwen2_moe | tp2 sp pp2 ring2 ep4 | n2",
    ],
)
def test_weights_go_out_whole_and_in_again(
    line: str, on_split: Callable[..., list[Any]], in_one_process: Callable[..., Any]
) -> None:
    expected = in_one_process(line)[0].state_dict()
    for found in on_split(line, _in_and_out):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], value.numpy()) for name, value in expected.items())


def _gradients(parallel: ParallelModel, batch: tuple[Tensor, Tensor]) -> Arrays:
    parallel.zero_grad()
    parallel.step(batch)
    return {name: grad.numpy() for name, grad in parallel.full_gradients().items()}


def test_gradients_beside_master_weights_are_the_same_at_every_stage_of_zero(
    on_split: Callable[..., list[Any]],
) -> None:
    by_stage = [on_split(f"mixtral layers2 | dp2 ring2 ep2 zero{zero} | n2 bf16", _gradients)[0] for zero in range(4)]
    alone = on_split("mixtral layers2 | | n4 float32", _gradients)[0]
    for name, exact in alone.items():
        scale = np.abs(exact).max()
        for found in by_stage:
            assert np.abs(found[name] - by_stage[0][name]).max() < 1e-5 * scale, name
            assert np.abs(found[name] - exact).max() < 0.1 * scale, name  # computed in bfloat16


# -- what is issued ---------------------------------------------------------------------------------------------------

EXPERT_BYTES = 8 * 4 * 3 * 16 * 32  # of a block on a rank: 4 experts of 3 matrices, 8 bytes a number


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_experts_are_a_unit_of_their_own(zero_stage: int, count_step: Callable[[str], list[Any]]) -> None:
    counts = count_step(f"mixtral layers2 | dp4 ep2 zero{zero_stage} | n3")
    operators = {
        0: {"all_reduce": 1},
        1: {"all_gather": 1, "reduce_scatter": 1},
        2: {"all_gather": 1, "reduce_scatter": 3},
        3: {"all_gather": 6, "reduce_scatter": 3},
    }[zero_stage]
    expected = {operator: (2 * calls, 2 * calls * EXPERT_BYTES) for operator, calls in operators.items()}
    for found in counts:
        assert {operator: count for (operator, axis), count in found.items() if axis == "edp"} == expected


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("mixtral | tp2 ep2 dp2 | n1", "tp=2 with etp=1 needs sequence_parallel"),
        ("mixtral | dp2 ep2 | n1+2", "found (1, 2): use an even share"),
        ("mixtral experts4 | dp8 ep8 | n1", "ep=8 must divide the 4 experts"),
        ("llama | dp2 ep2 | n1", "llama has no experts"),
        ("moe capacity | ulysses8 | n1", "a group of 2 neighbouring tokens"),
    ],
)
def test_refuses(line: str, sentence: str, on_split: Callable[..., list[Any]]) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        on_split(line, _gradients)
