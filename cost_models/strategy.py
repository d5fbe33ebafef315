"""How a model is split: ``ParallelConfig`` for one way, ``ConfigBatch`` for many at once as arrays, and what is legal.

Axes, as the field names them: ``tp`` tensor, ``cp`` context (``cp_ring * cp_ulysses``), ``pp`` pipeline, ``dp`` data,
``ep`` expert, ``etp`` tensor inside experts. Attention and experts are mapped separately over the same ranks (parallel
folding): ``world_size = tp * cp * pp * dp`` and ``edp = dp * cp * tp / (ep * etp)``.

Canonical form: a degree or flag without effect has one value, so that each plan that can run is counted once.
Without a pipeline ``schedule`` is 1f1b; ``zero_stage`` above 0 needs ``dp * cp`` above 1, and ``dp_shard`` is 1 exactly
where ``zero_stage`` is 0 (a shard group of one shards nothing); ``ep_chunks`` above 1 needs ``ep`` above 1.

Of ``cp = cp_ring * cp_ulysses`` ranks the Ulysses groups are neighbours: rank ``c`` along cp is ``ring * cp_ulysses +
ulysses``. Over the ranks of a pipeline stage in the order ``[dp, cp, tp]`` experts are laid out as ``[edp, ep, etp]``,
the last changing fastest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from meshwright import InputError
from meshwright.profiler.layers import MoeLayer
from meshwright.profiler.record import record

if TYPE_CHECKING:
    from meshwright.cost_models.workload import Workload
    from meshwright.profiler.model import ModelSpec

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class Schedule(StrEnum):
    """The order in which a pipeline's stages run forward and backward of their micro-batches."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb-h1"
    ZBV = "zbv"
    DUALPIPEV = "dualpipev"


class Recompute(StrEnum):
    """What is thrown away in the forward pass and computed again for the backward pass.

    What ``selective`` keeps is a target's own choice: see ``cost_models.framework``.
    """

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class Partition(StrEnum):
    """How a target cuts layers into stages when it is not told."""

    EVEN = "even"  # equal numbers of layers
    LATER = "later"  # the same, and where they do not divide the last stages have one more
    BY_COST = "by cost"  # equal matmul weights, the head counted among them


SCHEDULES: tuple[Schedule, ...] = tuple(Schedule)
RECOMPUTES: tuple[Recompute, ...] = tuple(Recompute)

LOOPED = (Schedule.INTERLEAVED,)
V_SHAPED = (Schedule.ZBV, Schedule.DUALPIPEV)
SPLIT_BACKWARD = (Schedule.ZB_H1, *V_SHAPED)  # gradients of inputs first, of weights later


class Reason(StrEnum):
    """Why a config is rejected. Each rejected config is counted under the first reason that applies, in this order."""

    FIXED = "FIXED"  # the user asked for another value
    NOT_IN_FRAMEWORK = "NOT_IN_FRAMEWORK"  # the target does not execute it
    HEADS = "HEADS"  # tp * cp_ulysses does not divide the attention heads
    KV_HEADS = "KV_HEADS"  # neither tp divides the kv heads nor the reverse
    FFN = "FFN"  # tp does not divide the feed-forward width
    EXPERTS = "EXPERTS"  # ep, etp, ep * etp, ep_chunks or groups with a capacity do not divide what they must
    SEQUENCE = "SEQUENCE"  # the sequence does not divide as cp or sequence_parallel need
    LAYERS = "LAYERS"  # fewer layers than pipeline chunks
    SCHEDULE = "SCHEDULE"  # the schedule does not run with these chunks or this number of micro-batches
    BATCH = "BATCH"  # dp * micro_batch_size does not divide the global batch
    OUT_OF_MEMORY = "OUT_OF_MEMORY"  # predicted peak above what a device offers
    MEMORY_MARGIN = "MEMORY_MARGIN"  # predicted peak fits, but not with the margin of what predictions miss


REASONS: tuple[Reason, ...] = tuple(Reason)


@record
class ParallelConfig:
    """One way of splitting; every degree defaults to 1, every switch to off.

    Raises ``InputError`` when a degree is below 1 or the fields contradict each other (``cp != cp_ring * cp_ulysses``,
    ``ep * etp`` not dividing ``dp * cp * tp``, a ``dp_shard`` that does not divide ``dp * cp``).
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1  # chunks of the model on each pipeline rank
    cp_ring: int = 1
    cp_ulysses: int = 1
    ep_chunks: int = 1  # parts in which tokens are sent to their experts, one beside the work on another
    dp_shard: int = 1  # ranks over which ZeRO shards dense weights; divides dp * cp
    micro_batch_size: int = 1
    zero_stage: int = 0  # resident: 1 whole weights and gradients, 2 sharded gradients, 3 sharded weights too
    sequence_parallel: bool = False
    vocab_parallel: bool = False  # embedding and head split over tp by vocabulary
    schedule: Schedule = Schedule.ONE_F_ONE_B
    recompute: Recompute = Recompute.NONE

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "zero_stage" and type(value) is int and value < 1:
                raise InputError(f"{field.name} must be at least 1, found {value}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise InputError(f"zero_stage must be 0, 1, 2 or 3, found {self.zero_stage}")
        if self.cp_ring * self.cp_ulysses != self.cp:
            raise InputError(f"cp_ring={self.cp_ring} times cp_ulysses={self.cp_ulysses} must be cp={self.cp}")
        if (self.dp * self.cp) % self.dp_shard:
            raise InputError(f"dp_shard={self.dp_shard} must divide dp*cp={self.dp * self.cp}")
        if (self.dp * self.cp * self.tp) % (self.ep * self.etp):
            raise InputError(f"ep*etp={self.ep * self.etp} must divide dp*cp*tp={self.dp * self.cp * self.tp}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def num_stages(self) -> int:
        """Pieces the model is cut into: pipeline ranks times chunks on each."""
        return self.pp * self.vpp

    def num_microbatches(self, global_batch_size: int) -> int:
        """Micro-batches that each data rank runs in a step. Raises ``InputError`` when the batch does not divide."""
        share = self.dp * self.micro_batch_size
        if global_batch_size % share:
            raise InputError(
                f"dp={self.dp} times micro_batch_size={self.micro_batch_size} is {share}, "
                f"which does not divide global_batch_size={global_batch_size}"
            )
        return global_batch_size // share

    def describe(self) -> str:
        """One line for people: what is above its default, in a fixed order: ``tp8 pp4 dp2 1f1b zero1 mbs2 sp``."""
        parts = [
            f"{name}{getattr(self, name)}" for name in ("tp", "cp", "pp", "dp", "ep", "etp") if getattr(self, name) > 1
        ]
        if self.cp_ulysses > 1:
            parts.append(f"ring{self.cp_ring}xulysses{self.cp_ulysses}")
        if self.ep_chunks > 1:
            parts.append(f"chunks{self.ep_chunks}")
        if self.pp > 1:
            parts.append(self.schedule.value + (f"x{self.vpp}" if self.vpp > 1 else ""))
        if self.zero_stage:
            shard = f"/{self.dp_shard}" if self.dp_shard != self.dp * self.cp else ""
            parts.append(f"zero{self.zero_stage}{shard}")
        parts.append(f"mbs{self.micro_batch_size}")
        parts += ["sp"] if self.sequence_parallel else []
        parts += ["vocab"] if self.vocab_parallel else []
        parts += [f"recompute-{self.recompute.value}"] if self.recompute is not Recompute.NONE else []
        return " ".join(parts)


def even_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Decoder layers in each stage of the default partition; they sum to ``num_layers``.

    The layers left over by the division go to the stages after the first, one each, and to the last of all only when
    every other has one, since the first also holds the embedding and the last the head.
    Raises ``InputError`` with fewer layers than stages.
    """
    if num_layers < num_stages:
        raise InputError(f"{num_layers} layers cannot fill {num_stages} pipeline stages")
    base, left = divmod(num_layers, num_stages)
    order = [*range(1, num_stages - 1), 0, num_stages - 1] if num_stages > 1 else [0]
    extra = set(order[:left])
    return tuple(base + (stage in extra) for stage in range(num_stages))


_CODES: dict[str, tuple[Any, ...]] = {"schedule": SCHEDULES, "recompute": RECOMPUTES}
FIELDS: tuple[str, ...] = tuple(field.name for field in fields(ParallelConfig))


@dataclass(frozen=True, slots=True)
class ConfigBatch:
    """Many configs as a struct of arrays: one array of shape ``[num_configs]`` for each field of ``ParallelConfig``.

    ``schedule`` and ``recompute`` hold positions in ``SCHEDULES`` and ``RECOMPUTES``, switches hold booleans.
    """

    tp: IntArray
    cp: IntArray
    pp: IntArray
    dp: IntArray
    ep: IntArray
    etp: IntArray
    vpp: IntArray
    cp_ring: IntArray
    cp_ulysses: IntArray
    ep_chunks: IntArray
    dp_shard: IntArray
    micro_batch_size: IntArray
    zero_stage: IntArray
    sequence_parallel: BoolArray
    vocab_parallel: BoolArray
    schedule: IntArray
    recompute: IntArray

    def __len__(self) -> int:
        return len(self.tp)

    @classmethod
    def from_configs(cls, configs: Iterable[ParallelConfig]) -> ConfigBatch:
        """Stack configs; the order is kept."""
        configs = list(configs)
        columns: dict[str, list[Any]] = {name: [getattr(config, name) for config in configs] for name in FIELDS}
        for name, words in _CODES.items():
            columns[name] = [words.index(word) for word in columns[name]]
        return cls.from_columns(columns, len(configs))

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any], num_configs: int) -> ConfigBatch:
        """Build from columns (arrays, sequences or single values, broadcast); fields not given take their defaults."""
        defaults = ParallelConfig()
        arrays: dict[str, Any] = {}
        for name in FIELDS:
            default = getattr(defaults, name)
            value = columns.get(name, _CODES[name].index(default) if name in _CODES else default)
            dtype = np.bool_ if isinstance(default, bool) else np.int64
            arrays[name] = np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype=dtype), (num_configs,)))
        return cls(**arrays)

    def config(self, index: int) -> ParallelConfig:
        """The config at one position, as a record."""
        values: dict[str, Any] = {}
        for name in FIELDS:
            value = getattr(self, name)[index].item()
            values[name] = _CODES[name][value] if name in _CODES else value
        return ParallelConfig(**values)

    def take(self, selection: NDArray[Any]) -> ConfigBatch:
        """The configs at an index array or under a boolean mask."""
        return ConfigBatch(**{name: getattr(self, name)[selection] for name in FIELDS})

    def configs(self) -> Iterator[ParallelConfig]:
        """Every config as a record, in order."""
        return (self.config(index) for index in range(len(self)))

    def distinct(self, *names: str) -> tuple[ConfigBatch, IntArray]:
        """One config for each different combination of the fields ``names``, and where each config finds its own.

        A cost that depends on few fields is worked out once for each combination and spread with the second array.
        """
        key, num_keys = np.zeros(len(self), dtype=np.int64), 1
        for name in names:
            column = getattr(self, name).astype(np.int64)
            span = int(column.max(initial=0)) + 1
            if num_keys * span >= 2**62:  # number the combinations anew before they overflow
                _, key = np.unique(key, return_inverse=True)
                num_keys = len(self)
            key, num_keys = key * span + column, num_keys * span
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        return self.take(first), inverse

    @staticmethod
    def concatenate(batches: Iterable[ConfigBatch]) -> ConfigBatch:
        """One batch after another."""
        batches = list(batches)
        return ConfigBatch(**{name: np.concatenate([getattr(batch, name) for batch in batches]) for name in FIELDS})

    @property
    def num_stages(self) -> IntArray:
        """``pp * vpp`` of each config."""
        return self.pp * self.vpp

    @property
    def edp(self) -> IntArray:
        """Ranks that hold the same experts, of each config."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    def is_schedule(self, *schedules: Schedule) -> BoolArray:
        """Mask of the configs that run one of ``schedules``."""
        return np.isin(self.schedule, [SCHEDULES.index(schedule) for schedule in schedules])

    def is_recompute(self, recompute: Recompute) -> BoolArray:
        """Mask of the configs with that recompute choice."""
        return np.asarray(self.recompute == RECOMPUTES.index(recompute))


def legal(batch: ConfigBatch, model: ModelSpec, workload: Workload) -> NDArray[np.int8]:
    """Position in ``REASONS`` of the first rule each config breaks, or -1 for a legal config; shape ``[num_configs]``.

    The rules are those of any target; a target's own come from ``framework.supported``. A batch assembled by
    ``planner.space`` is canonical already, so only rules about model and workload are looked at here. That
    ``ep_chunks`` divides a rank's tokens is looked at last of all, and is of EXPERTS.
    """
    ffn, heads_ranks = model.ffn_size, batch.tp * batch.cp_ulysses
    heads = math.gcd(*(count for count, _ in model.head_counts))
    copied = [(kv_heads % batch.tp != 0) & (batch.tp % kv_heads != 0) for _, kv_heads in model.head_counts]
    chunks = batch.num_stages
    microbatch_share = batch.dp * batch.micro_batch_size
    seq_shard = workload.seq_len // batch.cp
    ring_indivisible = (batch.cp_ring > 1) & model.attention.causal & (workload.seq_len % (2 * batch.cp) != 0)
    sp_indivisible = batch.sequence_parallel & ((batch.tp == 1) | (seq_shard % batch.tp != 0))
    rules: list[tuple[Reason, BoolArray]] = [
        (Reason.HEADS, heads % heads_ranks != 0),
        (Reason.KV_HEADS, np.logical_or.reduce(copied)),
        (Reason.FFN, np.asarray(ffn % batch.tp != 0) if ffn else np.zeros(len(batch), dtype=np.bool_)),
        (Reason.EXPERTS, _experts_indivisible(batch, model, workload)),
        (Reason.SEQUENCE, ring_indivisible | (workload.seq_len % batch.cp != 0) | sp_indivisible),
        (Reason.LAYERS, model.num_layers < chunks),
        (Reason.SCHEDULE, ~_chunks_match_schedule(batch)),
        (Reason.BATCH, workload.global_batch_size % microbatch_share != 0),
        (Reason.EXPERTS, rank_tokens(batch, workload) % batch.ep_chunks != 0),
    ]
    verdict = np.full(len(batch), -1, dtype=np.int8)
    for reason, broken in reversed(rules):
        verdict[broken] = REASONS.index(reason)
    return verdict


def rank_tokens(batch: ConfigBatch, workload: Workload) -> IntArray:
    """Tokens of one micro-batch that a rank sends to experts: its part of the sequence, cut over tp where sp is on."""
    parts = batch.cp * np.where(batch.sequence_parallel, batch.tp, 1)
    return np.asarray(batch.micro_batch_size * workload.seq_len // parts, dtype=np.int64)


def sequence_piece(batch: ConfigBatch, workload: Workload, causal: bool) -> IntArray:
    """Neighbouring tokens of one sequence that a rank holds at least: of a causal ring's halves, one.

    Groups of tokens that share a capacity (``MoeLayer.group_tokens``) lie inside such pieces.
    """
    halves = np.where((batch.cp_ring > 1) & causal, 2, 1)
    return np.asarray(workload.seq_len // (batch.cp * halves), dtype=np.int64)


def _experts_indivisible(batch: ConfigBatch, model: ModelSpec, workload: Workload) -> BoolArray:
    """Whether experts don't divide: their number, their width, the ranks they share, their groups of tokens.

    Without ``sequence_parallel`` all tp ranks hold the same tokens, so that experts are cut by tp as the rest is.
    """
    layers = [layer for layer in model.layers() if isinstance(layer, MoeLayer)]
    if not layers:
        return np.asarray((batch.ep > 1) | (batch.etp > 1))
    number = math.gcd(*(layer.num_experts for layer in layers))
    width = math.gcd(*(layer.expert_ffn_size for layer in layers))
    broken = (number % batch.ep != 0) | (width % batch.etp != 0)
    broken |= (batch.dp * batch.cp * batch.tp) % (batch.ep * batch.etp) != 0
    broken |= (batch.tp > 1) & (batch.etp != batch.tp) & ~batch.sequence_parallel
    groups = {layer.group_tokens for layer in layers if layer.group_tokens}
    if groups:
        piece = sequence_piece(batch, workload, model.attention.causal)
        own = workload.seq_len // (batch.cp * np.where(batch.sequence_parallel, batch.tp, 1))
        for group in groups:
            broken |= (piece % group != 0) | (own % group != 0)
    return np.asarray(broken)


def _chunks_match_schedule(batch: ConfigBatch) -> BoolArray:
    looped, v_shaped = batch.is_schedule(*LOOPED), batch.is_schedule(*V_SHAPED)
    piped = np.where(looped, batch.vpp >= 2, np.where(v_shaped, batch.vpp == 2, batch.vpp == 1))
    unpiped = (batch.vpp == 1) & batch.is_schedule(Schedule.ONE_F_ONE_B)
    return np.asarray(np.where(batch.pp > 1, piped, unpiped), dtype=np.bool_)
