"""Where a torch model keeps its parts: token table, decoder blocks, final norm, head. Found by structure, not by name.

Read by ``trace`` (module -> ModelSpec) and by the executors (what to cut). torch is imported inside the functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshwright import InputError
from meshwright.profiler.record import record

if TYPE_CHECKING:
    from torch import nn


@record
class Anatomy:
    """Dotted names inside one module (``""`` is the module itself).

    ``base`` is the smallest module that holds the token table and the blocks (``model`` in a Hugging Face Llama).
    ``before`` and ``after`` are the other modules with parameters outside the blocks: those that the model registers
    before its blocks (learned positions, a norm on embeddings) and after them (the final norm).
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

    Blocks are the ``ModuleList`` with the most parameters; the token table is the largest ``Embedding`` outside it; the
    head is the ``Linear`` outside it whose output is as wide as the token table is long.
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
    table_name, table = max(tables, key=lambda item: item[1].num_embeddings)
    heads = [
        (name, part)
        for name, part in outside
        if isinstance(part, nn.Linear) and part.out_features == table.num_embeddings
    ]
    if not heads:
        raise InputError(
            f"{type(module).__name__} has no Linear with {table.num_embeddings} outputs outside its blocks: "
            "cannot find the head"
        )
    head_name, head = heads[-1]
    rest = [name for name, _ in outside if name not in (table_name, head_name)]
    order = [name for name, _ in module.named_modules()]
    base_parts = _common(table_name.split("."), blocks_name.split("."))
    return Anatomy(
        base=".".join(base_parts),
        token_embedding=table_name,
        before=tuple(name for name in rest if order.index(name) < order.index(blocks_name)),
        blocks=blocks_name,
        num_blocks=len(blocks),
        after=tuple(name for name in rest if order.index(name) > order.index(blocks_name)),
        head=head_name,
        tied=head.weight is table.weight,
    )


def _inside(name: str, parent: str) -> bool:
    return name.startswith(parent + ".")


def _common(first: list[str], second: list[str]) -> list[str]:
    shared = []
    for a, b in zip(first[:-1], second[:-1], strict=False):
        if a != b:
            break
        shared.append(a)
    return shared
