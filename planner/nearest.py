"""Where nothing may be recommended: the config that lacks least memory, best-first by what each lacks at least.

Degrees are taken in the order of what they lack at least with their smallest micro-batch, since a larger one holds no
less, until none can lack less than the nearest scored so far.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost_models.strategy import ConfigBatch
from meshwright.planner.bounds import Bounds
from meshwright.planner.families import Families
from meshwright.planner.in_memory import Found, Memory, together
from meshwright.planner.tables import as_batch, filtered

FloatArray = NDArray[np.float64]

DEGREES = 20  # looked at at once
FIRST = 50  # configs scored of them, sixteen times as many the next time


def nearest(families: Families, bounds: Bounds, memory: Memory) -> Found:
    """Configs scored in memory, the one that lacks least among them."""
    rows, tails = families.rows, families.tails
    smallest = tails.sizes[families.has_size.argmax(axis=1)]
    columns = rows | {"micro_batch_size": smallest, "row": np.arange(len(smallest))}
    columns = tails.recomputes.cross(tails.zeros.cross(columns))
    of, lacking = columns.pop("row"), np.full(len(smallest), np.inf)
    np.minimum.at(lacking, of, _lacking(as_batch(columns), bounds, memory, by_schedule=False))
    order, at, least, found = np.argsort(lacking, kind="stable"), 0, np.inf, list[Found]()
    while at < len(order) and lacking[order[at]] < least:
        batch = tails.configs(filtered(rows, order[at : at + DEGREES]))
        each = _lacking(batch, bounds, memory, by_schedule=True)
        at, near, start, step = at + DEGREES, np.argsort(each, kind="stable"), 0, FIRST
        while start < len(near) and each[near[start]] < least:
            chosen = near[start : start + step]
            start, step = start + step, 16 * step
            found.append(memory.of(batch.take(chosen[each[chosen] < least])))
            least = min(least, float((found[-1].needed_bytes - found[-1].usable_bytes).min()))
    return together(found, families.cells)


def _lacking(batch: ConfigBatch, bounds: Bounds, memory: Memory, *, by_schedule: bool) -> FloatArray:
    """What configs lack at least: under any schedule, or under their own."""
    state, activations = bounds.state(batch), bounds.activations(bounds.held(batch))
    if not by_schedule:  # with a larger micro-batch there may be no earlier one, and no gradients of it
        state = replace(state, grads=np.zeros_like(state.grads))
    peak = bounds.mean_peak(batch, state, activations[0])
    shapes, of = batch.distinct("pp", "vpp", "schedule")
    for number, shape in enumerate(shapes.configs() if by_schedule else ()):
        rows = np.flatnonzero(of == number)
        own = (activations[0][:, rows], activations[1][rows])
        peak[rows] = bounds.peak(batch.take(rows), state.take(rows), own, shape.schedule, shape.vpp)
    return memory.lacking(peak, batch)
