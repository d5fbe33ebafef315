"""A split model trains the same numbers as one process: loss, gradients, norms, and weights after five steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.multiprocess

# model | config | micro-batches of each data rank, share of targets ignored, dtype
CASES = """
example             | dp2                        | n2
example             | dp2                        | n1+3 ignored0.4
example             | dp2 zero1                  | n3 ignored0.4
example             | dp2 zero2                  | n3 ignored0.4
example             | dp2 zero3                  | n3 ignored0.4
example             | pp2                        | n2
example             | pp2 gpipe                  | n3
example             | pp2 interleaved            | n4
example             | dp2 pp2 zero1              | n4 ignored0.4
example tied        | pp2                        | n2
llama               | pp2                        | n2
mistral             | pp2                        | n2
qwen2               | pp2                        | n2
qwen3               | pp2                        | n2
gpt2                | pp2 interleaved            | n2
opt                 | pp2                        | n2
gpt_neox            | pp2                        | n2
llama               | dp2 zero2                  | n2
example             | pp2 full                   | n2
example             | dp2 zero3 full             | n2
example             | dp2 zero3 selective        | n2
gpt2                | dp2 selective              | n2
example             | tp2                        | n2
example tied vocab65 | tp2 dp2 zero2 sp          | n2
example kv1         | tp2 pp2                    | n2
llama               | tp2 pp2 sp interleaved     | n2
qwen3               | tp2 dp2 zero3 sp full      | n2
gpt2 vocab65        | tp2 pp2 dp2 zero1 sp       | n2
opt                 | tp2 pp2                    | n2
gpt_neox            | tp4                        | n2
example             | tp2 selective              | n2
example             | tp2 sp selective           | n2
"""


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_equals_one_process(case: str, assert_equal: Callable[[str], None]) -> None:
    assert_equal(case)
