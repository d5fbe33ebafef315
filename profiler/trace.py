"""A torch model -> ``ModelSpec``: from its Hugging Face config where there is one, else from one watched forward pass.

The pass runs on fake tensors: nothing is computed and no weight is read, whatever the model's size. What it shows:
heads, head sizes and grouped keys (where attention mixes positions, by ``scaled_dot_product_attention`` or written
out), gated or plain feed-forward, biases, norms and their order. What it cannot show, and what is then assumed: a
sliding window (none), a mask given as a tensor (causal), rotary positions (yes, unless positions are learned).
Stacked experts are not run, since what an expert gets depends on values: see ``trace_experts``. Experts that are built
otherwise, and latent attention, are read from a config only.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright import InputError
from meshwright.profiler.anatomy import Anatomy, find_anatomy
from meshwright.profiler.hf_config import BUILDERS, assemble
from meshwright.profiler.hf_parts import Parts
from meshwright.profiler.layers import AttentionLayer, EmbeddingLayer, HeadLayer, LayerSpec
from meshwright.profiler.model import ModelSpec, load_model
from meshwright.profiler.skeleton import stand_in
from meshwright.profiler.trace_blocks import BlockReader, own_parameters, read_norm
from meshwright.profiler.trace_experts import Stack, find_stacks, whole_groups
from meshwright.profiler.trace_record import Recorder, Recording

TRIAL_LENGTHS = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59)


def trace_model(module: nn.Module, *, seq_len: int = 2048, name: str | None = None) -> ModelSpec:
    """The ``ModelSpec`` of any causal language model; its parameter count equals the module's exactly.

    ``module`` maps token ids ``[batch, sequence]`` to logits and may live on any device, meta included; it is not
    changed. A Hugging Face model of a supported ``model_type`` is read from its config, if the config's count is the
    module's; any other from its structure. ``seq_len`` is the longest sequence to state where the module does not say
    it (by a config or a table of learned positions).

    Raises ``InputError`` saying what was not understood: a part that was not found, a forward pass that does not run,
    parameters without a place in a ``ModelSpec``.
    """
    label = name or type(module).__name__
    total = sum(parameter.numel() for parameter in module.parameters())
    spec = _from_config(module, label)
    if spec is None or spec.params != total:
        spec = _from_structure(module, label, seq_len)
    if spec.params != total:
        raise InputError(
            f"{label} was read as a model of {spec.params:,} parameters ({_by_kind(spec)}), but it has {total:,}: "
            "some of its layers share weights or are not understood"
        )
    return spec


def _from_config(module: nn.Module, name: str) -> ModelSpec | None:
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) not in BUILDERS or not hasattr(config, "to_dict"):
        return None
    try:
        spec = load_model(config)
    except InputError:  # a variant that the config's reader refuses may still be understood by its structure
        return None
    return replace(spec, name=name)


def _from_structure(module: nn.Module, name: str, seq_len: int) -> ModelSpec:
    anatomy = find_anatomy(module)
    shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
    rows, hidden = shapes[f"{anatomy.token_embedding}.weight"]
    models = _first_alike(list(module.get_submodule(anatomy.blocks).children()))
    stacks = find_stacks(module, hidden)
    recording = _watch(module, anatomy, models, stacks, name)
    reader = BlockReader(model=name, recording=recording, shapes=shapes, hidden=hidden, stacks=stacks)
    read = {index: reader.read(index, f"{anatomy.blocks}.{index}.") for index in sorted(set(models))}
    layers = tuple(read[model] for model in models)
    positions = 0
    norms_before = []
    for part in anatomy.before:
        for key, shape in own_parameters(part, shapes).items():
            if len(shape) > 1 and shape[-1] == hidden and key not in reader.matrices:
                positions += prod(shape[:-1])
                break
        else:
            norms_before.append(read_norm(part, shapes, hidden, name))
    if positions:
        layers = tuple(tuple(_without_rotary(layer) for layer in block) for block in layers)
    head = HeadLayer(
        hidden=hidden,
        vocab_size=rows,
        tied=anatomy.tied,
        bias=f"{anatomy.head}.bias" in shapes,
    )
    parts = Parts(
        embedding=EmbeddingLayer(vocab_size=rows, hidden=hidden, num_positions=positions),
        after_embedding=tuple(norms_before),
        layers=layers,
        final=(*(read_norm(part, shapes, hidden, name) for part in anatomy.after), head),
        max_seq_len=min(seq_len, positions) if positions else seq_len,
        notes=("read from the module's structure, where a sliding window cannot be seen",),
    )
    return assemble(parts, name=name, architecture=type(module).__name__)


def _without_rotary(layer: LayerSpec) -> LayerSpec:
    return replace(layer, rotary=False) if isinstance(layer, AttentionLayer) else layer


def _first_alike(blocks: list[nn.Module]) -> list[int]:
    """For each block the position of the first that is built like it: same classes, shapes and settings throughout."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_signature(block, index), index) for index, block in enumerate(blocks)]


def _signature(block: nn.Module, index: int) -> Any:
    """What decides how a block computes; its own position, which many blocks keep, is not part of it."""
    parts = []
    for name, part in block.named_modules():
        settings = {key: value for key, value in vars(part).items() if type(value) in (bool, int, float, str)}
        own = tuple(
            (key, None if type(value) is int and value == index else value) for key, value in sorted(settings.items())
        )
        shapes = tuple((key, tuple(weight.shape)) for key, weight in part.named_parameters(recurse=False))
        parts.append((name, type(part), own, shapes))
    return tuple(parts)


def _watch(module: nn.Module, anatomy: Anatomy, models: list[int], stacks: Mapping[str, Stack], name: str) -> Recording:
    """One forward pass of a weightless copy, seen by a ``Recorder``.

    A block built like an earlier one (``models`` names it) is passed over with that one's output: the pass takes as
    long as the distinct blocks do.
    """
    taken = {size for parameter in module.parameters() for size in parameter.shape}
    lengths = [whole_groups(stacks, length) for length in TRIAL_LENGTHS]
    num_tokens = next((length for length in lengths if length not in taken), lengths[-1])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    options = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
    try:
        weightless = _weightless(module, mode)
        recorder = Recorder(dict(weightless.named_parameters()), num_tokens)
        for index, block in enumerate(weightless.get_submodule(anatomy.blocks).children()):
            if models[index] == index:
                block.register_forward_pre_hook(recorder.entering(index))
                block.register_forward_hook(recorder.leaving(index))
            else:
                block.forward = recorder.output_of(models[index])
        for experts in stacks:
            stand_in(weightless.get_submodule(experts), recorder.in_place_of_experts(experts))
        with torch.no_grad(), _quiet_fake_tensors(), mode:
            tokens = torch.zeros(1, num_tokens, dtype=torch.long)
            recorder.mark_tokens(tokens)
            with recorder:
                weightless(tokens, **options)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # whatever a user's forward may meet
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name} does not run on token ids alone without its weights ({reason}); "
            "describe it by a Hugging Face config or a saved model instead"
        ) from error
    return recorder.recording


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """torch logs the traceback of an operator that refuses its shapes, beside raising it; the error says enough."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _weightless(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy on fake tensors: the module is neither read nor changed (a forward pass may leave caches behind)."""
    stand_ins: dict[int, Any] = {}
    with mode:
        for parameter in module.parameters():
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            stand_ins[id(parameter)] = nn.Parameter(fake, requires_grad=False)
        for buffer in module.buffers():
            stand_ins[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(module, stand_ins).eval()


def _by_kind(spec: ModelSpec) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in spec.params_by_kind().items())
