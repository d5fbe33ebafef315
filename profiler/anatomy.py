"""Where a torch model keeps its parts: token table, decoder blocks, final norm, head. Found by structure, not by name.

Read by ``trace`` (module -> ModelSpec) and by the executors (what to cut). torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from meshwright import InputError
from meshwright.profiler.record import record

if TYPE_CHECKING:
    from torch import nn


@record
class Anatomy:
    """Dotted names inside one module (``""`` is the module itself).

    ``base`` is the smallest module that holds the token table and the blocks (``model`` in a Hugging Face Llama).
    ``before`` and ``after`` are the other modules with parameters outside the blocks, in the order they run: before
    the blocks (learned positions, a norm on embeddings) and after them (the final norm).
    """

    base: str
    token_embedding: str
    before: tuple[str, ...]
    blocks: str
    num_blocks: int
    after: tuple[str, ...]
    head: str
    tied: bool


def find_anatomy(module: nn.Module) -> Anatomy:
    """The parts of a causal language model.

    Blocks are the ``ModuleList`` with the most parameters; the token table and the head are the largest ``Embedding``
    outside it and the ``Linear`` with as many outputs as the table has rows. What runs before and after the blocks is
    watched in a run of the model's skeleton (OPT registers its final norm before its blocks); a model that does not run
    on token ids alone is read in the order of registration.
    Raises ``InputError`` naming the part that was not found.
    """
    from torch import nn

    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(module).__name__} has no ModuleList of decoder blocks: cannot tell where to cut it")
    blocks_name, blocks = max(lists, key=lambda item: sum(weight.numel() for weight in item[1].parameters()))
    outside = [
        (name, part)
        for name, part in module.named_modules()
        if not _inside(name, blocks_name) and part is not blocks and any(True for _ in part.parameters(recurse=False))
    ]
    tables = [(name, part) for name, part in outside if isinstance(part, nn.Embedding)]
    if not tables:
        raise InputError(f"{type(module).__name__} has no Embedding outside its blocks: cannot find the token table")
    tables.sort(key=lambda item: item[1].num_embeddings, reverse=True)
    linears = [(name, part) for name, part in outside if isinstance(part, nn.Linear)]
    pairs = [
        (table, head)
        for table in tables
        for head in reversed(linears)
        if head[1].out_features == table[1].num_embeddings
    ]
    if not pairs:
        raise InputError(
            f"{type(module).__name__} has no Linear with {tables[0][1].num_embeddings} outputs outside its blocks: "
            "cannot find the head"
        )
    # a learned position table may by chance be as long as the head is wide: a tied pair decides first
    (table_name, table), (head_name, head) = min(pairs, key=lambda pair: pair[0][1].weight is not pair[1][1].weight)
    rest = [name for name, _ in outside if name not in (table_name, head_name)]
    order = _order_of_running(module, blocks_name, rest)
    base_parts = _common(table_name.split("."), blocks_name.split("."))
    return Anatomy(
        base=".".join(base_parts),
        token_embedding=table_name,
        before=tuple(order[: order.index(blocks_name)]),
        blocks=blocks_name,
        num_blocks=len(blocks),
        after=tuple(order[order.index(blocks_name) + 1 :]),
        head=head_name,
        tied=head.weight is table.weight,
    )


def _order_of_running(module: nn.Module, blocks_name: str, names: list[str]) -> list[str]:
    """``names`` and ``blocks_name`` in the order in which the model first calls them; never called: as registered."""
    import torch

    from meshwright.profiler.skeleton import call_with_tokens, hollow

    registered = [name for name, _ in module.named_modules() if name in names or name == blocks_name]
    called: list[str] = []
    with torch.device("cpu"):  # whatever the caller's default
        copy = hollow(module, blocks_name)
    blocks = copy.get_submodule(blocks_name)

    def note(name: str) -> Callable[[nn.Module, object], None]:
        return lambda _part, _args: called.append(name)

    for name in names:
        copy.get_submodule(name).register_forward_pre_hook(note(name))
    for block in blocks.children():
        block.register_forward_pre_hook(note(blocks_name))
    try:
        with torch.device("cpu"):
            call_with_tokens(copy)
    except InputError:
        return registered
    if blocks_name not in called:
        return registered
    first_call = {name: called.index(name) for name in called}
    before_blocks = registered[: registered.index(blocks_name)]
    unseen = -1, len(called)
    return sorted(registered, key=lambda name: first_call.get(name, unseen[name not in before_blocks]))


def _inside(name: str, parent: str) -> bool:
    return name.startswith(parent + ".")


def _common(first: list[str], second: list[str]) -> list[str]:
    shared = []
    for a, b in zip(first[:-1], second[:-1], strict=False):
        if a != b:
            break
        shared.append(a)
    return shared
