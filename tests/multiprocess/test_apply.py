"""A split model trains the same numbers as one process: loss, gradients, norms, and weights after five steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.multiprocess

# model | config | micro-batches of each data rank, share of targets ignored
TWO_RANKS = """
example              | dp2                               | n2
example              | dp2                               | n1+3 ignored0.4
example tied         | dp2 zero1 full                    | n2+3 ignored0.45
example              | dp2 zero2 mbs2                    | n3 ignored0.4
example              | dp2 zero3 selective               | n3 ignored0.2
example              | pp2 gpipe                         | n3
example tied         | pp2                               | n3 ignored0.45
example tied layers5 | pp2 interleaved                   | n4 ignored0.1
example              | tp2 full                          | n2
example vocab65 tied | tp2 sp selective                  | n2 ignored0.4
example kv1          | tp2 selective mbs2                | n1
llama                | pp2 full                          | n2
qwen2                | dp2 zero2                         | n2 ignored0.4
gpt2 vocab65         | tp2 sp full                       | n2
opt                  | pp2 interleaved                   | n2
opt                  | dp2 zero1                         | n2 ignored0.4
opt vocab65          | dp2 zero2 full                    | n2
gpt_neox             | tp2 sp                            | n2
"""
FOUR_RANKS = """
example              | tp2 dp2                           | n2 ignored0.4
example vocab65      | tp2 dp2 zero1 sp                  | n1+3 ignored0.45
example tied         | tp2 dp2 zero2                     | n3 ignored0.4
example kv1          | tp2 dp2 zero3 sp selective        | n2
example tied vocab65 | tp2 pp2 sp                        | n4 ignored0.4
example              | tp2 pp2 gpipe full mbs2           | n2
example kv1          | tp4 sp                            | n2 ignored0.4
example kv2          | tp4 selective                     | n2
example tied         | dp2 pp2                           | n2+4 ignored0.4
example tied         | dp2 pp2 zero1 interleaved         | n2 ignored0.4
example              | dp2 pp2 zero2 gpipe               | n3 ignored0.3
example              | dp2 pp2 zero3 full                | n4
example              | dp2 pp2 zero3 interleaved         | n4 ignored0.4
example              | dp4 zero3                         | n2 ignored0.4
example layers5      | pp4                               | n5 ignored0.2
llama tied           | tp2 pp2 sp interleaved            | n2
mistral              | dp2 pp2 zero2 selective           | n2
qwen2 vocab65        | tp2 dp2 zero3 sp                  | n2 ignored0.4
qwen3                | tp2 pp2 sp selective              | n2
gpt2 vocab65         | tp2 dp2 zero1 sp                  | n2
opt                  | tp2 pp2 full                      | n2 ignored0.4
opt                  | tp2 dp2 zero3 sp                  | n2 ignored0.4
gpt_neox             | tp4 full                          | n2
"""
EIGHT_RANKS = """
example tied vocab65 | tp2 pp2 dp2 zero1 sp              | n2 ignored0.4
example              | tp2 pp2 dp2 zero2 interleaved full | n2 ignored0.4
example kv1          | tp2 pp2 dp2 zero3 sp selective    | n3 ignored0.45
example tied         | tp4 dp2                           | n1+2 ignored0.4
llama                | tp2 pp2 dp2 zero3 gpipe sp full   | n2 ignored0.4
qwen3 tied           | tp2 pp2 dp2 sp interleaved        | n2
gpt2 vocab65         | tp2 pp2 dp2 zero2 sp              | n2 ignored0.4
opt vocab65          | tp2 pp4                           | n4
gpt_neox             | tp2 pp2 dp2 zero1                 | n2
"""


def rows(table: str) -> list[str]:
    return [" ".join(line.split()) for line in table.strip().splitlines()]


CASES = [*rows(TWO_RANKS), *rows(FOUR_RANKS), *rows(EIGHT_RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case: str, assert_equal: Callable[[str], None]) -> None:
    assert_equal(case)


@pytest.mark.parametrize("case", CASES[::2])  # rounding is the same for all; float64 tells the rest
def test_equals_one_process_in_float32(case: str, assert_equal: Callable[[str], None]) -> None:
    assert_equal(f"{case} float32")
