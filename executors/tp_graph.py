"""Which matrices of a block belong together, from what each one's input is made from.

Matrices and experts are the nodes. One whose output reaches the block's output without passing another node is an
*end*: its output is part of the residual stream. An end that is fed by other matrices is the row split of a region; of
what feeds it, matrices that feed nothing else are its columns, and what comes before those is kept whole (the
down-projections of latent attention, one of which feeds a column and the attention itself).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshwright import InputError
from meshwright.executors.tp_dataflow import BlockRun, depends, tensors_in
from meshwright.profiler.record import record


@record
class Group:
    """The matrices of one region: ``entries`` are those that are given the residual stream, the first of all."""

    columns: tuple[str, ...]
    whole: tuple[str, ...]
    entries: tuple[str, ...]
    row: str


class _Graph:
    """Direct dependence between the nodes of a block."""

    def __init__(self, run: BlockRun) -> None:
        self.run = run
        self.nodes = list(run.whole.inputs)  # in the order they ran
        self.from_hidden: dict[str, bool] = {}
        self.sources: dict[str, list[str]] = {}
        for index, name in enumerate(self.nodes):
            earlier = self.nodes[:index]
            given = run.whole.routed.get(name, run.whole.inputs[name])
            self.from_hidden[name], *reached = depends(given, [run.hidden, *(run.outputs[other] for other in earlier)])
            self.sources[name] = [other for other, is_reached in zip(earlier, reached, strict=True) if is_reached]
        self.feeds = {name: [other for other in self.nodes if name in self.sources[other]] for name in self.nodes}
        leaving = next(tensors_in(run.whole.output))  # the hidden states; attention weights may follow
        reached = depends(leaving, [run.outputs[name] for name in self.nodes])
        self.ends = {name for name, leaves in zip(self.nodes, reached, strict=True) if leaves}

    def fed_by(self, name: str) -> list[str]:
        """Nodes inside regions that ``name`` is made from."""
        return [other for other in self.sources[name] if other not in self.ends]

    def from_residual(self, name: str) -> bool:
        return self.from_hidden[name] or any(other in self.ends for other in self.sources[name])

    def before(self, names: Iterable[str]) -> list[str]:
        """What ``names`` are made from inside regions, however far back, in the order it ran."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            for other in self.fed_by(waiting.pop()):
                if other not in found:
                    found.add(other)
                    waiting.append(other)
        return [name for name in self.nodes if name in found]


def group_matrices(run: BlockRun) -> list[Group]:
    """The regions of one block, in the order of their row splits.

    In a layer of experts, matrices that lead to no row split stay outside every region (a router, the gate on a shared
    expert). Raises ``InputError`` naming a matrix that fits neither.
    """
    for name in run.matrices:
        if name not in run.whole.inputs:
            raise InputError(f"{run.name}.{name} is not used by its block: cannot see how to split it")
    graph = _Graph(run)
    groups: list[Group] = []
    for name in graph.nodes:
        _refuse_mixed(graph, name)
        if name in graph.ends and name in run.matrices and graph.fed_by(name) and run.whole.inputs[name].shape[-1] > 1:
            groups.append(_group(graph, name))
    placed = {name for group in groups for name in (*group.columns, *group.whole, group.row)}
    for name in run.matrices:
        if name not in placed and not _serves_experts(graph, name):
            raise InputError(f"{run.name}.{name} does not feed exactly one matrix: cannot be split by columns")
    return groups


def _refuse_mixed(graph: _Graph, name: str) -> None:
    fed_by, from_residual = graph.fed_by(name), graph.from_residual(name)
    if fed_by and from_residual and name in graph.run.matrices:
        raise InputError(f"{graph.run.name}.{name} takes in both the residual stream and other matrices' outputs")
    if not fed_by and not from_residual:
        raise InputError(f"{graph.run.name}.{name} depends on no input of its block")


def _group(graph: _Graph, row: str) -> Group:
    direct = graph.fed_by(row)
    columns = tuple(name for name in direct if graph.feeds[name] == [row])
    inside = graph.before([row])
    whole = tuple(name for name in inside if name not in columns)
    members: Mapping[str, bool] = dict.fromkeys([*inside, row], True)
    for name in inside:
        if not columns or name not in graph.run.matrices or any(other not in members for other in graph.feeds[name]):
            raise InputError(f"{graph.run.name}.{name} does not feed exactly one matrix: cannot be split by columns")
    if graph.run.matrices[row].outputs != graph.run.hidden.shape[-1]:
        raise InputError(
            f"cannot settle how to split {graph.run.name}.{row}: it does not lead back to the hidden states"
        )
    return Group(columns=columns, whole=whole, entries=tuple(n for n in inside if graph.from_residual(n)), row=row)


def _serves_experts(graph: _Graph, name: str) -> bool:
    """Whether a matrix of a layer of experts works token by token beside them: fed by the residual stream alone, it
    leads to the experts or into the layer's output."""
    layers = [experts.rpartition(".")[0] + "." for experts in graph.run.experts]
    return (
        any(layer != "." and name.startswith(layer) for layer in layers)
        and not graph.fed_by(name)
        and all(other in graph.run.experts for other in graph.feeds[name])
    )
