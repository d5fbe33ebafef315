"""Clusters known from datasheets: ``h100-sxm`` is one node, ``h100-sxm:16`` sixteen of them.

Each preset is an ordinary cluster profile of two nodes under ``presets/clusters``, so that it can be read, copied and
corrected like a measured one. Rates are what a large message, copy or matmul is known to reach; the datasheet's own
figure stands beside it, and every assumption says so in its source.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path

from meshwright import InputError

FOLDER = Path(__file__).parent / "presets" / "clusters"


def preset_names() -> tuple[str, ...]:
    """Every preset, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def find_preset(source: str) -> tuple[Path, int]:
    """The file and the number of nodes of ``NAME`` (one node) or ``NAME:NODES``.

    Raises ``InputError`` for an unknown name, with the nearest ones, or for a number of nodes that is not one.
    """
    name, colon, count = source.partition(":")
    names = preset_names()
    if name not in names:
        nearest = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"presets are {', '.join(names)}"
        raise InputError(f"unknown cluster {source!r}: neither a file nor a preset; {hint}")
    if colon and not (count.isascii() and count.isdigit() and int(count) >= 1):
        raise InputError(f"cannot read {source!r}: expected {name}:NODES with NODES a whole number of at least 1")
    return FOLDER / f"{name}.json", int(count or 1)


@cache
def _datasheet_peaks() -> dict[tuple[str, str], float]:
    """FLOP/s by (model as in a device's name, dtype), read from the presets' own files."""
    peaks = {}
    for path in sorted(FOLDER.glob("*.json")):
        device = json.loads(path.read_text(encoding="utf-8"))["devices"][0]
        for curve in device["efficiencies"]:
            if curve["op"] == "matmul":
                peaks[device["kind"].partition("-")[0], curve["dtype"]] = float(curve["peak_flops_per_s"])
    return peaks


def datasheet_peak(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device by the name its driver gives (``NVIDIA H100 80GB HBM3``); None when no preset has it.

    Only SXM devices are in the presets: a PCIe card of the same model is not taken for one.
    """
    words = device_name.replace("-", " ").split()
    if "PCIe" in words or "NVL" in words:
        return None
    return next((peak for (model, of), peak in _datasheet_peaks().items() if model in words and of == dtype), None)
