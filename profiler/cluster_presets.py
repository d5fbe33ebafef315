"""Clusters known from datasheets: ``h100-sxm`` is one node, ``h100-sxm:16`` sixteen of them.

A device stands once, in ``presets/devices`` (a ``Device`` record as JSON); a file in ``presets/clusters`` names it and
says how many a host has and by which links they are joined: ``name``, ``device``, ``devices_per_node``, ``tiers``
(innermost first; the last one, the network, is resized to the cluster) and ``notes``. A kind of links stands once too,
in ``presets/links``: a tier names it and its ``group_size``; the file holds the other fields of ``LinkTier``. Rates are
what a large message, copy or kernel is known to reach; the datasheet's own figure stands beside it, and every figure
says whether it was measured, is a datasheet's or is assumed.

``presets/calibrated.json`` holds what measured steps say instead (``benchmarks/calibrate_presets.py``): figures of
devices and links by kind, which replace those of the files above. These stay what a new calibration starts from.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from meshwright import InputError

FOLDER = Path(__file__).parent / "presets" / "clusters"
DEVICE_FOLDER = Path(__file__).parent / "presets" / "devices"
LINK_FOLDER = Path(__file__).parent / "presets" / "links"
CALIBRATED = Path(__file__).parent / "presets" / "calibrated.json"

Owner = Literal["device", "link"]


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


def profile_tree(path: Path) -> dict[str, Any]:
    """The JSON of a ``ClusterProfile`` (without its schema version) composed of a preset and of the device it names.

    As many nodes as the outermost tier holds.
    """
    preset = _read(path)
    device = _read(DEVICE_FOLDER / f"{preset['device']}.json")
    device = _calibrated("device", device["kind"], device)
    size = preset["devices_per_node"]
    return {
        "artifact": "cluster",
        "name": preset["name"],
        "devices": [device],
        "node_groups": [
            {
                "device": device["kind"],
                "num_nodes": preset["tiers"][-1]["group_size"] // size,
                "devices_per_node": size,
            }
        ],
        "tiers": [
            _calibrated("link", tier["link"], _read(LINK_FOLDER / f"{tier['link']}.json"))
            | {"kind": tier["link"], "group_size": tier["group_size"]}
            for tier in preset["tiers"]
        ],
        "notes": preset["notes"],
    }


@cache
def _calibration() -> dict[str, Any]:
    return _read(CALIBRATED) if CALIBRATED.is_file() else {"source": {}, "device": {}, "link": {}}


def calibrated_figures() -> tuple[tuple[Owner, str, str, float], ...]:
    """What measured steps corrected: owner, its kind, the field and its value."""
    owners: tuple[Owner, ...] = ("device", "link")
    return tuple(
        (owner, kind, field, value)
        for owner in owners
        for kind, figures in _calibration()[owner].items()
        for field, value in figures.items()
    )


def uncalibrated_figure(owner: Owner, kind: str, field: str) -> float:
    """What a preset says of itself, before measured steps corrected it; factors that it does not name are 1."""
    paths = DEVICE_FOLDER.glob("*.json") if owner == "device" else [LINK_FOLDER / f"{kind}.json"]
    tree = next(tree for tree in map(_read, paths) if owner == "link" or tree["kind"] == kind)
    return float(tree.get(field, 1.0 if field.endswith("_factor") else 0.0))


def _calibrated(owner: Owner, kind: str, tree: dict[str, Any]) -> dict[str, Any]:
    """A device or a kind of links with what measured steps corrected, and with the source of that."""
    figures: dict[str, float] = dict(_calibration()[owner].get(kind, {}))
    if not figures:
        return tree
    sources = [each for each in tree.get("figure_sources", []) if each["field"] not in figures]
    sources += [{"field": field, "source": _calibration()["source"]} for field in figures]
    if "bytes_per_s" in figures:  # the share of each device keeps its relation to what a pair reaches
        share = tree["contended_bytes_per_s"] / tree["bytes_per_s"]
        figures["contended_bytes_per_s"] = figures["bytes_per_s"] * share
    return tree | figures | {"figure_sources": sources}


def _read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree


@cache
def _datasheet_peaks() -> dict[tuple[str, str], float]:
    """FLOP/s by (model as in a device's name, dtype), read from the presets' own files."""
    peaks = {}
    for path in sorted(DEVICE_FOLDER.glob("*.json")):
        device = _read(path)
        for curve in device["efficiencies"]:
            if curve["op"] == "matmul":
                peaks[device["kind"].partition("-")[0], curve["dtype"]] = float(curve["peak_flops_per_s"])
    return peaks


def datasheet_peak(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device by the name its driver gives (``NVIDIA H100 80GB HBM3``); None when no preset has it.

    PCIe and laptop cards of a model are not taken for the one in the presets.
    """
    words = set(device_name.replace("-", " ").split())
    if words & {"PCIe", "NVL", "Laptop", "D"}:
        return None
    return next(
        (peak for (model, of), peak in _datasheet_peaks().items() if set(model.split()) <= words and of == dtype), None
    )
