"""Context parallelism without ranks: where tokens go, what of a mask is computed where, kernels, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import meshwright
from meshwright.cost_models.strategy import Recompute
from meshwright.executors.attention_hooks import apply_context_parallel
from meshwright.executors.attention_kernels import Band, _cuda_window, attend, attend_backward, merge
from meshwright.executors.context_parallel import ContextParallel, own_positions
from meshwright.executors.fake_kernels import cuda_kernels
from meshwright.executors.recompute import apply_recompute
from meshwright.executors.ring_attention import parts


def places(sequence: int, ring: int, ulysses: int) -> list[list[int]]:
    """The positions of each cp rank, Ulysses ranks being neighbours."""
    return [
        own_positions(sequence, ring=ring, ulysses=ulysses, ring_index=r, ulysses_index=u).tolist()
        for r in range(ring)
        for u in range(ulysses)
    ]


class TestPositions:
    def test_a_ring_takes_heads_and_tails(self) -> None:
        assert places(8, 2, 1) == [[0, 1, 6, 7], [2, 3, 4, 5]]

    def test_ulysses_takes_pieces_in_order(self) -> None:
        assert places(8, 1, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]

    def test_both_cut_a_place_of_the_ring(self) -> None:
        assert places(16, 2, 2) == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert places(12, 2, 3) == [[0, 1], [2, 9], [10, 11], [3, 4], [5, 6], [7, 8]]

    @pytest.mark.parametrize(("sequence", "ring", "ulysses", "multiple"), [(6, 2, 1, 4), (12, 2, 4, 8), (9, 1, 2, 2)])
    def test_a_length_that_cannot_be_cut(self, sequence: int, ring: int, ulysses: int, multiple: int) -> None:
        with pytest.raises(meshwright.InputError, match=f"into multiples of {multiple}, found {sequence} tokens"):
            own_positions(sequence, ring=ring, ulysses=ulysses, ring_index=0, ulysses_index=0)


def seen_by_band(band: Band | None, num_queries: int, num_keys: int) -> Tensor:
    """What a part's queries see, ``[queries, keys]``, from the definition of its band."""
    if band is None:
        return torch.ones(num_queries, num_keys, dtype=torch.bool)
    distance = band.offset + torch.arange(num_queries)[:, None] - torch.arange(num_keys)
    return (distance >= 0) & ((distance < band.window) if band.window else torch.tensor(True))


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [0, 1, 2, 3, 5, 8, 11, 17, 23])
def test_parts_see_what_the_mask_lets_through_once(ring: int, window: int) -> None:
    sequence = 24
    positions = [torch.tensor(own) for own in places(sequence, ring, 1)]
    seen = torch.zeros(sequence, sequence, dtype=torch.int64)
    for rank in range(ring):
        for source in range(ring):
            for queries, keys, band in parts(rank, source, ring, sequence // ring, causal=True, window=window):
                part = seen_by_band(band, queries.stop - queries.start, keys.stop - keys.start)
                assert part.any(1).all()  # a row without a key would be divided by zero
                seen[positions[rank][queries][:, None], positions[source][keys]] += part
    distance = torch.arange(sequence)[:, None] - torch.arange(sequence)
    assert torch.equal(seen, ((distance >= 0) & ((distance < window) | (window == 0))).long())


def test_a_balanced_ring_computes_equally_much_everywhere() -> None:
    work = [
        sum((q.stop - q.start) * (k.stop - k.start) for q, k, _ in parts(rank, source, 4, 16, causal=True, window=0))
        for rank in range(4)
        for source in range(4)
        if source != rank
    ]
    assert set(work) == {16 * 16 / 2}


BANDS = [None, Band(), Band(window=3), Band(offset=6), Band(offset=4, window=6), Band(offset=2, window=3)]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("widths", [(8, 8), (6, 4)], ids=str)
def test_a_part_and_its_gradients(band: Band | None, widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shapes = ((2, 4, 7, widths[0]), (2, 2, 7, widths[0]), (2, 2, 7, widths[1]))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    scores = 0.3 * q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)
    scores = scores.masked_fill(~seen_by_band(band, 7, 7), -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, dim=1)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    out, lse = attend(q.detach(), k.detach(), v.detach(), band, 0.3)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=0, atol=1e-13)
    found = attend_backward(grad, q.detach(), k.detach(), v.detach(), out, lse, band, 0.3)
    for mine, wanted in zip(found, expected_grads, strict=True):
        assert torch.allclose(mine, wanted, rtol=0, atol=1e-13)


def test_parts_merge_into_the_whole_in_float32() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8).bfloat16() for _ in range(3))
    out, lse = attend(q, k[:, :, :4], v[:, :, :4], None, 0.3)
    assert lse.dtype is torch.float32
    merged = out.float()
    merge(merged, lse, *attend(q, k[:, :, 4:], v[:, :, 4:], None, 0.3))
    whole = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.3)
    assert torch.allclose(merged, whole, rtol=0, atol=0.02)
    scores = 0.3 * q.float() @ k.float().transpose(-1, -2)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("band", [*BANDS, Band(offset=1), Band(offset=3, window=2)], ids=str)
def test_a_window_in_the_words_of_the_flash_kernel(band: Band | None) -> None:
    """Its window counts keys to the left and right of a diagonal (FlashAttention-2, ``flash_attn_interface.py``)."""
    q = torch.zeros(1, 1, 7, 8)
    causal, left, right = _cuda_window(q, q, band)
    shifted = torch.arange(7) - torch.arange(7)[:, None]  # key less query
    left, right = 7 if left is None else left, 0 if causal else 7 if right is None else right
    assert torch.equal((shifted <= right) & (shifted >= -left), seen_by_band(band, 7, 7))


# -- what is led through context parallelism, and what is refused ---------------------------------------------------


class Alone(ContextParallel):
    """All tokens are here."""

    def __init__(self) -> None:
        self.num_calls = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **others: Any) -> Tensor:
        self.num_calls += 1
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        heads = x[:, None]
        return functional.scaled_dot_product_attention(heads, heads, heads, **self.options)[:, 0]


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Any:
        return self.blocks[0](x)


def run(block: nn.Module) -> ContextParallel:
    context, model = Alone(), Model(block)
    apply_context_parallel(model, {0: block}, context)
    x = torch.randn(1, 4, 8, requires_grad=True)
    model(x).sum().backward()
    return context


def test_attention_is_caught_and_again_in_recomputation() -> None:
    assert run(Block(is_causal=True)).num_calls == 1
    context, block = Alone(), Block(is_causal=True)
    apply_context_parallel(Model(block), {0: block}, context)
    apply_recompute(block, Recompute.FULL)
    x = torch.randn(1, 4, 8, requires_grad=True)
    (block(x) * x).sum().backward()
    assert context.num_calls == 2


def test_attention_is_caught_in_a_dry_run_for_gpus() -> None:
    with FakeTensorMode(), cuda_kernels():
        assert run(Block(is_causal=True)).num_calls == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "attention mask"), ({"dropout_p": 0.1}, "dropout of 0.1")],
)
def test_attention_that_is_not_exact_in_parts(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(meshwright.InputError, match=sentence):
        run(Block(**options))


def test_a_block_that_attends_in_another_way() -> None:
    with pytest.raises(meshwright.InputError, match="decoder block 0 made no attention"):
        run(nn.Tanh())


def test_a_model_without_positions() -> None:
    with pytest.raises(meshwright.InputError, match=r"Tanh\.forward takes no position_ids"):
        apply_context_parallel(nn.Tanh(), {}, Alone())


def test_layers_of_hugging_face_that_the_interface_does_not_tell_apart() -> None:
    class Chunked(Model):
        config = SimpleNamespace(layer_types=["chunked_attention", "full_attention"])

        def set_attn_implementation(self, name: str) -> None:
            raise AssertionError

    with pytest.raises(meshwright.InputError, match="layers of chunked_attention"):
        apply_context_parallel(Chunked(nn.Tanh()), {}, Alone())


def test_softcapped_logits_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
             "num_key_value_heads": 2, "intermediate_size": 48}  # fmt: skip
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes))
    apply_context_parallel(model, dict(enumerate(model.model.layers)), Alone())
    with pytest.raises(meshwright.InputError, match="softcapped logits"):
        model(torch.zeros(1, 4, dtype=torch.int64))
