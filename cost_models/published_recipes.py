"""How NVIDIA's performance recipes run models with experts: which dispatcher, what in CUDA graphs, what side by side.

No column says it. It is read off the recipes of NVIDIA-NeMo/Megatron-Bridge at the tag of each container (25.09:
v0.1.0, 25.11: v0.2.0, 26.02: v0.3.0, 26.04: v0.4.0, 26.06: v0.5.0, 26.08: v0.6.0; ``scripts/performance/configs`` and
later ``src/megatron/bridge/perf_recipes``): moe_flex_dispatcher_backend, cuda_graph_impl, cuda_graph_scope and
moe_a2a_overlap, and of 25.09 ``scripts/performance/run_script.py``, which drops tokens and pads wherever DeepEP
does not run. What each variant means stands in ``target_experts``.
"""

from __future__ import annotations

import re

from meshwright.cost_models.published_rows import Row
from meshwright.profiler.record import record


@record
class Recipe:
    """Rows that ran in one way: by model, GPU, precision (regular expressions) and container release, ends included."""

    model: str = ""
    gpu: str = ""
    precision: str = ""
    since: float = 0.0
    until: float = 99.0
    variant: str


# tried in order
RECIPES: tuple[Recipe, ...] = (
    Recipe(gpu="h100", model="qwen3-235b", variant="overlap"),
    Recipe(gpu="h100", model="qwen3", until=26.02, variant="overlap"),
    Recipe(gpu="h100", model="qwen3|kimi", variant="hybridep-eager"),
    Recipe(gpu="h100", model="deepseek", since=25.11, variant="hybridep-eager"),
    Recipe(gpu="gb[23]00", until=25.09, variant="padded"),
    Recipe(gpu="b200", model="qwen3-30b", until=25.09, variant="padded"),
    Recipe(gpu="gb[23]00", model="kimi", variant="hybridep-eager"),
    Recipe(gpu="gb[23]00", precision="mxfp8", since=26.06, variant="graph"),
    Recipe(gpu="(?<!g)b300", model="qwen3-30b", precision="mxfp8", since=26.06, variant="graph"),
    Recipe(gpu="gb300", model="gpt-oss", since=25.11, variant="partial"),
    Recipe(gpu="gb300", model="deepseek", precision="fp8|fp4", since=26.02, variant="hybridep-eager"),
    Recipe(gpu="gb[23]00", model="qwen3|deepseek", since=25.11, variant="hybridep"),
    Recipe(gpu="(?<!g)b300", model="gpt-oss", since=26.04, variant="hybridep"),
    Recipe(gpu="(?<!g)b300", model="gpt-oss", variant="partial"),
    Recipe(gpu="(?<!g)b300", model="qwen3-30b", variant="hybridep"),
    Recipe(gpu="(?<!g)b300", model="qwen3-235b", until=26.02, variant="overlap"),
    Recipe(gpu="(?<!g)b300", model="qwen3-235b", variant="hybridep-eager"),
    Recipe(gpu="(?<!g)b300", model="deepseek", since=26.06, variant="hybridep"),
    Recipe(gpu="(?<!g)b[23]00", model="deepseek", since=26.02, variant="hybridep-eager"),
    Recipe(gpu="(?<!g)b200", model="qwen3-30b", variant="partial"),
    Recipe(gpu="(?<!g)b200", model="qwen3-235b", since=25.11, until=25.11, variant="overlap"),
)
# NVIDIA/NeMo: scripts/performance/llm/pretrain_deepseek_v3.py; NVIDIA/dgxc-benchmarking: grok1/grok1_314b.yaml
# (moe_expert_capacity_factor, moe_pad_expert_input_to_capacity)
NEMO_RECIPES: tuple[Recipe, ...] = (
    Recipe(gpu="h100", model="deepseek", variant="deepep"),
    Recipe(model="deepseek|grok", variant="dropping"),
)
# where no container is named: HybridEP is what Megatron-Core offers on NVL72 systems, DeepEP what it recommends for
# DeepSeek-V3 on others (megatron/core/transformer/moe/README.md)
USUAL: tuple[Recipe, ...] = (
    Recipe(gpu="gb[23]00", variant="hybridep"),
    Recipe(gpu=r"\bh[128]00", model="deepseek|kimi", variant="hybridep-eager"),
)
DROPS = re.compile(r"token-drop training")  # beyond an expert's even share, as in arXiv 2504.14960
RELEASE = re.compile(r"\b(2\d\.\d\d)(?:\.\d\d)? nemo container")


def expert_variant(row: Row) -> str:
    """The variant of ``megatron-bridge`` or ``nemo`` that a row with experts ran; empty where no recipe says."""
    notes, framework = row.text("notes").lower(), row.text("framework").lower()
    if DROPS.search(notes):
        return "dropping"
    release = RELEASE.search(notes)
    said = [row.text(name).lower() for name in ("model", "gpu_type", "precision")]
    for recipe in RECIPES if release else NEMO_RECIPES if framework.startswith("nemo") else USUAL:
        patterns = (recipe.model, recipe.gpu, recipe.precision)
        known = all(re.search(pattern, text) for pattern, text in zip(patterns, said, strict=True))
        if known and (not release or recipe.since <= float(release[1]) <= recipe.until):
            return recipe.variant
    return ""
