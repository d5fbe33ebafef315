"""Model records: counts worked out by hand, and what a spec refuses to be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright import InputError
from meshwright.profiler.model import (
    AttentionKind,
    AttentionLayer,
    Block,
    BlockKind,
    EmbeddingLayer,
    HeadLayer,
    MlpLayer,
    ModelSpec,
    MoeLayer,
    NormKind,
    NormLayer,
    load_model,
)

MLA = AttentionLayer(
    attention_kind=AttentionKind.MLA,
    hidden=100,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    value_head_dim=12,
    q_lora_rank=30,
    kv_lora_rank=20,
    rope_head_dim=8,
)


def test_latent_attention_by_hand() -> None:
    # queries 100 x 30, 30 x 4*(16+8); latent 100 x (20+8); expand 20 x 4*(16+12); out 4*12 x 100
    assert MLA.matmuls == ((100, 30), (30, 96), (100, 28), (20, 112), (48, 100))
    weights = 3000 + 2880 + 2800 + 2240 + 4800
    assert MLA.params == weights
    assert replace(MLA, qkv_bias=True, out_bias=True).params == weights + (30 + 28) + 100


def test_latent_attention_without_query_latent_by_hand() -> None:
    straight = replace(MLA, q_lora_rank=0)
    assert straight.matmuls[0] == (100, 96)
    # a bias on the key/value latent only, as transformers' q_proj has none
    assert replace(straight, qkv_bias=True).params - straight.params == 28


def test_grouped_attention_by_hand() -> None:
    attention = load_model("llama3-8b").attention
    # (4096 x (32 + 8 + 8) * 128) + (4096 x 4096)
    assert attention.params == 4096 * 6144 + 4096 * 4096
    assert attention.attention_kind is AttentionKind.GQA
    assert attention.matmuls == ((4096, 6144), (4096, 4096))


def test_llama3_8b_by_kind() -> None:
    spec = load_model("llama3-8b")
    assert spec.params_by_kind() == {
        "embedding": 128256 * 4096,
        "norm": (2 * 32 + 1) * 4096,
        "attention": 32 * (4096 * 6144 + 4096 * 4096),
        "mlp": 32 * 3 * 4096 * 14336,
        "head": 128256 * 4096,
    }
    assert (spec.num_layers, spec.hidden, spec.vocab_size, spec.tied, spec.ffn_size) == (32, 4096, 128256, False, 14336)
    assert [(block.kind.value, block.repeat) for block in spec.blocks] == [
        ("embedding", 1),
        ("decoder", 32),
        ("head", 1),
    ]


def test_deepseek_v3_folds_into_dense_and_expert_layers() -> None:
    spec = load_model("deepseek-v3")
    assert [block.repeat for block in spec.decoder_blocks] == [3, 58]
    assert spec.moe is not None
    assert (spec.moe.num_experts, spec.moe.top_k, spec.moe.shared_ffn_size) == (256, 8, 2048)
    assert spec.ffn_size == 2048  # tp must divide the dense 18,432 and the shared 2,048
    assert spec.attention.attention_kind is AttentionKind.MLA
    assert (spec.attention.head_dim, spec.attention.rope_head_dim, spec.attention.value_head_dim) == (128, 64, 128)


def test_active_parameters_by_hand() -> None:
    moe = MoeLayer(hidden=10, num_experts=4, top_k=1, expert_ffn_size=6, shared_ffn_size=5)
    assert moe.params == 4 * 180 + 40 + 150
    spec = make_spec(moe)
    assert spec.params - spec.active_params == 3 * 180
    dense = load_model("gpt2")
    assert dense.active_params == dense.params


def test_sliding_windows_split_the_run() -> None:
    fields = {"model_type": "qwen2", "num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 4}
    spec = load_model({**fields, "sliding_window": 128})
    windows = [layer.window for block in spec.decoder_blocks for layer in block.layers if layer.kind == "attention"]
    assert [block.repeat for block in spec.decoder_blocks] == [4, 2]
    assert windows == [0, 128]


def test_digest_ignores_name_and_notes_but_no_size() -> None:
    spec = load_model("gpt3-13b")
    assert replace(spec, name="x", notes=()).digest == spec.digest
    assert replace(spec, max_seq_len=4096).digest != spec.digest


def make_spec(*layers: MoeLayer | MlpLayer | NormLayer, tied: bool = False) -> ModelSpec:
    attention = AttentionLayer(
        attention_kind=AttentionKind.MHA, hidden=10, num_heads=2, num_kv_heads=2, head_dim=5, value_head_dim=5
    )
    return ModelSpec(
        name="small",
        architecture="hand",
        max_seq_len=16,
        blocks=(
            Block(kind=BlockKind.EMBEDDING, layers=(EmbeddingLayer(vocab_size=7, hidden=10),)),
            Block(kind=BlockKind.DECODER, layers=(attention, *layers)),
            Block(kind=BlockKind.HEAD, layers=(HeadLayer(hidden=10, vocab_size=7, tied=tied),)),
        ),
    )


def test_a_spec_needs_its_ends_and_one_width() -> None:
    spec = make_spec(MlpLayer(hidden=10, ffn_size=20))
    with pytest.raises(InputError, match="one embedding block"):
        replace(spec, blocks=spec.blocks[1:])
    with pytest.raises(InputError, match="repeat must be"):
        replace(spec, blocks=(replace(spec.blocks[0], repeat=2), *spec.blocks[1:]))
    with pytest.raises(InputError, match=r"layers differ in hidden \(10, 11\)"):
        make_spec(MlpLayer(hidden=11, ffn_size=20))
    with pytest.raises(InputError, match="at least one AttentionLayer"):
        replace(spec, blocks=(spec.blocks[0], replace(spec.blocks[1], layers=()), spec.blocks[2]))
    with pytest.raises(InputError, match="tied, but the embedding has 7 rows and the head 8"):
        head = Block(kind=BlockKind.HEAD, layers=(HeadLayer(hidden=10, vocab_size=8, tied=True),))
        replace(spec, blocks=(*spec.blocks[:-1], head))
    with pytest.raises(InputError, match="max_seq_len must be at least 1"):
        replace(spec, max_seq_len=0)


def test_layers_refuse_sizes_that_cannot_be() -> None:
    with pytest.raises(InputError, match="mlp layer: ffn_size must be 1 to 1000000000, found 0"):
        MlpLayer(hidden=10, ffn_size=0)
    with pytest.raises(InputError, match="top_k=3 is more than num_experts=2"):
        MoeLayer(hidden=10, num_experts=2, top_k=3, expert_ffn_size=4)
    with pytest.raises(InputError, match="num_kv_heads=3 must divide num_heads=4"):
        replace(MLA, num_kv_heads=3)
    with pytest.raises(InputError, match="attention_kind=gqa and kv_lora_rank=20 disagree"):
        replace(MLA, attention_kind=AttentionKind.GQA)
    with pytest.raises(InputError, match="norm layer: hidden"):
        NormLayer(norm_kind=NormKind.RMS, hidden=-1)
