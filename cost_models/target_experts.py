"""Ways in which Megatron-Core runs experts: dispatchers, CUDA graphs, exchanges of one micro-batch beside another.

Its default is an all_to_all of rows (``moe_token_dispatcher.py: MoEAlltoAllTokenDispatcher``), launched kernel by
kernel, behind a copy of the counts of rows to the host. Performance recipes replace parts of it, see
``published_recipes``.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.cost_models.expert_traits import Dispatch, ExpertTraits
from meshwright.cost_models.framework import Framework, HostCost
from meshwright.cost_models.target_megatron import MEGATRON_BRIDGE, NEMO

# attention, router and what prepares the dispatch in graphs (cuda_graph_scope: attn, moe_router, moe_preprocess)
_PARTIAL = replace(MEGATRON_BRIDGE.experts, dense_in_graph=True)
# 4,096 tokens of 7,168 numbers move at 764 (dispatch) and 737 GB/s (combine) over 8 ranks of an NVL72, 642 and 605 over
# 32, own tokens among them (branch hybrid-ep of deepseek-ai/DeepEP, docs/README_Hybrid-EP.md: kernels on 32
# multiprocessors): 1.1 to 1.2 times the seconds of an all_to_all of as many bytes
_HYBRIDEP = replace(MEGATRON_BRIDGE.experts, dispatch=Dispatch.EACH_RANK, exchange_factor=1.15, multiprocessors=32)
# forward of one micro-batch beside backward of another (overlap_moe_expert_parallel_comm)
_OVERLAP = replace(MEGATRON_BRIDGE.experts, overlap=1.0)
# one kernel for all experts with activation and casts in it (NVTE_CUTEDSL_FUSED_GROUPED_MLP), no counts on the host
_GRAPH = replace(
    _HYBRIDEP,
    overlap=1.0,
    reads_counts=False,
    calls_each_expert=0.0,
    casts_each_expert=0.0,
    pads_rows=False,
    fused=True,
)
# every expert gets as many rows, its even share, so that nobody counts them (moe_pad_expert_input_to_capacity)
_DROPPING = replace(MEGATRON_BRIDGE.experts, reads_counts=False, pads_rows=False)

_IN_GRAPH = HostCost(launch_factor=0.02, collective_s=1e-6, microbatch_s=1e-5)
_HOST = ("host.launch_factor", "host.collective_s", "host.microbatch_s")


def _variant(name: str, experts: ExpertTraits, *, in_graph: bool = False, of: Framework = MEGATRON_BRIDGE) -> Framework:
    target = replace(of, name=f"{of.name}-{name}", version_of="megatron-bridge", experts=experts)
    target = replace(target, sinks_written_out=not experts.fused)  # with fp8_dot_product_attention, by cuDNN
    return replace(target, host=_IN_GRAPH, differs_in=_HOST) if in_graph else target


EXPERT_TARGETS: tuple[Framework, ...] = (
    _variant("partial", _PARTIAL),
    _variant("overlap", _OVERLAP),
    _variant("padded", _DROPPING, in_graph=True),
    _variant("hybridep", replace(_HYBRIDEP, dense_in_graph=True)),
    _variant("hybridep-eager", _HYBRIDEP),
    _variant("graph", _GRAPH, in_graph=True),
    _variant("dropping", _DROPPING),
    _variant("dropping", _DROPPING, of=NEMO),
    _variant("deepep", _HYBRIDEP, of=NEMO),
)
