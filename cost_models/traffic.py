"""Every collective that a step of the target issues, in one place: which axis, which operation, how often, how large.

Counted per block, since every block of a kind does the same: ``block_traffic`` lists what one block adds on one
rank, ``rank_traffic`` puts a rank's blocks together, and ``parts`` prices the same list. ``executors/counting.py`` and
the docstrings it names say where each comes from; a test counts the collectives of real steps against it.

Tensor parallelism cuts each attention and feed-forward layer into a column and a row part: one sum forward and one
backward (Shoeybi et al. 2019, arXiv 1909.08053, section 3); sequence parallelism turns each sum into a gather and a
reduce-scatter of the same tensor (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.blocks import (
    BlockKinds,
    block_kinds,
    num_tensors,
    rank_params,
    routed_params,
    stage_counts,
)
from meshwright.cost_models.context import context_traffic
from meshwright.cost_models.expert_traffic import expert_traffic
from meshwright.cost_models.framework import Framework, num_microbatches
from meshwright.cost_models.issued import PER_MICROBATCH, Collective, Phase
from meshwright.cost_models.residency import expert_shards
from meshwright.cost_models.schedules import stage_indices
from meshwright.cost_models.strategy import ConfigBatch, ParallelConfig, Recompute
from meshwright.cost_models.target_torch import MESHWRIGHT
from meshwright.cost_models.weights import Cut, layer_weights, vocab_rows
from meshwright.cost_models.workload import Workload
from meshwright.profiler.layers import AttentionKind, AttentionLayer, MlpLayer, MoeLayer, NormLayer
from meshwright.profiler.model import Block, BlockKind, ModelSpec

FloatArray = NDArray[np.float64]
COUNT_BYTES, LOSS_BYTES = 8.0, 16.0  # all_reduces of a step: the number of targets over dp, the loss over all ranks


def block_traffic(
    kinds: BlockKinds,
    index: int,
    model: ModelSpec,
    workload: Workload,
    batch: ConfigBatch,
    framework: Framework = MESHWRIGHT,
) -> list[Collective]:
    """What one block of kind ``index`` adds on one rank, collectives of a group of one included with 0 calls."""
    block = kinds.kinds[index]
    if block.kind is BlockKind.EMBEDDING:
        entries = _embedding(workload, model, batch)
    elif block.kind is BlockKind.HEAD:
        entries = _head(workload, model, batch)
    else:
        entries = _decoder(block, workload, model, batch, framework)
        entries += expert_traffic(block, workload, batch, framework)
        entries += context_traffic(block, workload, batch, framework)
    return entries + _data_parallel(kinds, index, workload, batch, framework)


def hop_bytes(model: ModelSpec, workload: Workload, batch: ConfigBatch) -> FloatArray:
    """Bytes of one send between stages: this rank's residual stream (its part of the sequence with sp)."""
    return _hidden_bytes(model, workload, batch) / np.where(batch.sequence_parallel, batch.tp, 1)


def tied_bytes(model: ModelSpec, workload: Workload, batch: ConfigBatch) -> FloatArray:
    """Bytes that first and last stage send each other for a tied embedding: this rank's shard of its gradient."""
    rows = vocab_rows(model.vocab_size, batch) / np.where(batch.zero_stage > 0, batch.dp_shard, 1)
    return np.asarray(rows * model.hidden * workload.recipe.grads.num_bytes)


def shared_grad_bytes(block: Block, workload: Workload, batch: ConfigBatch) -> FloatArray:
    """Bytes a block adds to the one all_reduce over tp that ends a step: gradients of which each rank has a part.

    Norms, routers and biases of row splits with sequence parallelism, norms on queries and keys and the latent
    projections of MLA always, and where tp exceeds the key/value heads the gradients of keys and values, whole
    (``executors/tensor_parallel.py``). With ZeRO each rank adds up its shard.
    """
    numbers = np.zeros(len(batch))
    for layer in block.layers:
        on_shards = 0.0
        if isinstance(layer, NormLayer):
            on_shards = float(layer.params)
        elif isinstance(layer, MlpLayer):
            on_shards = float(layer.hidden * layer.bias)
        elif isinstance(layer, MoeLayer):
            on_shards = float(layer.num_experts * layer.hidden)
        elif isinstance(layer, AttentionLayer) and layer.attention_kind is AttentionKind.MLA:
            whole = [weight for weight in layer_weights(layer) if weight.cut is Cut.WHOLE]
            numbers = numbers + float(sum(weight.copies * weight.rows * weight.columns for weight in whole))
        elif isinstance(layer, AttentionLayer):
            on_shards = float(layer.hidden * layer.out_bias)
            kv = layer.num_kv_heads * (layer.head_dim + layer.value_head_dim) * (layer.hidden + layer.qkv_bias)
            numbers = numbers + layer.qk_norm_params + np.where(batch.tp > layer.num_kv_heads, kv, 0.0)
        numbers = numbers + batch.sequence_parallel * on_shards
    shards = np.where(batch.zero_stage > 0, batch.dp_shard, 1)
    return np.where(batch.tp > 1, numbers * workload.recipe.grads.num_bytes / shards, 0.0)


def rank_traffic(
    model: ModelSpec, workload: Workload, config: ParallelConfig, pp_rank: int
) -> dict[tuple[str, str], tuple[int, int]]:
    """What one rank of a pipeline stage issues in one step: ``(operation, axis) -> (calls, bytes of all messages)``.

    Axes are those of ``Collective``, pp and world, as ``executors/counting.py`` names them. Left out: the padding of
    FSDP's messages (each weight's first dimension, up to a multiple of the group), and clipping of gradients, which is
    the caller's.
    """
    batch = ConfigBatch.from_configs([config])
    kinds = block_kinds(model)
    own = stage_indices(config.schedule, config.pp, config.vpp)[pp_rank].tolist()
    looped = stage_counts(kinds, config.pp, config.vpp)
    counts = np.array([looped[stage % config.pp, stage // config.pp] for stage in own])
    microbatches = int(num_microbatches(batch, workload)[0])
    total: dict[tuple[str, str], tuple[int, int]] = {}

    def add(op: str, axis: str, message_bytes: float, calls: float) -> None:
        if calls and message_bytes:
            before = total.get((op, axis), (0, 0))
            total[op, axis] = (before[0] + round(calls), before[1] + round(calls * message_bytes))

    for index in range(len(kinds)):
        for entry in block_traffic(kinds, index, model, workload, batch):
            often = microbatches if entry.phase in PER_MICROBATCH else 1
            calls = float(entry.calls[0]) * often * int(counts[:, index].sum())
            add(entry.op, entry.axis, float(entry.message_bytes[0]), calls)
    shared = [float(shared_grad_bytes(kind, workload, batch)[0]) for kind in kinds.kinds]
    for chunk in counts:
        add("all_reduce", "tp", sum(count * each for count, each in zip(chunk.tolist(), shared, strict=True)), 1)
    neighbours = [other for stage in own for other in (stage - 1, stage + 1) if 0 <= other < config.num_stages]
    sends = sum(other not in own for other in neighbours)  # in a V one rank has two stages that follow each other
    add("send", "pp", float(hop_bytes(model, workload, batch)[0]), sends * microbatches)
    if model.tied and config.pp > 1 and len({0, config.num_stages - 1}.intersection(own)) == 1:
        add("send", "pp", float(tied_bytes(model, workload, batch)[0]), 1)
    add("all_reduce", "dp", COUNT_BYTES, config.dp * config.cp > 1)
    add("all_reduce", "world", LOSS_BYTES, config.world_size > 1)
    return total


def _hidden_bytes(model: ModelSpec, workload: Workload, batch: ConfigBatch) -> FloatArray:
    tokens = batch.micro_batch_size * (workload.seq_len / batch.cp)
    return np.asarray(tokens * model.hidden * workload.recipe.compute.num_bytes, dtype=np.float64)


def _tp(op: str, phase: Phase, calls: Any, message_bytes: FloatArray, batch: ConfigBatch) -> Collective:
    return Collective("tp", op, phase, np.where(batch.tp > 1, calls, 0.0), message_bytes)


def _decoder(
    block: Block, workload: Workload, model: ModelSpec, batch: ConfigBatch, framework: Framework
) -> list[Collective]:
    """A sum (or gather and reduce-scatter) for each cut layer, forward and backward.

    Under sequence parallelism routed experts are exchanged for tokens instead (``expert_traffic``); without, their
    partial results are summed as those of a cut layer. Shared ones are a cut layer.

    Full recompute repeats the forward, where the target stops early up to the last tensor that backward needs: all but
    the last sum; selective recompute may repeat the gathers. A target that saves the sharded input of a matmul
    (``regathers_sequence``) gathers it in backward. With ``float8_gathers`` what is gathered is a byte a number.
    """
    hidden = _hidden_bytes(model, workload, batch)
    gathered = hidden * _gathered_share(workload, framework)
    experts = [layer for layer in block.layers if isinstance(layer, MoeLayer)]
    shared = sum(layer.shared_ffn_size > 0 for layer in experts)
    shards = float(shared + sum(isinstance(layer, AttentionLayer | MlpLayer) for layer in block.layers))
    cut = shards + len(experts)
    sp, full = batch.sequence_parallel, batch.is_recompute(Recompute.FULL)
    again = full | (batch.is_recompute(Recompute.SELECTIVE) & framework.selective.gathers)
    entries = []
    last = float(framework.recompute_stops_early)
    for phase, sums, gathers, scatters in (
        ("forward", cut, shards, shards),
        ("backward", cut, shards * (1.0 + framework.regathers_sequence), shards),
        ("recompute", cut - last, shards, shards - last * (not experts)),
    ):
        every = np.ones(len(batch), dtype=np.bool_)
        on, gathering = (full, again) if phase == "recompute" else (every, every)
        entries += [
            _tp("all_reduce", phase, np.where(on & ~sp, sums, 0.0), hidden, batch),  # type: ignore[arg-type]
            _tp("all_gather", phase, np.where(gathering & sp, gathers, 0.0), gathered, batch),  # type: ignore[arg-type]
            _tp("reduce_scatter", phase, np.where(on & sp, scatters, 0.0), hidden, batch),  # type: ignore[arg-type]
        ]
    for layer in experts:  # gradients of the tokens' weights, of which each rank's slice of the experts gives a part
        entries.append(_tp("all_reduce", "backward", ~sp * 1.0, hidden / layer.hidden * layer.top_k, batch))
    return entries


def _gathered_share(workload: Workload, framework: Framework) -> float:
    """Bytes that are gathered of a decoder block's inputs, over those in the compute dtype.

    torchao casts before it gathers, weights and activations alike, where one scale goes with the whole tensor
    (torchao/float8: fsdp_utils.py, float8_tensor_parallel.py); so does Transformer Engine.
    """
    recipe = workload.recipe
    narrow = framework.float8_gathers and recipe.matmul is not None and not recipe.row_scaled
    return recipe.matmul.num_bytes / recipe.compute.num_bytes if narrow and recipe.matmul else 1.0


def _gathered_weights_share(workload: Workload, framework: Framework) -> float:
    """The same of its weights, but those with a scale for each block are cast again where they arrive.

    (Megatron-Core, ``distributed/param_and_grad_buffer.py``: reuse_grad_buf_for_mxfp8_param_ag.)
    """
    return 1.0 if workload.recipe.block_scaled else _gathered_share(workload, framework)


def _embedding(workload: Workload, model: ModelSpec, batch: ConfigBatch) -> list[Collective]:
    """Rows of the token table summed, onto sequence shards (with sp) where nothing lies between table and blocks."""
    hidden, vocab, sp = _hidden_bytes(model, workload, batch), batch.vocab_parallel, batch.sequence_parallel
    onto_shards = sp & (not model.embedding.num_positions)
    return [
        _tp("all_reduce", "forward", (vocab & ~onto_shards) * 1.0, hidden, batch),
        _tp("reduce_scatter", "forward", (vocab & onto_shards) * 1.0, hidden, batch),
        _tp("all_gather", "backward", sp * 1.0, hidden, batch),
    ]


def _head(workload: Workload, model: ModelSpec, batch: ConfigBatch) -> list[Collective]:
    """Hidden states gathered (with sp), their gradient summed; for the split softmax maxima, then two sums a token."""
    hidden, vocab, sp = _hidden_bytes(model, workload, batch), batch.vocab_parallel, batch.sequence_parallel
    wide = max(workload.recipe.compute.num_bytes, 4)  # the loss works in float32 at least
    tokens = batch.micro_batch_size * (workload.seq_len / batch.cp) * wide
    return [
        _tp("all_gather", "forward", sp * 1.0, hidden, batch),
        _tp("all_reduce", "forward", vocab * 1.0, tokens, batch),
        _tp("all_reduce", "forward", vocab * 1.0, 2.0 * tokens, batch),
        _tp("all_reduce", "backward", (vocab & ~sp) * 1.0, hidden, batch),
        _tp("reduce_scatter", "backward", (vocab & sp) * 1.0, hidden, batch),
    ]


def _data_parallel(
    kinds: BlockKinds, index: int, workload: Workload, batch: ConfigBatch, framework: Framework
) -> list[Collective]:
    """A unit's gathers and reductions, as the table of ``executors/data_parallel.py`` has them.

    Routed experts of a block are a unit of their own, over ``edp``. What else is in a decoder block is a unit;
    embedding and head are one (the embedding's here) where they share a stage. Weights are gathered
    among the ranks that shard them; where these are not all data ranks, gradients are summed over all, at the price of
    an all_reduce: between nodes a reduce-scatter inside a node and sums of the parts across move as much. A target that
    ``broadcasts_weights`` has whole tensors on each rank, which sends its own to the others; all ranks get all
    gradients (InternEvo, ``hybrid_zero_optim.py: broadcast_params``, ``reduce_tensor``).
    """
    outer = kinds.kinds[index].kind is not BlockKind.DECODER
    routed = routed_params(kinds.kinds[index], batch)
    params = rank_params(kinds.kinds[index], batch) - routed
    if index == 0:
        params = params + np.where(batch.num_stages == 1, rank_params(kinds.kinds[-1], batch), 0.0)
    elif outer:
        params = np.where(batch.num_stages == 1, 0.0, params)
    ranks, shards = batch.dp * batch.cp, batch.dp_shard
    entries = _unit("dp", params, ranks, shards, kinds, index, workload, batch, framework, outer=outer)
    if routed.any():
        own = expert_shards(batch)
        entries += _unit("edp", routed, batch.edp, own, kinds, index, workload, batch, framework, outer=outer)
    return entries


def _unit(
    axis: Literal["dp", "edp"],
    params: FloatArray,
    ranks: Any,
    shards: Any,
    kinds: BlockKinds,
    index: int,
    workload: Workload,
    batch: ConfigBatch,
    framework: Framework,
    *,
    outer: bool,
) -> list[Collective]:
    """Gathers and reductions of ``params`` that ``ranks`` hold alike and ``shards`` of them share under ZeRO."""
    on = (ranks > 1) & (params > 0)
    weights, grads = params * workload.recipe.params.num_bytes, params * workload.recipe.grads.num_bytes
    if not outer:
        weights = weights * _gathered_weights_share(workload, framework)
    zero, whole = batch.zero_stage, framework.reduces_once
    once, often = (zero == 1) | (whole & (zero == 2)), (zero >= 2) & ~(whole & (zero == 2))
    late = whole and framework.overlap_dp_reduce == 0.0 and not framework.overlap_dp_scatter
    in_backward = workload.recipe.has_master and not late

    replicated = (zero > 0) & ((shards < ranks) | framework.broadcasts_weights)
    owners = np.ones(len(batch))
    if framework.broadcasts_weights:
        tensors = [num_tensors(kind) for kind in kinds.kinds]
        total = tensors[0] + tensors[-1] + sum(tensors[kind] for kind in kinds.of_layer)
        owners = np.minimum(shards, total / batch.num_stages) * tensors[index] * batch.num_stages / total

    def entry(op: str, phase: Phase, when: Any, message_bytes: FloatArray) -> Collective:
        once, in_shard = np.where(on & when, 1.0, 0.0), op in ("all_gather", "broadcast")
        if op == "broadcast":
            return Collective(axis, op, phase, once * owners, message_bytes / owners, in_shard)
        return Collective(axis, op, phase, once, message_bytes, in_shard)

    return [
        # replicas: FSDP2 reduces as backward goes where it casts master weights, else the executor does afterwards
        entry("all_reduce", "last_backward" if in_backward else "end", zero == 0, grads),
        entry(
            "broadcast" if framework.broadcasts_weights else "all_gather",
            "first_forward",
            (zero == 1) | (zero == 2),
            weights,
        ),
        entry("all_gather", "forward", zero == 3, weights),
        entry("all_gather", "backward", (zero == 3) & (not outer), weights),
        entry("reduce_scatter", "end" if late else "last_backward", once & ~replicated, grads),
        entry("all_reduce", "end" if late else "last_backward", once & replicated, grads),
        entry("reduce_scatter", "backward", often & ~replicated, grads),
        entry("all_reduce", "backward", often & replicated, grads),
    ]
