"""What one block costs on one rank: its compute and its share of every collective, with what overlaps taken off."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models import context, expert_exchange
from meshwright.cost_models.blocks import BlockKinds, num_tensors, rank_params, routed_params
from meshwright.cost_models.collectives import Groups
from meshwright.cost_models.compute import BlockSeconds, block_seconds
from meshwright.cost_models.framework import Framework, num_microbatches, reduce_overlap
from meshwright.cost_models.host import host_wait, launches_ahead, slowest
from meshwright.cost_models.placement import Placement
from meshwright.cost_models.priced import groups_by_axis, price_all
from meshwright.cost_models.residency import expert_shards
from meshwright.cost_models.strategy import ConfigBatch
from meshwright.cost_models.traffic import block_traffic
from meshwright.cost_models.workload import Optimizer, Workload
from meshwright.profiler.cluster import ClusterProfile, Device
from meshwright.profiler.model import Block, BlockKind, ModelSpec
from meshwright.profiler.units import MIB

FloatArray = NDArray[np.float64]

_BUCKET_BYTES = 25 * MIB  # torch/nn/parallel/distributed.py: bucket_cap_mb


@dataclass(frozen=True, slots=True)
class BlockParts:
    """Seconds of one block on one rank, arrays of shape ``[num_configs]``.

    For each micro-batch: ``compute_*`` kernels (``compute_weights`` is the part of ``compute_backward`` that a schedule
    may put off, gradients of weights), ``recompute``, ``host_*`` launches not hidden, ``tp_*``, ``cp_*``, ``ep_*`` and
    ``dp_*`` exposed communication, ``hidden`` communication behind compute. Once a step: ``dp_end`` after the last
    backward; ``dp_first`` and ``dp_last`` beside the first forward and last backward, overlap not taken off yet, and
    ``dp_*_inside`` what the same bytes would take inside a node.
    ``optimizer`` and its ``optimizer_host`` are the update of the block's parameters on this rank.
    """

    compute_forward: FloatArray
    compute_backward: FloatArray
    compute_weights: FloatArray
    recompute: FloatArray
    host_forward: FloatArray
    host_backward: FloatArray
    tp_forward: FloatArray
    tp_backward: FloatArray
    cp_forward: FloatArray
    cp_backward: FloatArray
    ep_forward: FloatArray
    ep_backward: FloatArray
    dp_forward: FloatArray
    dp_backward: FloatArray
    hidden: FloatArray
    dp_first: FloatArray
    dp_last: FloatArray
    dp_first_inside: FloatArray
    dp_last_inside: FloatArray
    dp_end: FloatArray
    optimizer: FloatArray
    optimizer_host: FloatArray

    def take(self, rows: NDArray[np.int64]) -> BlockParts:
        """The configs at these positions."""
        return BlockParts(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def block_parts(
    kinds: BlockKinds,
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
    placement: Placement,
) -> list[BlockParts]:
    """The parts of every kind of block, in the order of ``kinds``."""
    groups = groups_by_axis(model, cluster, batch, placement)
    return [
        _parts(kinds, index, model, workload, cluster, framework, batch, groups) for index in range(len(kinds.kinds))
    ]


def _parts(
    kinds: BlockKinds,
    index: int,
    model: ModelSpec,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
    groups: dict[str, Groups],
) -> BlockParts:
    device = cluster.device
    kernels = _of_the_slowest(block_seconds(kinds.kinds[index], workload, device, framework, batch), device, batch)
    zero = np.zeros(len(batch))
    block, traffic = kinds.kinds[index], block_traffic(kinds, index, model, workload, batch, framework)
    priced = price_all(traffic, block, workload, cluster, groups, framework, batch)
    spent, inside, copied, calls = priced.spent, priced.inside, priced.copied, priced.calls
    on_streams = launches_ahead(device)  # a CPU runs collectives and compute one after the other
    gather, reduce = framework.overlap_dp_gather * on_streams, reduce_overlap(framework, batch) * on_streams
    backward = kernels.backward_input + kernels.backward_weight
    ep_forward, ep_backward, hidden_ep = _exchanged(spent, kernels, cluster, framework, batch)
    # rows exchanged inside a node leave the network to weights and gradients
    inner = groups["ep"].inside[0] >= groups["ep"].size if "ep" in groups and cluster.tiers else False
    behind, near = kernels.forward + np.where(inner, ep_forward, 0.0), inside.get(("dp", "forward"), zero)
    dp_forward, hidden_forward = hide(spent.get(("dp", "forward"), zero), gather, behind, cluster, near)
    both, near = spent.get(("dp", "backward"), zero), inside.get(("dp", "backward"), zero)
    behind = backward + kernels.recompute + np.where(inner, ep_backward, 0.0)
    dp_backward, hidden_backward = hide(both, np.minimum(gather, reduce), behind, cluster, near)
    dp_forward = dp_forward + copied.get(("dp", "forward"), zero)
    dp_backward = dp_backward + copied.get(("dp", "backward"), zero)
    tp_forward, tp_backward, hidden_tp = _summed(spent, kernels, cluster, framework, batch)
    cp_forward, cp_backward, hidden_cp = _context(spent, inside, kernels, workload, cluster, framework, batch)
    each_rank_s = framework.host.checked_collective_s + (batch.pp > 1) * framework.host.pipelined_collective_s
    call_s = framework.host.collective_s + batch.tp * each_rank_s
    back_calls = calls.get("backward", zero) + calls.get("recompute", zero)
    host_forward = _launches(
        device,
        framework,
        kernels.forward + tp_forward + cp_forward + ep_forward + dp_forward,
        kernels.forward_host + calls.get("forward", zero) * call_s,
        kernels.experts_forward + ep_forward,
        kernels.experts_forward_host,
    )
    host_backward = _launches(
        device,
        framework,
        backward + kernels.recompute + tp_backward + cp_backward + ep_backward + dp_backward,
        kernels.backward_host + kernels.recompute_host + back_calls * call_s,
        kernels.experts_backward + ep_backward,
        kernels.experts_backward_host,
    )
    accumulate, accumulate_host = _accumulation(kinds, index, workload, cluster, framework, batch)
    optimizer, optimizer_host = _optimizer(kinds, index, workload, cluster, framework, batch)
    # our executors leave gradients of routed experts to the first part of a split backward
    put_off = kernels.backward_weight - framework.defers_products * kernels.experts_weight
    return BlockParts(
        compute_forward=kernels.forward,
        compute_backward=backward + accumulate,
        compute_weights=(put_off + accumulate) * _puts_off(kinds, index, framework),
        recompute=kernels.recompute,
        host_forward=host_forward,
        host_backward=host_backward + accumulate_host,
        tp_forward=tp_forward,
        tp_backward=tp_backward,
        cp_forward=cp_forward,
        cp_backward=cp_backward,
        ep_forward=ep_forward,
        ep_backward=ep_backward,
        dp_forward=dp_forward,
        dp_backward=dp_backward,
        hidden=hidden_forward + hidden_backward + hidden_tp + hidden_ep + hidden_cp,
        dp_first=spent.get(("dp", "first_forward"), zero),
        dp_last=spent.get(("dp", "last_backward"), zero),
        dp_first_inside=inside.get(("dp", "first_forward"), zero),
        dp_last_inside=inside.get(("dp", "last_backward"), zero),
        dp_end=spent.get(("dp", "end"), zero)
        + copied.get(("dp", "end"), zero)
        + _checks(kinds, index, workload, framework, batch),
        optimizer=optimizer,
        optimizer_host=optimizer_host,
    )


def _of_the_slowest(kernels: BlockSeconds, device: Device, batch: ConfigBatch) -> BlockSeconds:
    """Kernels as the slowest of all devices runs them; what the host spends on launches is as before."""
    if not device.variation:
        return kernels
    slower = slowest(device, batch)
    names = [field.name for field in fields(kernels) if not field.name.endswith("_host")]
    return replace(kernels, **{name: getattr(kernels, name) * slower for name in names})


def _summed(
    spent: dict[tuple[str, str], FloatArray],
    kernels: BlockSeconds,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds of tensor parallelism exposed in forward and backward, and those hidden.

    A target may hide more of backward's exchange than of forward's, behind gradients of weights.
    """
    zero, on_streams = np.zeros(len(batch)), launches_ahead(cluster.device)
    share, more = framework.overlap_tp * on_streams, framework.overlap_tp_backward * on_streams
    backward = kernels.backward_input + kernels.backward_weight
    behind = backward if more <= share else kernels.backward_weight
    first, hidden = hide(spent.get(("tp", "forward"), zero), share, kernels.forward, cluster)
    second, hidden_second = hide(spent.get(("tp", "backward"), zero), max(share, more), behind, cluster)
    again, hidden_again = hide(spent.get(("tp", "recompute"), zero), share, kernels.recompute, cluster)
    return first, second + again, hidden + hidden_second + hidden_again


def _launches(
    device: Device,
    framework: Framework,
    on_device: FloatArray,
    on_host: FloatArray,
    experts_on_device: FloatArray,
    experts_on_host: FloatArray,
) -> FloatArray:
    """Seconds that launches add to a block. A host that waits for the counts of rows starts anew behind them."""
    if not framework.experts.reads_counts or not experts_on_host.any():
        return host_wait(device, framework, on_device, on_host)
    before = host_wait(device, framework, on_device - experts_on_device, np.maximum(on_host - experts_on_host, 0.0))
    return before + host_wait(device, framework, experts_on_device, experts_on_host)


def _exchanged(
    spent: dict[tuple[str, str], FloatArray],
    kernels: BlockSeconds,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Exposed seconds of the exchange with experts, forward and backward, and what of it is hidden.

    First behind the experts themselves, in chunks; then what is left behind all of another micro-batch's block, where
    the target runs two side by side.
    """
    taken = framework.experts.multiprocessors / max(cluster.device.num_multiprocessors or 0, 1)
    slower = min(taken, 1.0) if taken else None
    exposed, hidden = [], np.zeros(len(batch))
    share, backward = framework.experts.overlap, kernels.backward_input + kernels.backward_weight
    for phase, experts, all_kernels in (
        ("forward", kernels.experts_forward, kernels.forward),
        ("backward", kernels.experts_backward, backward),
        ("recompute", kernels.experts_forward, kernels.recompute),
    ):
        exchange = spent.get(("ep", phase), np.zeros(len(batch)))
        if launches_ahead(cluster.device):
            alone = expert_exchange.exposed(exchange, experts, batch.ep_chunks.astype(np.float64))
            chunked, beside = hide(exchange, 1.0, exchange - alone, cluster, slower=slower)
            visible, behind = hide(chunked, share, all_kernels, cluster, slower=slower)
            exchange, hidden = visible, hidden + beside + behind
        exposed.append(exchange)
    return exposed[0], exposed[1] + exposed[2], hidden


def _context(
    spent: dict[tuple[str, str], FloatArray],
    inside: dict[tuple[str, str], FloatArray],
    kernels: BlockSeconds,
    workload: Workload,
    cluster: ClusterProfile,
    framework: Framework,
    batch: ConfigBatch,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Exposed seconds of context parallelism, forward and backward, and what of a ring is hidden.

    A message of a ring travels beside the kernels of a step, and the last step has none; Ulysses' exchange and gathered
    keys are waited for.
    """
    exposed, hidden, zero = [], np.zeros(len(batch)), np.zeros(len(batch))
    share = 0.0 if framework.context.gathers else framework.context.overlap * launches_ahead(cluster.device)
    for phase, kernel in (
        ("forward", kernels.attention_forward),
        ("backward", kernels.attention_backward),
        ("recompute", kernels.attention_forward),
    ):
        near, behind = inside.get(("cp_ring", phase), zero), context.beside(kernel, batch)
        possible = share * context.hideable(workload, batch, framework) if phase == "backward" else share
        visible, beside = hide(spent.get(("cp_ring", phase), zero), possible, behind, cluster, near)
        exposed.append(visible + spent.get(("cp_ulysses", phase), zero))
        hidden = hidden + beside
    return exposed[0], exposed[1] + exposed[2], hidden


def _checks(kinds: BlockKinds, index: int, workload: Workload, framework: Framework, batch: ConfigBatch) -> FloatArray:
    """Seconds a step in which data-parallel collectives wait for all their ranks to arrive (``checked_collective_s``).

    With ZeRO 0 one for each bucket of torch's DistributedDataParallel, which takes gradients until they are 25 MiB: at
    most three of a block, attention, gate and up, down. With ZeRO 1 one to sum gradients and one to gather weights.
    """
    if not framework.host.checked_collective_s:
        return np.zeros(len(batch))
    grads = rank_params(kinds.kinds[index], batch) * workload.recipe.params.num_bytes
    most = 3.0 if kinds.kinds[index].kind is BlockKind.DECODER else 1.0
    calls = np.where(batch.zero_stage == 0, np.minimum(grads / _BUCKET_BYTES, most), 2.0 * (index == 0))
    ranks = np.where(batch.dp * batch.cp > 1, batch.dp * batch.cp, 0)
    return np.asarray(framework.host.checked_collective_s * ranks * calls)


def hide(
    communication: FloatArray,
    share: FloatArray | float,
    behind: FloatArray,
    cluster: ClusterProfile,
    inside: FloatArray | None = None,
    slower: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """``(exposed, hidden)`` seconds: ``share`` of the communication hides behind compute, at most as long as that is.

    Compute runs slower beside a collective (``Device.communication_slowdown``); what that costs counts as exposed. A
    collective that waits for a slow network takes no more of the device's memory and multiprocessors than its bytes
    do: ``inside``, at most ``communication``, is the time they would take inside a node, which is what the slowdown
    is counted on. ``slower`` is the share by which compute slows, where it is not the device's.
    """
    hidden = np.minimum(share * communication, behind)
    busy = hidden if inside is None else hidden * inside / np.maximum(communication, 1e-30)
    slowdown = cluster.device.communication_slowdown if slower is None else slower
    return communication - hidden + busy * min(slowdown, 1.0), hidden


def _puts_off(kinds: BlockKinds, index: int, framework: Framework) -> bool:
    """Whether a split backward puts off gradients of this block's weights: not of tables and head in our executors."""
    return kinds.kinds[index].kind is BlockKind.DECODER or not framework.defers_products


def _accumulation(
    kinds: BlockKinds, index: int, workload: Workload, cluster: ClusterProfile, framework: Framework, batch: ConfigBatch
) -> tuple[FloatArray, FloatArray]:
    """Adding a micro-batch's gradients to the earlier ones': all but the first, spread over all."""
    block, cost = kinds.kinds[index], framework.pointwise.accumulate
    count = num_microbatches(batch, workload)
    adds = (count - 1) / np.maximum(count, 1)
    held = _own_params(block, batch, batch.zero_stage >= 2 + framework.reduces_once)
    num_bytes = held * workload.recipe.grads.num_bytes * cost.backward_passes
    host = 0.0 if launches_ahead(cluster.device) else cluster.device.launch_s * cost.backward_kernels
    return (
        adds * num_bytes * cluster.device.memory_factor / cluster.device.memory_bytes_per_s,
        adds * host * num_tensors(block),
    )


def _optimizer(
    kinds: BlockKinds, index: int, workload: Workload, cluster: ClusterProfile, framework: Framework, batch: ConfigBatch
) -> tuple[FloatArray, FloatArray]:
    """The update of this rank's own parameters: memory-bound; a CPU calls every kernel for every tensor."""
    block, recipe = kinds.kinds[index], workload.recipe
    cost = framework.pointwise.adamw if workload.optimizer is Optimizer.ADAMW else framework.pointwise.sgd
    owned = _own_params(block, batch, batch.zero_stage > 0)
    width = recipe.optimizer.num_bytes * cost.forward_passes
    if recipe.master is not None:
        width += recipe.master.num_bytes + recipe.params.num_bytes  # the weights are written out of the master copy
    host = 0.0 if launches_ahead(cluster.device) else cluster.device.launch_s * cost.forward_kernels
    return owned * width * cluster.device.memory_factor / cluster.device.memory_bytes_per_s, np.full(
        len(batch), host * num_tensors(block)
    )


def _own_params(block: Block, batch: ConfigBatch, sharded: NDArray[np.bool_]) -> FloatArray:
    """Parameters of a block on one rank, its shard of them where they are ``sharded``."""
    routed = routed_params(block, batch)
    dense = (rank_params(block, batch) - routed) / np.where(sharded, batch.dp_shard, 1)
    return np.asarray(dense + routed / np.where(sharded, expert_shards(batch), 1))
