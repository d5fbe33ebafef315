"""The time a virtual device charges, by hand, and that its clock waits where a GPU would be waited for."""

from __future__ import annotations

import time

import pytest
import torch
from llama import Llama, LlamaConfig
from torch.utils.checkpoint import checkpoint

from meshwright import InputError
from meshwright.profiler.cluster import Device, Provenance, load_cluster
from meshwright.profiler.virtual import VirtualDevice, synchronize, virtual_device
from meshwright.profiler.virtual_name import parse_virtual_device, split_virtual_name

H100_FP32 = 67e12 * 0.85  # the datasheet's peak times the share that matmuls reach, FLOP/s
QUICK = "virtual:h100/1"  # charges nanoseconds: these tests compare stated time, and need not wait for it


def charged(device: VirtualDevice, call: object) -> float:
    assert callable(call)
    before = device.charged_s
    call()
    return device.charged_s - before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("virtual:h100/1000", ("h100-sxm", 1e3, 1e3, False)),
        ("virtual:a100-40gb-sxm/1e4", ("a100-40gb-sxm", 1e4, 1e4, False)),
        ("virtual:v100/2.5/50+numbers", ("v100-sxm", 2.5, 50.0, True)),
    ],
)
def test_names(name: str, expected: tuple[str, float, float, bool]) -> None:
    parts = split_virtual_name(name)
    assert (parts.preset, parts.flops_divisor, parts.memory_divisor, parts.numbers) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h100/1000", "expected virtual:KIND/DIVISOR"),
        ("virtual:h100", "expected virtual:KIND/DIVISOR"),
        ("virtual:h100/-3", "expected virtual:KIND/DIVISOR"),
        ("virtual:h100/1000+nombres", "expected virtual:KIND/DIVISOR"),
        ("virtual:h100/0", "must be positive"),
        ("virtual:h100/1e999", "must be positive and finite"),
        ("virtual:h100x/10", "unknown cluster 'h100x'"),
    ],
)
def test_bad_names(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("+", r"\+")):
        parse_virtual_device(name)


def test_the_record_is_the_datasheets_divided() -> None:
    real, virtual = load_cluster("h100-sxm").device, parse_virtual_device("virtual:h100/1000/50")
    assert virtual.memory_bytes_per_s == real.memory_bytes_per_s / 50
    assert virtual.memory_bytes == real.memory_bytes
    there, here = real.efficiency("matmul", "float32"), virtual.efficiency("matmul", "float32")
    assert here.peak_flops_per_s == there.peak_flops_per_s / 1000
    assert here.max_share == there.max_share
    assert (here.half_m, here.half_n, here.half_k, here.overhead_s, virtual.launch_s) == (0, 0, 0, 0, 0)
    assert "virtual device: rate divided by 1000" in here.source.reference
    assert here.source.provenance is not Provenance.MEASURED


def test_a_product_takes_its_flops_or_its_bytes() -> None:
    memory = load_cluster("h100-sxm").device.memory_bytes_per_s
    wide, narrow = torch.ones(4096, 1024), torch.ones(1024, 1)
    square = torch.ones(1024, 1024)
    with virtual_device(QUICK) as device:
        assert charged(device, lambda: wide @ square) == pytest.approx(2 * 4096 * 1024 * 1024 / H100_FP32)
        thin = 4 * (1024 * 1024 + 1024 + 1024) / memory  # reads a matrix for a vector: bound by memory
        assert charged(device, lambda: square @ narrow) == pytest.approx(thin)
        batched = torch.ones(8, 512, 512)
        assert charged(device, lambda: batched @ batched) == pytest.approx(8 * 2 * 512**3 / H100_FP32)


def test_memory_bound_operators_take_their_bytes_and_views_nothing() -> None:
    memory = load_cluster("h100-sxm").device.memory_bytes_per_s
    a, b = torch.ones(100, 100), torch.ones(100, 100)
    table, rows = torch.ones(1000, 64), torch.arange(10)
    with virtual_device(QUICK) as device:
        assert charged(device, lambda: a + b) == pytest.approx(3 * 40_000 / memory)
        assert charged(device, lambda: a.add_(b)) == pytest.approx(3 * 40_000 / memory)
        assert charged(device, lambda: a.copy_(b)) == pytest.approx(2 * 40_000 / memory)
        # ten rows are read and written, and ten indices of 8 bytes read: not the whole table
        looked_up = (2 * 10 * 64 * 4 + 80) / memory
        assert charged(device, lambda: torch.nn.functional.embedding(rows, table)) == pytest.approx(looked_up)
        assert charged(device, lambda: a.view(-1).unsqueeze(0).detach().t()) == 0
        assert charged(device, lambda: torch.empty(5000)) == 0
        assert charged(device, lambda: torch.ones(512, 512, device="meta").mm(torch.ones(512, 512, device="meta"))) == 0


def test_causal_attention_is_half_and_its_backward_five_products() -> None:
    device = virtual_device(QUICK)
    forward = device.device.efficiency("attention_forward", "float32")
    backward = device.device.efficiency("attention_backward", "float32")
    q, k, v = (torch.randn(2, 4, 512, 32, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 4 * 512 * 512 * 32
    attention = torch.nn.functional.scaled_dot_product_attention
    with device:
        whole = charged(device, lambda: attention(q, k, v))
        assert whole == pytest.approx(2 * product / (forward.peak_flops_per_s * forward.max_share))
        before = device.charged_s
        out = attention(q, k, v, is_causal=True)
        assert device.charged_s - before == pytest.approx(whole / 2)
        before = device.charged_s
        out.backward(torch.ones_like(out))
    expected = 5 * product / 2 / (backward.peak_flops_per_s * backward.max_share)
    assert device.charged_s - before == pytest.approx(expected, rel=0.1)  # ones_like and the gradients' own copies


def infinite_memory(numbers: bool) -> VirtualDevice:
    name = "virtual:h100/1/1e-9"
    return VirtualDevice(parse_virtual_device(name), numbers=numbers)


@pytest.mark.parametrize("numbers", [False, True])
def test_a_llama_step_takes_what_its_parts_take(numbers: bool) -> None:
    config = LlamaConfig(hidden=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=96, vocab_size=128)
    batch, seq = 2, 32
    torch.manual_seed(0)
    model, tokens = Llama(config), torch.randint(0, 128, (batch, seq))
    with infinite_memory(numbers) as device:  # so that only products are charged
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
    # q and o are 64 x 64, k and v 64 x 32; gate, up and down 64 x 96; the head 64 x 128. Backward is twice forward
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 128
    matmuls = 3 * 2 * weights * batch * seq / H100_FP32
    attention = 2 * 4 * batch * 64 * seq * seq / 2  # layers * (two products) over heads * head_dim = 64, half of it
    curves = [device.device.efficiency(f"attention_{way}", "float32") for way in ("forward", "backward")]
    factors = (1, 2.5)
    charged_attention = sum(
        attention * factor / (curve.peak_flops_per_s * curve.max_share)
        for factor, curve in zip(factors, curves, strict=True)
    )
    assert device.charged_s == pytest.approx(matmuls + charged_attention, rel=1e-6)
    assert torch.isfinite(loss)
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_numbers_are_those_of_the_plain_model() -> None:
    torch.manual_seed(0)
    model, tokens = Llama(LlamaConfig()), torch.randint(0, 256, (2, 16))
    plain = model(tokens)
    with virtual_device("virtual:h100/1+numbers"):
        assert torch.equal(model(tokens), plain)
    with virtual_device("virtual:h100/1"):
        noise = model(tokens)
    assert noise.shape == plain.shape
    assert noise.stride() == plain.stride()
    assert not torch.equal(noise, plain)


def test_recompute_is_charged_again() -> None:
    first, second = (torch.nn.Linear(256, 256, bias=False) for _ in range(2))
    layer, x = torch.nn.Sequential(first, second), torch.ones(64, 256, requires_grad=True)
    with infinite_memory(numbers=False) as device:
        layer(x).sum().backward()
        plain = device.charged_s
        out = checkpoint(layer, x, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
    # two products forward, four backward; torch stops recomputing at the last input that backward needs: one again
    assert device.charged_s - plain == pytest.approx(plain * 7 / 6, rel=1e-6)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="no float64 rate for matmul"), virtual_device(QUICK):
        torch.mm(torch.ones(4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64))


def test_the_clock_sleeps_what_it_charges_and_hides_the_host() -> None:
    device = VirtualDevice(one_second_per_gigaflop())
    square = torch.ones(100, 100)  # a product is 2 MFLOP: 2 ms
    with device:
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(square, square)
        synchronize()
        assert time.perf_counter() - start >= device.charged_s - 1e-3
        assert device.charged_s == pytest.approx(0.020)
        slept = device.slept_s
        torch.mm(square, square)
        issued = time.perf_counter()
        while time.perf_counter() - issued < 0.05:
            pass  # the host is busy for longer than the device: nothing is left to wait for
        device.settle()
    assert device.slept_s == slept


def one_second_per_gigaflop() -> Device:
    flops = H100_FP32 / 1e9
    return parse_virtual_device(f"virtual:h100/{flops!r}/1e-9")
