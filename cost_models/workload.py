"""What is trained: how long the sequences, how large the batch, in which dtypes, with which optimizer."""

from __future__ import annotations

from enum import StrEnum

from meshwright import InputError
from meshwright.cost_models.routing import Skew
from meshwright.profiler.record import record

MAX_SIZE = 2**31  # of a batch in sequences and of a sequence in tokens: a slip, not a workload


class DType(StrEnum):
    """Number formats, named as torch names them."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT8 = "float8"
    FLOAT4 = "float4"

    @property
    def num_bytes(self) -> float:
        """Bytes of one number; a half in float4. Scales of blocks are left out: 3 to 12 % of these bytes."""
        return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "float4": 0.5}[self.value]


class Optimizer(StrEnum):
    """Optimizers, by the number of states they keep for each parameter."""

    ADAMW = "adamw"
    SGD = "sgd"

    @property
    def num_states(self) -> int:
        """Tensors of a parameter's shape kept between steps (AdamW: both moments; SGD without momentum: none)."""
        return {"adamw": 2, "sgd": 0}[self.value]


class Phase(StrEnum):
    """What the machines do with the model."""

    TRAIN = "train"


@record
class DTypeRecipe:
    """The dtype of every kind of tensor that a training step keeps.

    ``master`` is the separate copy of the weights that the optimizer updates, ``None`` where the weights
    themselves are updated. ``grads`` is the dtype gradients are accumulated and reduced in. ``matmul`` is the dtype of
    the projections inside decoder blocks where it is narrower than ``compute``: their operands are cast on the way in,
    with one scale a tensor or, ``row_scaled``, one for each row or, ``block_scaled``, one for each few numbers of a row
    and, in a second copy, of a column.
    """

    compute: DType = DType.BFLOAT16
    matmul: DType | None = None
    row_scaled: bool = False
    block_scaled: bool = False
    params: DType = DType.BFLOAT16
    grads: DType = DType.FLOAT32
    master: DType | None = DType.FLOAT32
    optimizer: DType = DType.FLOAT32

    @property
    def has_master(self) -> bool:
        """Whether weights are updated in another dtype than they compute in."""
        return self.master is not None and self.master is not self.compute


RECIPES: dict[str, DTypeRecipe] = {
    # bf16 compute; fp32 gradients, master weights and states: 2 + 4 + 4 + 8 = 18 bytes a parameter
    "bf16": DTypeRecipe(),
    # fp16 compute and gradients with loss scaling; fp32 master weights and states (Megatron-LM, DeepSpeed)
    "fp16": DTypeRecipe(compute=DType.FLOAT16, params=DType.FLOAT16, grads=DType.FLOAT16),
    # bf16 with gradients reduced in bf16
    "bf16-grads": DTypeRecipe(grads=DType.BFLOAT16),
    # bf16 with fp8 matmuls inside blocks (Transformer Engine, torchao): weights, gradients and states as bf16
    "fp8": DTypeRecipe(matmul=DType.FLOAT8),
    "fp8-rowwise": DTypeRecipe(matmul=DType.FLOAT8, row_scaled=True),
    # a scale for each block of 32 numbers (the OCP's microscaling format MXFP8, on Blackwell)
    "mxfp8": DTypeRecipe(matmul=DType.FLOAT8, block_scaled=True),
    # the same with float4 matmuls, a scale for each block of 16 numbers (Transformer Engine's NVFP4BlockScaling)
    "nvfp4": DTypeRecipe(matmul=DType.FLOAT4),
    # everything in bf16, states too: 2 + 2 + 4 = 8 bytes a parameter
    "bf16-pure": DTypeRecipe(grads=DType.BFLOAT16, master=None, optimizer=DType.BFLOAT16),
    # everything in fp32: 4 + 4 + 8 = 16 bytes a parameter
    "fp32": DTypeRecipe(
        compute=DType.FLOAT32, params=DType.FLOAT32, grads=DType.FLOAT32, master=None, optimizer=DType.FLOAT32
    ),
    # everything in fp64: 8 + 8 + 16 = 32 bytes a parameter (the equality tests)
    "fp64": DTypeRecipe(
        compute=DType.FLOAT64, params=DType.FLOAT64, grads=DType.FLOAT64, master=None, optimizer=DType.FLOAT64
    ),
}


@record
class Workload:
    """One optimizer step: ``global_batch_size`` sequences of ``seq_len`` tokens.

    ``routing`` is how unevenly its tokens fall on experts (``routing.skew_of`` a measured load), ``None`` for evenly.
    Raises ``InputError`` when a size is below 1 or above ``MAX_SIZE``.
    """

    seq_len: int
    global_batch_size: int
    recipe: DTypeRecipe = DTypeRecipe()
    optimizer: Optimizer = Optimizer.ADAMW
    phase: Phase = Phase.TRAIN
    routing: Skew | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "global_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
            if getattr(self, name) > MAX_SIZE:
                raise InputError(f"{name} must be at most {MAX_SIZE}, found {getattr(self, name)}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step."""
        return self.seq_len * self.global_batch_size


def recipe_named(name: str) -> DTypeRecipe:
    """The dtype recipe of that name. Raises ``InputError`` naming the known ones."""
    try:
        return RECIPES[name]
    except KeyError:
        raise InputError(f"unknown dtype recipe {name!r}: expected one of {', '.join(RECIPES)}") from None


def optimizer_named(name: str) -> Optimizer:
    """The optimizer of that name. Raises ``InputError`` naming the known ones."""
    try:
        return Optimizer(name)
    except ValueError:
        raise InputError(f"unknown optimizer {name!r}: expected one of {', '.join(Optimizer)}") from None
