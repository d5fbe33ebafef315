"""Modules -> specs by one watched pass: what is understood equals what a config says, the rest is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from llama import Llama, LlamaConfig  # noqa: E402
from moe import Moe, MoeConfig  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from meshwright import InputError  # noqa: E402
from meshwright.profiler import trace  # noqa: E402
from meshwright.profiler.layers import MlpLayer, MoeLayer  # noqa: E402
from meshwright.profiler.model import AttentionKind, AttentionLayer, LayerSpec, ModelSpec, load_model  # noqa: E402
from meshwright.profiler.trace import trace_model  # noqa: E402


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def kinds(spec: ModelSpec) -> list[str]:
    return [layer.kind for layer in spec.decoder_blocks[0].layers]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_example_llama(tied: bool, device: str) -> None:
    with torch.device(device):
        module = Llama(LlamaConfig(num_layers=3, tied=tied))
    spec = trace_model(module, seq_len=256)
    wanted = load_model(
        {
            "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176,
            "max_position_embeddings": 256, "tie_word_embeddings": tied,
        }
    )  # fmt: skip
    assert spec.blocks == wanted.blocks
    assert (spec.name, spec.architecture, spec.max_seq_len) == ("Llama", "Llama", 256)
    assert spec.params == count(module)


def test_a_large_model_costs_nothing() -> None:
    with torch.device("meta"):
        module = Llama(LlamaConfig(hidden=8192, num_layers=4, num_heads=64, num_kv_heads=8, ffn_size=28672))
    assert trace_model(module).params == count(module) > 3e9


def test_tracing_leaves_the_module_alone() -> None:
    module = Llama(LlamaConfig(num_layers=2)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {name: set(vars(part)) for name, part in module.named_modules()}
    trace_model(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {name: set(vars(part)) for name, part in module.named_modules()} == attributes
    assert module.training and not module.blocks[0]._forward_hooks and not module.blocks[0]._forward_pre_hooks


SMALL = {"vocab_size": 301, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2, "intermediate_size": 100}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 20}),
    ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    ("gpt2", {}),
    ("opt", {"ffn_dim": 100}),
    ("opt", {"do_layer_norm_before": False, "tie_word_embeddings": False}),
    ("gpt_neox", {"intermediate_size": 100}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gemma", {"num_key_value_heads": 2, "head_dim": 16}),
    ("phi", {"qk_layernorm": True}),
    ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 3, "intermediate_size": 20}),
    (
        "qwen2_moe",
        {
            "num_key_value_heads": 2,
            "num_experts": 5,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 36,
        },
    ),
    ("qwen3_moe", {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 9, "mlp_only_layers": [0]}),
    ("phimoe", {"num_key_value_heads": 2, "attention_bias": True, "lm_head_bias": True, "output_router_logits": True}),
]


def hugging_face(model_type: str, changes: dict[str, Any], attention: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **changes, "bos_token_id": 0, "eos_token_id": 0})
    with torch.device("meta"):
        module: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return module


def sizes(spec: ModelSpec) -> list[list[LayerSpec]]:
    """Layers without what a pass cannot show: the name of a hand-written activation, in which dtype a router works."""
    return [[_shown(layer) for layer in block.layers] for block in spec.blocks]


def _shown(layer: LayerSpec) -> LayerSpec:
    if isinstance(layer, MoeLayer):
        return replace(layer, activation="", float32_router=False, narrow_weights=False)
    return replace(layer, activation="") if isinstance(layer, MlpLayer) else layer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("model_type", "changes"), CONFIGS)
def test_structure_says_what_the_config_says(
    model_type: str, changes: dict[str, Any], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = hugging_face(model_type, changes, attention)
    by_config = trace_model(module)
    assert by_config.architecture == model_type
    monkeypatch.setattr(trace, "BUILDERS", {})  # no config is understood any more
    by_structure = trace_model(module)
    assert by_structure.architecture == type(module).__name__
    assert sizes(by_structure) == sizes(by_config)
    assert by_structure.params == by_config.params == count(module)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mixtral", {"num_key_value_heads": 2, "sliding_window": 8}),
        ("qwen3_moe", {"num_key_value_heads": 2, "decoder_sparse_step": 2}),
        ("deepseek_v3", {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 16}),
        ("gpt_oss", {"num_key_value_heads": 2, "num_local_experts": 5, "intermediate_size": 20}),
        ("llama4_text", {"num_key_value_heads": 2, "interleave_moe_layer_step": 2}),
        ("gemma3_text", {"num_key_value_heads": 2}),
    ],
)
def test_unlike_layers_are_those_of_the_config(model_type: str, changes: dict[str, Any]) -> None:
    """Experts, latents, windows and sinks of a module on the meta device: its spec is that of its config."""
    module: Any = hugging_face(model_type, changes, "eager")
    spec = trace_model(module)
    assert spec.digest == load_model({"model_type": model_type, **SMALL, **changes}).digest
    assert spec.digest == load_model(module.config).digest
    assert spec.params == count(module)


@pytest.mark.parametrize("shared", [0, 32])
def test_the_example_with_experts(shared: int) -> None:
    """What shapes cannot show (capacity, groups, the auxiliary loss) is read from its config."""
    with torch.device("meta"):
        module = Moe(
            MoeConfig(num_layers=3, ffn_size=shared, capacity_factor=1.25, group_tokens=8, router_aux_loss_coef=0.01)
        )
    spec = trace_model(module)
    assert kinds(spec) == ["norm", "attention", "norm", "moe"]
    assert spec.moe is not None
    assert (spec.moe.num_experts, spec.moe.top_k, spec.moe.expert_ffn_size) == (8, 2, 64)
    assert (spec.moe.shared_ffn_size, spec.moe.gated, spec.moe.activation) == (shared, True, "silu")
    assert (spec.moe.capacity_factor, spec.moe.group_tokens, spec.moe.aux_loss) == (1.25, 8, 0.01)
    assert spec.params == count(module)
    plain = trace_model(Moe(MoeConfig(num_layers=1))).moe
    assert plain is not None
    assert (plain.capacity_factor, plain.group_tokens, plain.aux_loss) == (0.0, 0, 0.0)


class DenseExperts(nn.Module):
    """Stacked experts that every token goes through: nothing is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(24, 3, bias=False)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(3, 24, 40))
        self.experts.down = nn.Parameter(torch.zeros(3, 40, 24))
        self.experts.forward = lambda x: torch.relu(x @ self.experts.up) @ self.experts.down

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return torch.einsum("ebth,bte->bth", self.experts(x), weights)


OTHERS: list[tuple[str, dict[str, Any], tuple[int, int, int, bool], list[str]]] = [
    # heads, key/value heads, norms on queries and keys, gated; layers of a block
    ("gemma", {"num_key_value_heads": 1, "head_dim": 16}, (4, 1, 0, True), ["norm", "attention", "norm", "mlp"]),
    (
        "gemma3_text",
        {"num_key_value_heads": 2, "head_dim": 16},
        (4, 2, 32, True),
        ["norm", "attention", "norm", "norm", "mlp", "norm"],
    ),
    ("phi", {}, (4, 4, 0, False), ["norm", "attention", "mlp"]),
    ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}, (4, 2, 0, True), ["norm", "attention", "norm", "mlp"]),
    ("olmo2", {"pad_token_id": 0}, (4, 4, 96, True), ["attention", "norm", "mlp", "norm"]),
    ("falcon", {}, (4, 1, 0, False), ["norm", "attention", "mlp"]),
]


@pytest.mark.parametrize(("model_type", "changes", "wanted", "layers"), OTHERS)
def test_architectures_without_a_reader(
    model_type: str,
    changes: dict[str, Any],
    wanted: tuple[int, int, int, bool],
    layers: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fused projections (phi3, falcon), norms after (olmo2) and around (gemma3), one key head (gemma, falcon)."""
    module = hugging_face(model_type, changes)
    monkeypatch.setattr(trace, "BUILDERS", {})
    spec = trace_model(module)
    attention = spec.attention
    mlp = next(layer for layer in spec.layers() if layer.kind == "mlp")
    found = (attention.num_heads, attention.num_kv_heads, attention.qk_norm_params, mlp.gated)
    assert found == wanted
    assert kinds(spec) == layers
    assert spec.params == count(module)


class HandAttention(nn.Module):
    """Written with bare parameters and einsum, values narrower than keys."""

    def __init__(self, hidden: int, heads: int, head_dim: int, value_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        self.qk = nn.Parameter(torch.zeros(hidden, 2 * heads * head_dim))
        self.v = nn.Parameter(torch.zeros(hidden, heads * value_dim))
        self.v_bias = nn.Parameter(torch.zeros(heads * value_dim))
        self.out = nn.Parameter(torch.zeros(heads * value_dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k = (x @ self.qk).view(batch, length, 2, self.heads, self.head_dim).unbind(2)
        v = (x @ self.v + self.v_bias).view(batch, length, self.heads, self.value_dim)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.head_dim**-0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return mixed.reshape(batch, length, -1) @ self.out


class HandBlock(nn.Module):
    def __init__(self, hidden: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attention = attention
        self.up = nn.Linear(hidden, 40)
        self.down = nn.Linear(40, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(functional.gelu(self.up(x), approximate="tanh"))


class HandModel(nn.Module):
    def __init__(self, *blocks: nn.Module, hidden: int = 24) -> None:
        super().__init__()
        self.tokens = nn.Embedding(101, hidden)
        self.positions = nn.Parameter(torch.zeros(1, 64, hidden))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden, bias=False)
        self.head = nn.Linear(hidden, 101)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_a_model_written_by_hand() -> None:
    module = HandModel(*(HandBlock(24, HandAttention(24, 2, 8, 6)) for _ in range(3)))
    spec = trace_model(module, name="mine")
    attention = spec.attention
    assert attention == AttentionLayer(
        attention_kind=AttentionKind.MHA,
        hidden=24,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        value_head_dim=6,
        extra_params=12,  # a bias on the values alone
        rotary=False,
    )
    assert spec.embedding.num_positions == spec.max_seq_len == 64
    assert kinds(spec) == ["norm", "attention", "mlp"]
    assert next(layer.activation for layer in spec.layers() if layer.kind == "mlp") == "gelu_pytorch_tanh"
    assert spec.head.bias and not spec.tied
    assert spec.params == count(module)
    assert spec.num_layers == 3 and len(spec.decoder_blocks) == 1


class FusedBlock(nn.Module):
    """A norm written out, one matrix for queries, keys and values, one for gate and up; no mask."""

    def __init__(self, hidden: int, gated_attention: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden)
        self.gate_up = nn.Linear(hidden, 96)
        self.down = nn.Linear(48, hidden)
        self.gate = nn.Linear(hidden, hidden) if gated_attention else None

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(normed).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed if self.gate is None else mixed * self.gate(x).sigmoid())
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def test_fused_projections_and_no_mask() -> None:
    module = HandModel(FusedBlock(24), FusedBlock(24))
    spec = trace_model(module)
    mlp = next(layer for layer in spec.layers() if layer.kind == "mlp")
    assert kinds(spec) == ["norm", "attention", "mlp"]
    assert (spec.attention.num_heads, spec.attention.head_dim, spec.attention.causal) == (2, 12, False)
    assert (mlp.ffn_size, mlp.gated, mlp.bias, mlp.activation) == (48, True, True, "silu")
    assert spec.params == count(module)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_encoder_layer(norm_first: bool) -> None:
    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(24, 2, 40, batch_first=True, norm_first=norm_first)

    module = HandModel(block(), block())
    spec = trace_model(module)
    first = ["norm", "attention", "norm", "mlp"]
    assert kinds(spec) == (first if norm_first else first[1:] + first[:1])
    assert (spec.attention.num_heads, spec.attention.qkv_bias, spec.attention.out_bias) == (2, True, True)
    assert spec.params == count(module)


def test_blocks_that_differ_are_each_read() -> None:
    module = HandModel(
        HandBlock(24, HandAttention(24, 2, 8, 6)), HandBlock(24, HandAttention(24, 3, 8, 6)), FusedBlock(24)
    )
    spec = trace_model(module)
    heads = [layer.num_heads for layer in spec.layers() if layer.kind == "attention"]
    assert heads == [2, 3, 2]
    assert spec.params == count(module)


class TwoAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = HandAttention(24, 2, 8, 6), HandAttention(24, 2, 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Idle(HandAttention):
    def __init__(self) -> None:
        super().__init__(24, 2, 8, 6)
        self.never = nn.Linear(24, 5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(24, 2)
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()
            if len(rows) > 0:
                x = x + expert(x)
        return x


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (lambda: HandModel(HandBlock(24, nn.Linear(24, 24))), "block 0: expected one attention in it, saw 0"),
        (lambda: HandModel(HandBlock(24, TwoAttentions())), "block 0: expected one attention in it, saw 2"),
        (lambda: HandModel(HandBlock(24, Idle())), r"did not use: blocks.0.attention.never.weight \[5, 24\]"),
        (lambda: HandModel(HandBlock(24, DenseExperts())), "experts is not called with tokens .*, choices .* weights"),
        (lambda: HandModel(HandBlock(24, Experts())), "does not run on token ids alone without its weights"),
        (
            lambda: HandModel(*[HandBlock(24, HandAttention(24, 2, 8, 6))] * 2),
            "block 0: one of its matrices is used twice",
        ),
        (lambda: HandModel(FusedBlock(24, gated_attention=True)), "no single projection takes what attention gives"),
        (lambda: nn.Linear(3, 3), "no ModuleList of decoder blocks"),
    ],
)
def test_what_is_not_understood_is_said(module: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        trace_model(module())
    assert "\n" not in str(caught.value)


def test_opt_350m_and_latent_attention_without_a_config_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = hugging_face("opt", {"word_embed_proj_dim": 24})
    with pytest.raises(InputError, match=r"OPTForCausalLM"):
        trace_model(narrow)
    latent = hugging_face("deepseek_v3", {"first_k_dense_replace": 2, "num_key_value_heads": 4})
    assert trace_model(latent).attention.attention_kind is AttentionKind.MLA
    monkeypatch.setattr(trace, "BUILDERS", {})
    with pytest.raises(InputError, match="block 0: its"):
        trace_model(latent)


def test_a_changed_module_is_not_described_by_its_config() -> None:
    module: Any = hugging_face("llama", {})
    module.model.layers[0].mlp.extra = nn.Linear(48, 7, device="meta")
    with pytest.raises(InputError, match=r"did not use: model.layers.0.mlp.extra.weight \[7, 48\]"):
        trace_model(module)
