"""Context parallelism on real ranks: attention against attention written out, whole models against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshwright import InputError
from meshwright.executors.context_parallel import ContextParallel
from meshwright.executors.mesh import CONTEXT_AXES
from meshwright.profiler.launch import Rank, run_ranks

pytestmark = pytest.mark.multiprocess

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, window: int, sinks: Tensor | None
) -> Tensor:
    """Softmax over all keys that may be seen, and over the sink."""
    group = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(group, dim=1).transpose(-1, -2)
    places = torch.arange(q.shape[2])
    distance = places[:, None] - places
    seen = (distance >= 0) | (not causal)
    if window:
        seen = seen & (distance < window)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    return scores.softmax(-1)[..., : q.shape[2]] @ v.repeat_interleave(group, dim=1)


# degrees, heads, key/value heads, widths of keys and of values, then what is computed
ATTENTIONS: list[dict[str, Any]] = [
    {"ring": 2, "heads": 4, "kv": 4, "causal": True},
    {"ring": 4, "heads": 4, "kv": 2, "causal": True},
    {"ring": 8, "heads": 2, "kv": 1, "causal": True},
    {"ring": 8, "heads": 2, "kv": 2, "causal": False},
    {"ulysses": 2, "heads": 4, "kv": 2, "causal": False},
    {"ulysses": 4, "heads": 4, "kv": 4, "causal": True},
    {"ulysses": 4, "heads": 12, "kv": 6, "causal": True},  # each kv head twice: 3 a rank
    {"ulysses": 8, "heads": 16, "kv": 2, "causal": True},
    {"ring": 2, "ulysses": 2, "heads": 4, "kv": 2, "causal": True},
    {"ring": 2, "ulysses": 4, "heads": 8, "kv": 1, "causal": False},
    {"ring": 4, "ulysses": 2, "heads": 4, "kv": 4, "causal": True, "scale": 0.3},
    {"ring": 2, "heads": 4, "kv": 2, "causal": True, "window": 3},
    {"ring": 4, "heads": 2, "kv": 2, "causal": True, "window": 8},
    {"ring": 4, "heads": 2, "kv": 1, "causal": True, "window": 1},
    {"ring": 2, "ulysses": 2, "heads": 4, "kv": 2, "causal": True, "window": 13},
    {"ulysses": 4, "heads": 4, "kv": 2, "causal": True, "window": 5},
    {"ring": 2, "heads": 4, "kv": 2, "causal": True, "window": 5, "sinks": True},
    {"ring": 2, "ulysses": 2, "heads": 4, "kv": 2, "causal": True, "sinks": True},
    {"ulysses": 4, "heads": 4, "kv": 4, "causal": True, "sinks": True},
    {"ring": 4, "heads": 2, "kv": 2, "causal": True, "widths": (6, 4)},  # latent attention
    {"ulysses": 2, "ring": 2, "heads": 4, "kv": 4, "causal": True, "widths": (6, 4)},
    {"ulysses": 4, "heads": 4, "kv": 2, "causal": True, "widths": (4, 6)},
]
TOKENS = 32


def _context(ring: int, ulysses: int, num_ranks: int) -> ContextParallel:
    grid = torch.arange(num_ranks).reshape(-1, ring, ulysses)
    return ContextParallel(DeviceMesh("cpu", grid, mesh_dim_names=("dp", *CONTEXT_AXES))[CONTEXT_AXES])


def _attention_errors(rank: Rank) -> list[float]:
    return [_attention_error(rank, **options) for options in ATTENTIONS]


def _attention_error(
    rank: Rank,
    *,
    heads: int,
    kv: int,
    causal: bool,
    ring: int = 1,
    ulysses: int = 1,
    widths: tuple[int, int] = (4, 4),
    scale: float = 0.5,
    window: int = 0,
    sinks: bool = False,
) -> float:
    """The largest distance of output and gradients from those written out."""
    torch.manual_seed(1)  # the same on all ranks
    shapes = ((2, heads, TOKENS, widths[0]), (2, kv, TOKENS, widths[0]), (2, kv, TOKENS, widths[1]))
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    extra = torch.randn(heads, dtype=torch.float64, requires_grad=True) if sinks else None
    expected = written_out(whole[0], whole[1], whole[2], causal=causal, scale=scale, window=window, sinks=extra)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    leaves = [*whole, *([extra] if extra is not None else [])]
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves)

    context = _context(ring, ulysses, rank.num_ranks)
    own = context.positions(TOKENS, torch.device("cpu"))
    q, k, v = (x.detach()[:, :, own].requires_grad_() for x in whole)
    given = extra.detach().clone().requires_grad_() if extra is not None else None
    out = context.attend(q, k, v, causal=causal, scale=scale, window=window, sinks=given)
    (out * weights[:, :, own]).sum().backward()
    apart = [(out - expected[:, :, own]).detach()]
    apart += [
        x.grad - grad[:, :, own] for x, grad in zip((q, k, v), expected_grads, strict=False) if x.grad is not None
    ]
    assert len(apart) == 4
    if given is not None:  # each rank has its queries' and heads' part
        total = given.grad
        assert total is not None
        torch.distributed.all_reduce(total)
        apart.append(total / (rank.num_ranks // (ring * ulysses)) - expected_grads[3])
    return max(float(difference.abs().max()) for difference in apart)


def test_attention_over_eight_ranks_is_that_of_one() -> None:
    for errors in run_ranks(_attention_errors, 8, timeout_s=60.0):
        apart = {str(options): error for options, error in zip(ATTENTIONS, errors, strict=True) if not error < 1e-13}
        assert not apart, apart


EQUAL = [
    "example | ring2 dp2 | n2 ignored0.5",
    "example kv1 | ring4 full | n1",
    "example | ring4 ulysses2 | n1 ignored0.3",
    "example kv4 twoway | ring2 ulysses2 selective | n2",
    "example twoway | ring2 tp2 zero1 | n2",
    "example kv1 | ulysses4 zero3 full | n2 ignored0.5",
    "example tied | ring2 pp2 1f1b zero2 selective | n3 ignored0.4",
    "example | ring2 tp2 pp2 sp zbv | n4",
    "llama dynamic | ring2 tp2 sp full | n2",
    "llama tied | ulysses2 pp2 interleaved selective | n4",
    "gpt2 | ring2 pp2 zb-h1 | n2",
    "opt | ulysses2 tp2 sp | n1",
    "qwen3 kv1 | ring2 ulysses2 dp2 zero3 | n1",
    "mistral window3 | ring2 ulysses2 pp2 dualpipev | n4",
    "gpt_oss window3 | ring2 | n1",
    "gpt_oss | ulysses2 | n1",
    "deepseek_v3 | ring2 ulysses2 | n1",
]


@pytest.mark.parametrize("line", EQUAL)
def test_equals_one_process(line: str, assert_equal: Callable[[str], None]) -> None:
    assert_equal(line)


def _short_step(parallel: Any, batch: tuple[Tensor, Tensor]) -> None:
    parallel.step((batch[0][:, :6], batch[1][:, :6]))


def test_a_batch_that_cannot_be_cut(on_split: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="into multiples of 4, found 6 tokens"):
        on_split("example | ring2 | n1", _short_step)
