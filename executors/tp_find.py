"""Find which modules tensor parallelism splits, and how: by the flow of data, not by a table of names.

One decoder block of each structure is run as a skeleton (``profiler.skeleton``): on a few tokens, with a random
stand-in for every matrix's output. What depends on what then says everything:

* a matrix whose output goes to the residual stream and whose input comes from other matrices is split by **rows**
  (inputs) and closes a region; those that feed it are split by **columns** (outputs), and what lies before them is kept
  **whole** (``tp_graph``; the down-projections of latent attention, DeepSeek-V2, arXiv 2405.04434 section 2.1);
* the gradient of one entry of a region's row input shows which outputs it is made from: one of each matrix in a
  feed-forward layer, those of one head in attention. So the heads are found, which of them share keys and values,
  where a fused projection (``[q|k|v]``, per head ``[q k v]``, ``[gate|up]``) keeps the parts of each, and which vectors
  have entries for each head (attention sinks);
* a **probe** settles it: the block runs again with the column outputs that one rank would compute, for every legal
  tp up to 64 (three of them in feed-forward layers), and the row input must be that rank's slice of the whole. Integers
  that the forward reads (``num_heads``, ``num_key_value_groups``, ``split_size``) are tried as they are and as a rank's
  share of what they equal; the fewest changes with which every probe agrees are taken.

Experts are not split here but over ``ep`` and ``etp``; the router beside them, and the gate on a shared expert, stay
whole, and a shared expert is a feed-forward region of its own.

Stand-ins make a probe cheap at any width, on meta-device models too. What stays unsettled (a matrix used
twice, experts in a list, a norm over all heads at once, a layout that no probe accepts) is refused by name, never
guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meshwright import InputError
from meshwright.executors.expert_modules import find_experts
from meshwright.executors.tp_dataflow import BlockRun, BoolArray, depends, tensors_in
from meshwright.executors.tp_graph import Group, group_matrices
from meshwright.executors.tp_rules import Attribute, IntArray, Region, Share, TensorParallelRules
from meshwright.profiler.anatomy import Anatomy, find_anatomy
from meshwright.profiler.skeleton import Matrix, call_with_tokens, find_matrices, hollow

MAX_PROBED_TP = 64
MAX_CHANGED_ATTRIBUTES = 4


def find_tensor_parallel_rules(model: nn.Module) -> TensorParallelRules:
    """How ``model``, whole and on any device (meta too), is split by tensor parallelism; for any legal tp.

    Takes a fraction of a second for small models, seconds for the widest; neither reads nor copies the weights.
    Raises ``InputError`` naming the module that cannot be settled.
    """
    with torch.device("cpu"):  # the skeleton's, whatever the caller's default
        return _find(model)


def _find(model: nn.Module) -> TensorParallelRules:
    anatomy = find_anatomy(model)
    matrices, experts = find_matrices(model), tuple(place.name for place in find_experts(model))
    _refuse_unknown(model, anatomy, matrices, experts)
    table = model.get_submodule(anatomy.token_embedding)
    assert isinstance(table, nn.Embedding)
    if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        raise InputError(f"{anatomy.token_embedding} uses max_norm, scale_grad_by_freq or sparse: it cannot be split")
    if type(table).forward is not nn.Embedding.forward:
        raise InputError(f"{anatomy.token_embedding} ({type(table).__name__}) does more than look up rows: not settled")

    prototypes = _prototypes(model, anatomy)
    runs = [_block_runs(model, anatomy, matrices, experts, list(prototypes), kind) for kind in _attention_kinds(model)]
    regions: list[Region] = []
    partial: set[str] = set()
    for first, alike in prototypes.items():
        found, inside = _find_regions([run_of[first] for run_of, _ in runs])
        for block in alike:
            regions += [region.within(block) for region in found]
            partial |= {f"{block}.{name}" for name in inside}
    return TensorParallelRules(
        anatomy=anatomy,
        matrices=matrices,
        regions=tuple(regions),
        experts=experts,
        partial=frozenset(partial),
        hidden_argument=next(iter(runs[0][0].values())).hidden_argument,
        embedding_reaches_blocks=all(reaches for _, reaches in runs),
        vocab_size=table.num_embeddings,
    )


def _refuse_unknown(
    model: nn.Module, anatomy: Anatomy, matrices: Mapping[str, Matrix], experts: tuple[str, ...]
) -> None:
    layers = tuple(name.rpartition(".")[0] + "." for name in experts)
    for name, module in model.get_submodule(anatomy.blocks).named_modules(prefix=anatomy.blocks):
        lists = [part for part in module.children() if isinstance(part, nn.ModuleList)]
        if lists and any(True for _ in lists[0].parameters()):
            raise InputError(
                f"{name} holds a list of modules (experts?) inside a block: stack their weights in one module"
            )
        if name in experts or name in matrices:
            continue
        for key, weight in module.named_parameters(recurse=False):
            # in a layer of experts it is the router's, which is kept whole
            if weight.dim() > 2 or (weight.dim() == 2 and not name.startswith(layers)):
                raise InputError(
                    f"{name} ({type(module).__name__}) uses {key}, of shape {list(weight.shape)}, as neither x @ W nor "
                    "x @ W.T: not settled"
                )


def _prototypes(model: nn.Module, anatomy: Anatomy) -> dict[str, list[str]]:
    """Blocks by structure: the name of the first of each, and the names of all that are built alike."""
    alike: dict[Any, list[str]] = {}
    for index, block in enumerate(model.get_submodule(anatomy.blocks).children()):
        structure = tuple(
            (name, type(part), tuple((key, weight.shape) for key, weight in part.named_parameters(recurse=False)))
            for name, part in block.named_modules()
        )
        alike.setdefault(structure, []).append(f"{anatomy.blocks}.{index}")
    return {names[0]: names for names in alike.values()}


def _attention_kinds(model: nn.Module) -> list[str | None]:
    """Attention implementations to watch: eager reads every attribute, and the model's own must agree."""
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if own is None or not hasattr(model, "set_attn_implementation"):
        return [None]
    return ["eager", "sdpa"] if own == "sdpa" else ["eager"]


def _block_runs(
    model: nn.Module,
    anatomy: Anatomy,
    matrices: Mapping[str, Matrix],
    experts: Sequence[str],
    names: Sequence[str],
    kind: str | None,
) -> tuple[dict[str, BlockRun], bool]:
    """The named blocks, ready to run with their own arguments; and whether the embedding itself reaches the first."""
    copied = hollow(model, anatomy.blocks)
    if kind is not None:
        copied.set_attn_implementation(kind)  # type: ignore[operator]
    embedded: list[Tensor] = []
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Any:
        return lambda _, args, kwargs: calls.setdefault(name, (args, kwargs)) and None

    handles = [
        copied.get_submodule(anatomy.token_embedding).register_forward_hook(lambda *call: embedded.append(call[2]))
    ]
    for name in names:
        handles.append(copied.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True))
    copied.train()  # with dropout, what reaches the blocks is not the embedding itself
    call_with_tokens(copied)
    copied.eval()
    for handle in handles:
        handle.remove()
    runs = {}
    for name in names:
        if name not in calls:
            raise InputError(f"{name} is not run by {type(model).__name__}: cannot see what it does")
        block = copied.get_submodule(name)
        object.__delattr__(block, "forward")  # the pass-over of the hollow run
        inside = {
            key.removeprefix(name + "."): matrix for key, matrix in matrices.items() if key.startswith(name + ".")
        }
        own_experts = [key.removeprefix(name + ".") for key in experts if key.startswith(name + ".")]
        try:
            runs[name] = BlockRun(name, block, calls[name], inside, own_experts)
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name} does not run with stand-ins for its matrices: {error}") from error
    args, kwargs = calls[names[0]]
    reaches = any(embedded and value is embedded[0] for value in tensors_in((args, kwargs)))
    return runs, reaches


def _find_regions(runs: Sequence[BlockRun]) -> tuple[list[Region], set[str]]:
    """The regions of one block, and its replicated parameters that lie inside one (relative names)."""
    run = runs[0]
    regions, inside = [], set()
    for group in group_matrices(run):
        row, columns = group.row, group.columns
        num_units, num_shared, width, outputs = _units(run, row, columns)
        container, argument = _container(run, group)
        names = list(run.vectors)
        later = [run.whole.inputs[name] for name in (row, *columns, *group.whole) if name not in group.entries]
        reached = [name for name, found in zip(names, depends(later, list(run.vectors.values())), strict=True) if found]
        vectors = _split_vectors(run, row, num_units, width, reached)
        region = Region(
            columns=columns,
            kept_whole=group.whole,
            entries=group.entries,
            row=row,
            num_units=num_units,
            num_shared=num_shared,
            unit_width=width,
            unit_outputs=outputs,
            vectors=tuple(vectors),
            vector_outputs=tuple(vectors.values()),
            container=container,
            argument=argument,
            by_token=_by_token(run, row, (*columns, *group.whole)),
            attributes=(),
        )
        regions.append(_settle_attributes(runs, region))
        inside |= {name for name in reached if name not in vectors}
        inside |= {f"{name}.{kind}" for name in group.whole for kind in ("weight", "bias")}
    return regions, inside


def _split_vectors(run: BlockRun, row: str, num_units: int, width: int, names: Sequence[str]) -> dict[str, IntArray]:
    """Of the named vectors those with entries for each unit: which entries, ``[num_units, entries]``."""
    x, found = run.whole.inputs[row], {}
    for name in names:
        size = run.vectors[name].shape[0]
        if width == 1 or size % num_units or not depends(x, [run.vectors[name]])[0]:
            continue
        used = np.stack([run.made_from(x, unit * width, (unit + 1) * width, [name])[0] for unit in range(num_units)])
        if (used.sum(0) == 1).all() and (used.sum(1) == size // num_units).all():
            found[name] = np.nonzero(used)[1].reshape(num_units, -1)
    return found


def _units(run: BlockRun, row: str, columns: tuple[str, ...]) -> tuple[int, int, int, tuple[IntArray, ...]]:
    """Units and shared units of a region, a unit's row inputs, and the outputs of each column it is made from."""
    x = run.whole.inputs[row]
    width = x.shape[-1]
    first, second = run.made_from(x, 0, 1, columns), run.made_from(x, 1, 2, columns)
    if not any((a & b).any() for a, b in zip(first, second, strict=True)):
        return width, width, 1, _single_outputs(run, row, columns, first, second)
    extents = [
        np.flatnonzero(run.affected_by(column, int(output), row))
        for column, used in zip(columns, first, strict=True)
        for output in np.flatnonzero(used & ~np.concatenate(([False], used[:-1])))
    ]
    sizes = [len(extent) for extent in extents if len(extent) > 1 and extent[-1] == len(extent) - 1]
    unit = min(sizes, default=0)
    if unit == 0 or width % unit:
        raise _unsettled(run, row, "its inputs do not fall into equal heads")
    by_unit = [run.made_from(x, start, start + unit, columns) for start in range(0, width, unit)]
    outputs, most_shared = [], 1
    for index in range(len(columns)):
        used = np.stack([parts[index] for parts in by_unit])
        counts = used.sum(1)
        if counts.min() != counts.max():
            raise _unsettled(run, row, "its heads are made from unequal numbers of outputs")
        most_shared = max(most_shared, int(used.sum(0).max()))
        outputs.append(np.nonzero(used)[1].reshape(len(by_unit), -1))
    if len(by_unit) == 1:
        raise _unsettled(run, row, "each of its inputs depends on all outputs that feed it (a norm over all heads?)")
    if len(by_unit) % most_shared:
        raise _unsettled(run, row, f"{most_shared} of its {len(by_unit)} heads share outputs")
    return len(by_unit), len(by_unit) // most_shared, unit, tuple(outputs)


def _single_outputs(
    run: BlockRun, row: str, columns: tuple[str, ...], first: list[BoolArray], second: list[BoolArray]
) -> tuple[IntArray, ...]:
    """Where each row input is made from outputs of its own: the outputs advance by a fixed step, checked in between."""
    x = run.whole.inputs[row]
    width = x.shape[-1]
    starts = [np.flatnonzero(used) for used in first]
    nexts = [np.flatnonzero(used) for used in second]
    if any(len(a) != len(b) for a, b in zip(starts, nexts, strict=True)):
        raise _unsettled(run, row, "its inputs are made from unequal numbers of outputs")
    outputs = tuple(a + np.arange(width)[:, None] * (b - a) for a, b in zip(starts, nexts, strict=True))
    for unit in {2 % width, width // 3, width // 2, width - 1}:
        for expected, used in zip(outputs, run.made_from(x, unit, unit + 1, columns), strict=True):
            if not np.array_equal(np.sort(expected[unit]), np.flatnonzero(used)):
                raise _unsettled(run, row, "its inputs are not made from outputs at a fixed step")
    return outputs


def _by_token(run: BlockRun, row: str, columns: tuple[str, ...]) -> bool:
    x = run.whole.inputs[row]
    last = x.flatten(0, -2)[-1].sum()
    sources = [run.outputs[name] for name in columns]
    found = torch.autograd.grad(last, sources, retain_graph=True, allow_unused=True)
    return all(gradient is None or not gradient.flatten(0, -2)[:-1].any() for gradient in found)


def _container(run: BlockRun, group: Group) -> tuple[str, int | str | None]:
    """The smallest module around a region, if one argument of it feeds all its entries and nothing else."""
    parts = [name.split(".")[:-1] for name in (*group.whole, *group.columns, group.row)]
    shared = [pair[0] for pair in zip(*parts, strict=False) if len(set(pair)) == 1]
    name = ".".join(shared)
    call = run.whole.calls.get(name)
    x = run.whole.inputs[group.entries[0]]
    if call is None or any(run.whole.inputs[entry] is not x for entry in group.entries):
        return "", None
    given: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    places = [where for where, value in given if value is x]
    if len(places) != 1 or any(depends(call.output, [x])):
        return "", None
    return name, places[0]


def _settle_attributes(runs: Sequence[BlockRun], region: Region) -> Region:
    """The region with the fewest attributes changed for which every probe agrees; refused when there is none."""
    shares: dict[tuple[str, str], list[Share]] = {}
    for run in runs:
        for module, name in sorted(run.read):
            value = getattr(run.block.get_submodule(module), name)
            matching = [share for share in Share if region.whole(share) == value]
            if matching:
                shares[module, name] = matching
    degrees = [tp for tp in range(2, min(region.num_units, MAX_PROBED_TP) + 1) if region.legal(tp)]
    if region.by_token:  # no heads: attention's implementation does not matter, and all degrees cut alike
        runs, degrees = runs[:1], [*degrees[:2], *degrees[2:][-1:]]
    if not degrees:
        raise _unsettled(runs[0], region.row, f"its {region.num_units} heads cannot be divided")
    for attributes in _choices(shares):
        trial = replace(region, attributes=attributes)
        if all(_agrees(run, trial, tp) for run in runs for tp in degrees):
            return trial
    raise _unsettled(runs[0], region.row, "no way of cutting the matrices that feed it gives the same numbers")


def _choices(shares: Mapping[tuple[str, str], list[Share]]) -> Iterator[tuple[Attribute, ...]]:
    for size in range(min(len(shares), MAX_CHANGED_ATTRIBUTES) + 1):
        for chosen in combinations(shares, size):
            for meanings in product(*(shares[place] for place in chosen)):
                yield tuple(
                    Attribute(module=module, name=name, share=share)
                    for (module, name), share in zip(chosen, meanings, strict=True)
                )


def _agrees(run: BlockRun, region: Region, tp: int) -> bool:
    """Whether the block, given what one rank's columns compute, gives that rank's slice to the row split."""
    expected = run.whole.inputs[region.row]
    modules = [run.block.get_submodule(item.module) for item in region.attributes]
    before = [getattr(module, item.name) for module, item in zip(modules, region.attributes, strict=True)]
    vectors = dict(zip(region.vectors, region.vector_outputs, strict=True))
    try:
        for module, item in zip(modules, region.attributes, strict=True):
            setattr(module, item.name, region.share(item.share, tp))
        for rank in {0, tp // 2, tp - 1}:
            for name in vectors:
                run.set_vector(name, run.vectors[name].detach()[torch.from_numpy(region.entries_of(name, tp, rank))])
            given = {
                name: run.outputs[name].detach()[..., torch.from_numpy(region.outputs(index, tp, rank))]
                for index, name in enumerate(region.columns)
            }
            with torch.no_grad():
                found = run.run(given).inputs[region.row]
            wanted = expected[..., region.inputs(tp, rank)]
            if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-5, atol=1e-7):
                return False
    except (RuntimeError, ValueError, IndexError):  # the slices do not fit this way: not it
        return False
    finally:
        for module, item, value in zip(modules, region.attributes, before, strict=True):
            setattr(module, item.name, value)
        for name in vectors:
            run.set_vector(name, run.vectors[name])
    return True


def _unsettled(run: BlockRun, row: str, why: str) -> InputError:
    return InputError(f"cannot settle how to split {run.name}.{row}: {why}")
