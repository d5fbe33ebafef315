"""Gradients added to float32 buffers when a backward is over, and what torch's allocator holds on top: nanotron.

Read off nanotron's code as it was when its runs were published (huggingface/nanotron e24d248, February 2025). Beside
weights, float32 gradients and the optimizer's states a rank holds

* while a backward runs, gradients of its weights in the compute dtype, all of them at its end
  (``optim/gradient_accumulator.py: backward``);
* with ZeRO 0 the buckets of torch's DistributedDataParallel, of the size of those gradients, all the time;
* with sequence parallelism two buffers of a whole micro-batch's hidden states, all the time, into which the inputs of
  column matmuls and the gradients of row matmuls are gathered (``parallel/tensor_parallel/functional.py``,
  ``parallel/utils.py: MemoryBuffer``);
* with ZeRO 1, when it gathers weights, all of them twice in flat buffers, beside its own share (``distributed.py:
  all_gather_coalesced``, and the output of ``ProcessGroupNCCL::allgather``).

``HeldBlocks`` says in figures what the allocator holds beyond tensors. An output that is reduce-scattered on another
stream is gone for its owner, but its block is taken until the device is through, and the host launches up to 1,024
kernels ahead. Blocks of gradients, or of flat buffers, are not those that activations need: not without a pipeline and
ZeRO 1, where gradients come into the blocks of activations that are all gone by then.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.estimate import Moment
from meshwright.cost_models.framework import num_microbatches
from meshwright.cost_models.memory_traits import HeldBlocks
from meshwright.cost_models.rank_bytes import KindBytes
from meshwright.cost_models.residency import Numbers
from meshwright.cost_models.step_states import Pipeline

FloatArray = NDArray[np.float64]


def late_moments(
    pipe: Pipeline, first: Moment, held: KindBytes, at_hand: FloatArray, numbers: Numbers, hidden_bytes: FloatArray
) -> list[tuple[Moment, KindBytes]]:
    """What a rank holds when a backward starts, when it ends, and at the update.

    ``first`` is what the start is called, the loss where the rank has the head; ``held`` is what it holds then, of
    which ``at_hand`` are activations of the micro-batch at hand; ``hidden_bytes`` are those of a whole micro-batch's
    residual stream.
    """
    batch, width, nothing = pipe.batch, float(pipe.workload.recipe.params.num_bytes), np.zeros(len(pipe.batch))
    replicas, one = batch.dp * batch.cp > 1, batch.zero_stage == 1
    buckets = np.where((batch.zero_stage == 0) & replicas, numbers.whole * width, 0.0)
    kept = buckets + np.where(batch.sequence_parallel, 2.0 * hidden_bytes, 0.0)
    flat = np.where(one & replicas, (2.0 * numbers.whole + numbers.owned) * width, 0.0)
    return [
        (first, replace(held, communication=held.communication + kept)),
        (
            Moment.BACKWARD,
            replace(
                held,
                activations=held.activations - at_hand,
                working=late_grads(pipe, numbers),
                communication=held.communication + kept,
            ),
        ),
        (Moment.UPDATE, replace(held, activations=nothing, working=nothing, communication=kept + flat)),
    ]


def late_grads(pipe: Pipeline, numbers: Numbers) -> FloatArray:
    """Bytes of a micro-batch's gradients at the end of its backward."""
    return np.asarray(numbers.whole * float(pipe.workload.recipe.params.num_bytes))


def held_bytes(
    blocks: HeldBlocks,
    pipe: Pipeline,
    activations: FloatArray,
    numbers: Numbers,
    hidden_bytes: FloatArray,
    outputs: float,
    flying: FloatArray,
) -> FloatArray:
    """Bytes that the allocator holds on top of a rank's tensors; ``[num_configs]``.

    ``outputs`` is how many a micro-batch's forward reduce-scatters, ``flying`` how many micro-batches are in flight.
    Without a pipeline the host runs on into the next micro-batch; in one from forward to forward of the warm-up, and
    stops for every gradient that it receives.
    """
    batch = pipe.batch
    count = num_microbatches(batch, pipe.workload)
    forwards = np.where(batch.pp > 1, np.maximum(flying - 2.0, 0.0), np.minimum(count, 2))
    pending = np.where(batch.sequence_parallel, np.minimum(blocks.pending_outputs, outputs * forwards), 0.0)
    apart = (batch.pp > 1) | ((batch.zero_stage == 1) & (batch.dp * batch.cp > 1))
    grads = np.where(apart, late_grads(pipe, numbers), 0.0)
    return np.asarray(blocks.activations * activations + grads + pending * hidden_bytes + blocks.base_bytes)
