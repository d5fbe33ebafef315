"""What a target's allocator and runtime add to the tensors of a step: facts and measured constants of a framework."""

from __future__ import annotations

from meshwright.profiler.record import record


@record
class LossTensors:
    """Copies of the logits around the loss: in the compute dtype and in float32, between its passes and beside them."""

    kept: float = 0.0
    kept_float32: float = 0.0
    beside: float = 0.0
    beside_float32: float = 0.0


@record
class UpdateTensors:
    """What an optimizer's step holds beside states and master weights, of the parameters that a rank updates.

    ``temporaries`` are float32 tensors of theirs all at once; gradients in fewer bits are copied to float32 besides.
    ``frees_grads``: below ZeRO 3 they go through one flat tensor in their own dtype, and are gone by then.
    """

    temporaries: float = 0.0
    frees_grads: bool = False


@record
class HeldBlocks:
    """What torch's allocator holds on top of tensors where gradients wait for the end of a backward (``held_blocks``).

    ``activations`` is a share of them, lost between blocks that do not fit each other; ``pending_outputs`` how many
    outputs at most wait for their reduce-scatter; ``base_bytes`` workspaces of libraries and the ends of segments.
    """

    activations: float
    pending_outputs: float
    base_bytes: float


@record
class MemoryTraits:
    """What a target's code keeps, where it is not what eager torch does (``saved``).

    ``fragmentation`` is what the caching allocator holds on top of all tensors at the peak, as a share of them.

    ``margin`` is the share by which measured peaks exceed predicted ones (``margin_fit.derive_margins``) and
    ``margin_source`` the peaks that say so; both are read from ``memory_margins.json``.
    """

    by_operator: bool = False  # eager blocks of Hugging Face, as our executors run them (``moments``)
    fragmentation: float = 0.0
    margin: float = 0.0
    margin_source: str = ""
    gated_tensors: float = 4.0  # of a gated feed-forward's width: gate, up, activated gate, product; fused without one
    expert_rows: float = 2.0  # a token's row for an expert, going in and, to be weighted, coming out
    float8_inputs: bool = False  # projections keep their inputs as cast for the matmul (Transformer Engine)
    masks_always: bool = False  # masks of dropout are kept though nothing is dropped (a fused bias, dropout and sum)
    loss: LossTensors | None = None
    sharded_loss: LossTensors | None = None  # of logits split by vocabulary, where they are worked on otherwise
    update: UpdateTensors | None = None  # where all at once is updated, not tensor by tensor
    reduces_in_place: bool = False  # gradients are reduced inside the buffer that holds them all
    bucket_numbers: float = 0.0  # of two flat buffers that gradients are reduced in; 0: of units
    units: float = 2.0  # decoder blocks' worth of weights gathered, and of gradients reduced, at once
    outer_apart: bool = False  # embedding and head are units of their own
    expert_units: bool = False  # so are a block's experts, cut along a dimension that their shards divide
    offloads: bool = False  # without pipelines, activations of as many layers as it takes are kept on the host
    builds_whole: bool = False  # what tp, pp and ep leave of the weights is made before ZeRO 3 shards it
    held_more: int = 0  # micro-batches in flight beyond those of the schedule
    held_factor: float = 1.0  # of all of them, where a schedule of the target's own starts earlier
    reuses_blocks: bool = True  # what backward frees serves the update; not where that asks for one block of everything
    blocks: HeldBlocks | None = None  # gradients are added to float32 buffers when a backward is over (``held_blocks``)
    communicators_bytes: float = 0.0  # what process groups hold of the device, on top of a context
