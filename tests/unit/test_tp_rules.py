"""Which modules tensor parallelism splits, found on meta-device models, and what a rank then holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from meshwright import InputError  # noqa: E402
from meshwright.executors.tp_find import find_tensor_parallel_rules  # noqa: E402
from meshwright.executors.tp_rules import Region, Share, Split, TensorParallelRules  # noqa: E402
from meshwright.profiler.anatomy import find_anatomy  # noqa: E402
from meshwright.profiler.skeleton import find_matrices  # noqa: E402

DEFAULT_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
HIDDEN, HEADS, HEAD_DIM, FFN, VOCAB = 32, 4, 8, 48, 50


class Attention(nn.Module):
    """One fused projection, laid out as ``layout`` says; written as user code might be."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN) if layout == "norm over all heads" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, _ = x.shape
        fused = self.qkv(x)
        if self.layout == "per head":
            q, k, v = fused.view(batch, sequence, -1, 3 * HEAD_DIM).transpose(1, 2).chunk(3, dim=-1)
        elif self.layout == "heads inside":  # [head_dim, heads]: a head is every fourth column
            parts = fused.chunk(3, dim=-1)
            q, k, v = (part.view(batch, sequence, HEAD_DIM, -1).permute(0, 3, 1, 2) for part in parts)
        else:
            q, k, v = (self.norm(part).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in fused.chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.layout == "heads inside":
            return self.out(mixed.permute(0, 2, 3, 1).flatten(-2))
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.gate_up = nn.Linear(HIDDEN, 2 * FFN, bias=False)
        self.down = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.layout == "interleaved" else both.chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, attention: str, mlp: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention = Attention(attention)
        self.mlp = Mlp(mlp)
        self.twice = mlp == "twice"

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(x)
        return x + self.mlp(x) if self.twice else x


class Model(nn.Module):
    def __init__(self, attention: str = "parts", mlp: str = "parts", blocks: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block(attention, mlp) for _ in range(blocks))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rules_of(**options: Any) -> TensorParallelRules:
    with torch.device("meta"):
        return find_tensor_parallel_rules(Model(**options))


def regions_of(rules: TensorParallelRules) -> tuple[Region, Region]:
    attention, mlp = rules.regions[:2]
    return attention, mlp


def hugging_face(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    special = {"bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 32}
    config = getattr(transformers, f"{name}Config")(**sizes, **special, **options)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_fused_parts() -> None:
    attention, mlp = regions_of(rules_of())
    assert (attention.columns, attention.row) == (("blocks.0.attention.qkv",), "blocks.0.attention.out")
    assert (attention.num_units, attention.num_shared, attention.unit_width) == (4, 4, 8)
    # [q|k|v], each of 4 heads of 8: rank 1 of 2 holds heads 2 and 3 of each part
    expected = [*range(16, 32), *range(48, 64), *range(80, 96)]
    assert attention.outputs(0, 2, 1).tolist() == expected
    assert attention.inputs(2, 1) == slice(16, 32)
    assert attention.split(0) is Split.FUSED_COLUMN
    assert (attention.container, attention.argument) == ("blocks.0.attention", 0)
    assert not attention.by_token
    # [gate|up] of 48 each: rank 2 of 4 holds 24 to 36 of each
    assert mlp.outputs(0, 4, 2).tolist() == [*range(24, 36), *range(72, 84)]
    assert (mlp.num_units, mlp.split(0), mlp.by_token) == (48, Split.FUSED_COLUMN, True)


def test_fused_per_head_and_interleaved_are_contiguous() -> None:
    attention, mlp = regions_of(rules_of(attention="per head", mlp="interleaved"))
    assert attention.outputs(0, 4, 1).tolist() == list(range(24, 48))
    assert mlp.outputs(0, 4, 1).tolist() == list(range(24, 48))
    assert (attention.split(0), mlp.split(0)) == (Split.COLUMN, Split.COLUMN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "norm over all heads"}, "cannot settle how to split blocks.0.attention.out: each of its inputs"),
        ({"attention": "heads inside"}, "cannot settle how to split blocks.0.attention.out: its inputs are not made"),
        ({"mlp": "twice"}, "blocks.0.mlp.gate_up is used twice in one forward"),
    ],
)
def test_unsettled_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rules_of(**options)


def test_every_block_has_rules_and_the_rest_is_replicated() -> None:
    rules = rules_of(blocks=3)
    assert len(rules.regions) == 6
    assert rules.splits == {
        "table": Split.VOCABULARY_EMBEDDING,
        "head": Split.VOCABULARY_HEAD,
        **{f"blocks.{i}.attention.qkv": Split.FUSED_COLUMN for i in range(3)},
        **{f"blocks.{i}.attention.out": Split.ROW for i in range(3)},
        **{f"blocks.{i}.mlp.gate_up": Split.FUSED_COLUMN for i in range(3)},
        **{f"blocks.{i}.mlp.down": Split.ROW for i in range(3)},
    }
    assert rules.embedding_reaches_blocks
    assert rules.padded_vocab_size(4) == 52


def test_weights_are_neither_read_nor_changed() -> None:
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_tensor_parallel_rules(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and type(model.blocks[0]) is Block


def test_grouped_queries() -> None:
    model = hugging_face("Llama", intermediate_size=48, num_key_value_heads=2)
    rules = find_tensor_parallel_rules(model)
    attention, _ = regions_of(rules)
    assert (attention.num_units, attention.num_shared, attention.unit_width) == (4, 2, 8)
    assert [attention.split(column) for column in range(3)] == [Split.COLUMN, Split.SHARED_COLUMN, Split.SHARED_COLUMN]
    assert attention.argument == "hidden_states"
    (groups,) = attention.attributes
    assert (groups.name, groups.share) == ("num_key_value_groups", Share.UNITS_PER_SHARED)
    assert [attention.share(groups.share, tp) for tp in (1, 2, 4)] == [2, 2, 1]
    # four ranks: the first two hold key/value head 0, the others head 1
    assert [attention.outputs(1, 4, rank).tolist() for rank in (1, 2)] == [list(range(8)), list(range(8, 16))]
    assert [attention.copies(column, 4) for column in range(3)] == [1, 2, 2]
    assert [attention.copies(column, 2) for column in range(3)] == [1, 1, 1]


def test_norms_on_heads_are_partial() -> None:
    rules = find_tensor_parallel_rules(hugging_face("Qwen3", intermediate_size=48, num_key_value_heads=2, head_dim=8))
    attention = "model.layers.{}.self_attn.{}_norm.weight"
    assert rules.partial == {attention.format(layer, head) for layer in (0, 1) for head in "qk"}


def test_gpt2_and_its_attribute() -> None:
    rules = find_tensor_parallel_rules(hugging_face("GPT2"))
    attention, mlp = regions_of(rules)
    assert attention.outputs(0, 4, 0).tolist() == [*range(8), *range(32, 40), *range(64, 72)]
    (size,) = attention.attributes
    assert (size.module, size.name) == ("transformer.h.0.attn", "split_size")
    assert attention.share(size.share, 4) == 8
    assert rules.matrices[mlp.row].transposed and not rules.embedding_reaches_blocks


def test_opt_runs_its_final_norm_last() -> None:
    model = hugging_face("OPT", ffn_dim=48, word_embed_proj_dim=32)
    anatomy = find_anatomy(model)
    assert anatomy.before == ("model.decoder.embed_positions",)
    assert anatomy.after == ("model.decoder.final_layer_norm",)
    attention, mlp = regions_of(find_tensor_parallel_rules(model))
    assert [(item.name, item.share) for item in attention.attributes] == [("num_heads", Share.UNITS)]
    assert (mlp.container, mlp.by_token) == ("", True)


def test_neox_heads_are_whole() -> None:
    attention, _ = regions_of(find_tensor_parallel_rules(hugging_face("GPTNeoX", intermediate_size=48)))
    assert np.array_equal(attention.outputs(0, 2, 1), np.arange(48, 96))
    assert attention.attributes == ()


def test_experts_are_left_alone_and_a_shared_expert_is_split() -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    model = hugging_face("Qwen2Moe", num_key_value_heads=2, decoder_sparse_step=1, **sizes)
    rules = find_tensor_parallel_rules(model)
    assert rules.experts == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    _, shared = regions_of(rules)
    assert (shared.row, shared.num_units, shared.by_token) == ("model.layers.0.mlp.shared_expert.down_proj", 24, True)
    assert (shared.container, shared.argument) == ("model.layers.0.mlp.shared_expert", 0)
    # the router and the gate on the shared expert stay whole
    assert not any("mlp.gate" in name or "shared_expert_gate" in name for name in rules.splits)


def test_latent_projections_are_kept_whole() -> None:
    sizes = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    model = hugging_face("DeepseekV3", num_key_value_heads=4, intermediate_size=48, **sizes, **experts)
    attention, _ = regions_of(find_tensor_parallel_rules(model))
    prefix = "model.layers.0.self_attn."
    assert attention.columns == (f"{prefix}q_b_proj", f"{prefix}kv_b_proj")
    assert attention.kept_whole == attention.entries == (f"{prefix}q_a_proj", f"{prefix}kv_a_proj_with_mqa")
    assert (attention.num_units, attention.num_shared, attention.unit_width) == (4, 4, 8)
    assert attention.outputs(0, 2, 1).tolist() == list(range(20, 40))  # queries of 10 a head
    assert attention.outputs(1, 2, 1).tolist() == list(range(28, 56))  # 6 of a key and 8 of a value a head
    partial = find_tensor_parallel_rules(model).partial
    assert {f"{prefix}{name}.weight" for name in ("q_a_proj", "q_a_layernorm", "kv_a_layernorm")} <= partial


def test_attention_sinks_are_split_with_their_heads() -> None:
    sizes = {"head_dim": 8, "num_local_experts": 4, "intermediate_size": 16}
    model = hugging_face("GptOss", num_key_value_heads=2, rope_parameters=DEFAULT_ROTARY, **sizes)
    attention, _ = regions_of(find_tensor_parallel_rules(model))
    assert attention.vectors == ("model.layers.0.self_attn.sinks",)
    assert attention.entries_of(attention.vectors[0], 2, 1).tolist() == [2, 3]


def test_experts_built_otherwise_are_refused_by_name() -> None:
    sizes = {"num_local_experts": 4, "intermediate_size": 16, "intermediate_size_mlp": 24, "num_experts_per_tok": 1}
    model = hugging_face("Llama4Text", num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes)
    with pytest.raises(InputError, match=r"layers\.0\.feed_forward\.experts .* not built as known experts"):
        find_tensor_parallel_rules(model)


def test_an_attribute_of_the_config_is_refused() -> None:
    # Phi-3 cuts its fused projection at config.num_attention_heads, which belongs to the whole model
    model = hugging_face("Phi3", intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
    with pytest.raises(InputError, match=r"cannot settle how to split model\.layers\.0\.self_attn\.o_proj"):
        find_tensor_parallel_rules(model)


def test_illegal_degrees_are_refused_with_the_numbers() -> None:
    rules = find_tensor_parallel_rules(hugging_face("Llama", intermediate_size=48, num_key_value_heads=2))
    rules.check(4)
    with pytest.raises(InputError, match=r"tp=3 does not divide .*o_proj, which can be cut between 4 units, 2 of them"):
        rules.check(3)
    with pytest.raises(InputError, match=r"tp=8 does not divide .*o_proj"):
        rules.check(8)


class Reversed(nn.Module):
    """``x @ weight``, like GPT-2's Conv1D."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Bilinear(nn.Module):
    """Two-dimensional and no matrix product of its input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight) ** 2


def test_matrices_are_told_by_what_they_compute() -> None:
    with torch.device("meta"):
        found = find_matrices(nn.ModuleList([nn.Linear(4, 7), Reversed(5, 9), Reversed(5, 5), Bilinear()]))
    assert {name: (item.inputs, item.outputs, item.transposed) for name, item in found.items()} == {
        "0": (4, 7, False),
        "1": (5, 9, True),
        "2": (5, 5, True),  # square: as the others of its class
    }
