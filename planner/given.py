"""A config that someone gives in part: what is left open follows from the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshwright import InputError
from meshwright.cost_models.framework import Framework
from meshwright.cost_models.strategy import LOOPED, V_SHAPED, ParallelConfig, Schedule


def complete_config(given: Mapping[str, Any], num_devices: int, framework: Framework) -> ParallelConfig:
    """The config with the fields ``given`` (``None`` counts as not given) on ``num_devices`` devices.

    Left open, ``dp`` is what the other axes leave of the devices; ``cp_ring`` what ``cp_ulysses`` leaves of ``cp``;
    ``vpp`` 2 for looped and V-shaped schedules; ZeRO shards over all of ``dp * cp``; the vocabulary is split where the
    target does so; the rest takes ``ParallelConfig``'s defaults.
    Raises ``InputError`` when the degrees do not multiply to ``num_devices`` or contradict each other.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    for name, value in fields.items():
        if type(value) is int and value < (0 if name == "zero_stage" else 1):
            raise InputError(f"{name} must be at least {0 if name == 'zero_stage' else 1}, found {value}")
    tp, pp = fields.get("tp", 1), fields.get("pp", 1)
    ulysses, ring = fields.get("cp_ulysses", 1), fields.get("cp_ring")
    cp = fields.get("cp", ulysses * (ring or 1))
    if ring is None and cp % ulysses:
        raise InputError(f"cp_ulysses={ulysses} does not divide cp={cp}")
    fields |= {"cp": cp, "cp_ring": ring or cp // ulysses, "cp_ulysses": ulysses}
    others = " * ".join(f"{name}={fields[name]}" for name in ("tp", "cp", "pp") if fields.get(name, 1) > 1) or "tp=1"
    if "dp" not in fields:
        if num_devices % (tp * cp * pp):
            product = f" is {tp * cp * pp}, which" if "*" in others else ""
            raise InputError(f"{others}{product} does not divide {num_devices} devices")
        fields["dp"] = num_devices // (tp * cp * pp)
    elif tp * cp * pp * fields["dp"] != num_devices:
        world = tp * cp * pp * fields["dp"]
        raise InputError(
            f"{others} * dp={fields['dp']} is {world} ranks, not {num_devices} devices "
            "(choose how many to use with --gpus)"
        )
    if fields.get("zero_stage"):
        fields.setdefault("dp_shard", fields["dp"] * cp)
    if fields.get("schedule", Schedule.ONE_F_ONE_B) in (*LOOPED, *V_SHAPED):
        fields.setdefault("vpp", 2)
    fields.setdefault("vocab_parallel", framework.vocab_parallel and tp > 1)
    return ParallelConfig(**fields)
