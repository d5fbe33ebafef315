"""Attention in parts by CUDA's flash kernel, against attention written out on the CPU in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshwright.executors.attention_kernels import Band, attend, attend_backward, merge
from meshwright.executors.ring_attention import parts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.device_count(), reason="no CUDA device")]

TOKENS = 256


def written_out(q: Tensor, k: Tensor, v: Tensor, window: int, *, causal: bool) -> Tensor:
    """Softmax over the keys that may be seen, with grouped heads."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, dim=1).transpose(-1, -2) * q.shape[-1] ** -0.5
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    seen = (distance >= 0) & ((distance < window) | (window == 0)) if causal else torch.ones_like(distance).bool()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, dim=1)


@pytest.mark.parametrize("places", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 2, 40, 100, 200])
@pytest.mark.parametrize("widths", [(64, 64), (96, 64), (20, 20)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_a_ring_in_one_process(places: int, window: int, widths: tuple[int, int], causal: bool) -> None:
    if window and not causal:
        pytest.skip("windows are causal")
    torch.manual_seed(0)
    shapes = ((2, 4, TOKENS, widths[0]), (2, 2, TOKENS, widths[0]), (2, 2, TOKENS, widths[1]))
    whole = [torch.randn(shape).bfloat16() for shape in shapes]
    exact = [x.double().requires_grad_() for x in whole]
    expected = written_out(exact[0], exact[1], exact[2], window, causal=causal)
    grad = torch.randn(expected.shape).bfloat16()
    wanted_all = [expected.detach(), *torch.autograd.grad(expected, exact, grad.double())]

    chunks = torch.arange(TOKENS).chunk(2 * places)
    own = [torch.cat((chunks[rank], chunks[2 * places - 1 - rank])) for rank in range(places)]
    q, k, v, grad = (x.cuda() for x in (*whole, grad))
    scale, length = widths[0] ** -0.5, TOKENS // places
    out = torch.zeros(expected.shape, device="cuda")
    lse = torch.full(expected.shape[:-1], -torch.inf, device="cuda")
    found = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    pieces: list[tuple[Tensor, Tensor, Band | None]] = [
        (own[rank][queries].cuda(), own[source][keys].cuda(), band)
        for rank in range(places)
        for source in range(places)
        for queries, keys, band in parts(rank, source, places, length, causal=causal, window=window)
    ]
    for queries, keys, band in pieces:
        part_out, part_lse = attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], band, scale)
        mine, mine_lse = out[:, :, queries], lse[:, :, queries]
        merge(mine, mine_lse, part_out, part_lse)
        out[:, :, queries], lse[:, :, queries] = mine, mine_lse
    half = out.bfloat16()
    for queries, keys, band in pieces:
        here = attend_backward(
            grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], half[:, :, queries],
            lse[:, :, queries], band, scale,
        )  # fmt: skip
        found[0].index_add_(2, queries, here[0].float())
        found[1].index_add_(2, keys, here[1].float())
        found[2].index_add_(2, keys, here[2].float())
    for mine, wanted in zip((out, *found), wanted_all, strict=True):
        assert float((mine.double().cpu() - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
