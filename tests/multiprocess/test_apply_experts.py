"""Models with experts, split over ranks together with every other way of splitting, train the numbers of one process.

One process runs experts one by one (Hugging Face's written-out loop) in float64; the auxiliary loss, where the case has
one, is that of each layer over each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from moe import Moe, MoeConfig, run_with_routing
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshwright import InputError
from meshwright.executors.apply import ParallelModel
from meshwright.executors.expert_parallel import ExpertStatistics

pytestmark = pytest.mark.multiprocess

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
