"""How often blocks run forward and what is held of each micro-batch, on real ranks: what time and memory assume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from meshwright.cost_models import pipeline as pipeline_model
from meshwright.cost_models.framework import forward_calls
from meshwright.cost_models.schedules import rounds_size
from meshwright.cost_models.strategy import (
    LOOPED,
    V_SHAPED,
    ConfigBatch,
    ParallelConfig,
    Recompute,
    Schedule,
)
from meshwright.executors import pipeline
from meshwright.executors.recompute import apply_recompute
from meshwright.profiler.launch import RankError

pytestmark = pytest.mark.multiprocess

OnSplit = Callable[[str, Callable[..., Any]], list[Any]]
WEIGHTS = 9  # of a block of the example: four of attention, three of the feed-forward layer, two norms


def _calls(parallel: Any, batch: Any) -> dict[int, float]:
    """Forward calls of each block, by its place in the model, for one micro-batch; counted inside what recomputes."""
    calls: Counter[int] = Counter()
    for chunk in parallel._chunks:
        for place, block in chunk.module.blocks.items():
            block.attention_norm.register_forward_pre_hook(lambda *_, place=place: calls.update([place]))
    parallel.step(batch)
    return {place: number / parallel.num_microbatches for place, number in calls.items()}


def lines() -> Iterator[tuple[str, Recompute]]:
    for recompute in Recompute:
        for schedule in Schedule:
            yield f"pp2 {schedule.value}", recompute
        for words in ("dp2 zero3", "tp2 sp", "pp2 dp2 zero3 interleaved", "pp2 dp2 zero1 dualpipev", "pp2 tp2 sp zbv"):
            yield words, recompute


@pytest.mark.parametrize(("words", "recompute"), list(lines()))
def test_forward_calls_are_those_assumed(words: str, recompute: Recompute, on_split: OnSplit) -> None:
    word = "" if recompute is Recompute.NONE else recompute.value
    assumed = int(forward_calls(ConfigBatch.from_configs([ParallelConfig(recompute=recompute)]))[0])
    counted = on_split(f"example | {words} {word} | n4", _calls)
    assert {number for calls in counted for number in calls.values()} == {assumed}
    assert {place for calls in counted for place in calls} == {0, 1, 2, 3}


# -- torch's own split, which other targets run ---------------------------------------------------------------------


def _calls_of_torchs_split(parallel: Any, batch: Any) -> dict[int, float]:
    _split_as_torch_does(parallel, Recompute.FULL)
    return _calls(parallel, batch)


def _step_selectively(parallel: Any, batch: Any) -> None:
    _split_as_torch_does(parallel, Recompute.SELECTIVE)
    parallel.step(batch)


def _split_as_torch_does(parallel: Any, recompute: Recompute) -> None:
    for chunk in parallel._chunks:
        for block in chunk.module.blocks.values():
            for module in block.modules():
                vars(module).pop("forward", None)
            apply_recompute(block, recompute)
    for runner in parallel._pipelines.values():
        for stage in runner._schedule._stages:
            stage.dw_builder = None


def test_torchs_own_split_recomputes_for_every_weight(on_split: OnSplit) -> None:
    """Once for the gradient of the input, once for each weight; the first stage's backward is whole."""
    split = 1 + 1 + WEIGHTS
    assert on_split("example | pp2 zb-h1 | n4", _calls_of_torchs_split) == [{0: 2, 1: 2}, {2: split, 3: split}]
    assert on_split("example | pp2 zbv | n4", _calls_of_torchs_split) == [{0: 2, 3: split}, {1: split, 2: split}]
    # one backward of four is split on each stage but the first
    mixed = (3 * 2 + split) / 4
    assert on_split("example | pp2 dualpipev | n4", _calls_of_torchs_split) == [{0: 2, 3: mixed}, {1: mixed, 2: mixed}]


def test_torchs_own_split_refuses_selective_recompute(on_split: OnSplit) -> None:
    with pytest.raises(RankError, match="Trying to backward an extra time"):
        on_split("example | pp2 zb-h1 | n4", _step_selectively)


# -- what is held ---------------------------------------------------------------------------------------------------

Moment = tuple[tuple[int, ...], tuple[int, ...]]  # micro-batches held and waiting, of each chunk
PASSES = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


class Watch:
    """Of one chunk and each micro-batch: what a projection put out, which the activation behind it saves, and its
    gradient, which the projection's weight takes."""

    def __init__(self, projection: nn.Module) -> None:
        self.saved: list[StorageWeakRef] = []
        self.gradients: list[StorageWeakRef] = []
        projection.register_forward_hook(self._note)

    def _note(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        self.saved.append(StorageWeakRef(output.untyped_storage()))
        output.register_hook(lambda grad: self.gradients.append(StorageWeakRef(grad.untyped_storage())))


def _alive(refs: list[StorageWeakRef]) -> int:
    return sum(not ref.expired() for ref in refs)


def _moments(parallel: Any, batch: Any) -> list[Moment]:
    """After each pass of a step: how many micro-batches have their saved tensor, how many their gradient."""
    watches = [Watch(next(iter(chunk.module.blocks.values())).mlp.up_proj) for chunk in parallel._chunks]
    moments: list[Moment] = []

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def then_count(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            moments.append((tuple(_alive(w.saved) for w in watches), tuple(_alive(w.gradients) for w in watches)))
            return result

        return then_count

    for name in PASSES:  # in this rank's process alone
        setattr(pipeline._Stage, name, counting(getattr(pipeline._Stage, name)))
    parallel.step(batch)
    return moments


@pytest.mark.parametrize(
    ("schedule", "pp", "microbatches"),
    [
        *((schedule, 2, 6) for schedule in Schedule),
        (Schedule.ZB_H1, 4, 5),
        (Schedule.ZBV, 4, 5),
        (Schedule.DUALPIPEV, 4, 9),
    ],
)
def test_what_is_held_on_ranks_is_what_memory_counts(
    schedule: Schedule, pp: int, microbatches: int, on_split: OnSplit
) -> None:
    vpp = 2 if schedule in (*LOOPED, *V_SHAPED) else 1
    counted = on_split(f"example layers8 | pp{pp} {schedule.value} | n{microbatches}", _moments)
    for rank, moments in enumerate(counted):
        per_round = np.array([rounds_size(pp, microbatches)])
        assumed = pipeline_model.holdings(schedule, pp, vpp, rank, np.array([microbatches]), per_round)
        fullest = {(tuple(held[0]), tuple(waiting[0])) for held, waiting in assumed.tolist()}
        assert fullest <= set(moments), rank
        for weight in (0.0, 0.3, 0.6, 0.9, 1.5, 4.0, 20.0):  # of what waits, where what is held weighs 1

            def num_bytes(moment: Any, weight: float = weight) -> float:
                return float(sum(moment[0]) + weight * sum(moment[1]))

            assert max(map(num_bytes, moments)) == max(map(num_bytes, fullest)), (rank, weight)
