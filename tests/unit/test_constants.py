"""Every fitted constant, with the device, the kind of links or the target that it belongs to: 12 at most of each."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from meshwright import InputError
from meshwright.cost_models import published_fit
from meshwright.cost_models.constants import (
    BY_HAND,
    BY_NAME,
    CONSTANTS,
    Value,
    as_calibrated,
    on_cluster,
    on_framework,
    value_on,
)
from meshwright.cost_models.framework import Framework, HostCost
from meshwright.cost_models.operators import UNALIGNED
from meshwright.cost_models.targets import ASSUMED, CALIBRATED, FRAMEWORKS, framework_named
from meshwright.profiler.cluster import CalibratedConstant, Device, LinkTier, Provenance, Source, load_preset
from meshwright.profiler.cluster_presets import (
    DEVICE_FOLDER,
    LINK_FOLDER,
    calibrated_figures,
    preset_names,
    uncalibrated_figure,
)

MOST = 12


def fitted_of_targets() -> dict[str, dict[str, float]]:
    """By target: its own constants; versions share those of their target."""
    tree = json.loads(CALIBRATED.read_text(encoding="utf-8"))
    return {target: dict(entry["values"]) for target, entry in tree.items()}


def fitted_of_machines() -> dict[tuple[str, str], dict[str, float]]:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for owner, kind, name, value in calibrated_figures():
        found.setdefault((owner, kind), {})[name] = value
    return found


def devices() -> set[str]:
    return {json.loads(path.read_text(encoding="utf-8"))["kind"] for path in DEVICE_FOLDER.glob("*.json")}


def test_every_target_has_at_most_twelve_constants_and_they_are_the_targets() -> None:
    for target, values in fitted_of_targets().items():
        assert target in ASSUMED
        assert 0 < len(values) <= MOST, target
        assert set(values) <= {each.name for each in CONSTANTS if each.owner == "target"}
        assert set(values) <= set(published_fit.TARGET[target])
        for name, value in values.items():
            assert value_on("target", name, FRAMEWORKS[target]) == value  # and it is what predictions use
        assert FRAMEWORKS[target].calibrated_on
    assert all(len(names) <= MOST for names in published_fit.TARGET.values())


def test_a_version_shares_but_for_what_its_record_names() -> None:
    fitted = fitted_of_targets()
    versions = [target for target in FRAMEWORKS.values() if target.version_of]
    assert len(versions) >= 5
    for version in versions:
        assert len(version.differs_in) <= 4
        assert set(fitted.get(version.name, {})) <= set(version.differs_in)  # no other constants of its own
        for name, value in fitted.get(version.version_of, {}).items():
            if name not in version.differs_in:
                assert value_on("target", name, version) == value, (version.name, name)


def test_every_device_and_every_kind_of_links_has_at_most_twelve_constants() -> None:
    links = {path.stem for path in LINK_FOLDER.glob("*.json")}
    for (owner, kind), values in fitted_of_machines().items():
        assert kind in (devices() if owner == "device" else links)
        assert 0 < len(values) <= MOST
        assert set(values) <= set(published_fit.DEVICE if owner == "device" else published_fit.LINK)
        for name in values:
            assert BY_NAME[owner, name].lower <= values[name] <= BY_NAME[owner, name].upper


def test_calibrated_presets_say_so_and_keep_what_they_started_from() -> None:
    fitted = fitted_of_machines()
    for name in preset_names():
        cluster = load_preset(f"{name}:2")
        records: list[tuple[str, Device | LinkTier]] = [("device", cluster.device)]
        records += [("link", tier) for tier in cluster.tiers]
        for owner, record in records:
            sources = {each.field: each.source for each in record.figure_sources}
            for field, value in fitted.get((owner, record.kind), {}).items():
                assert getattr(record, field) == value
                assert sources[field].provenance is Provenance.MEASURED
                assert "benchmarks/calibrate_presets.py" in sources[field].reference
    assert uncalibrated_figure("device", "A100-SXM4-80GB", "matmul_factor") == 1.0
    assert uncalibrated_figure("link", "ib-8x200", "bytes_per_s") == 24e9


def test_no_constant_is_keyed_by_a_model_a_family_or_a_run() -> None:
    owners = {"device": devices(), "link": {path.stem for path in LINK_FOLDER.glob("*.json")}, "target": set(ASSUMED)}
    keys = [("target", target) for target in fitted_of_targets()] + list(fitted_of_machines())
    assert all(kind in owners[owner] for owner, kind in keys)
    assert {each.owner for each in CONSTANTS} == set(owners)
    for constant in CONSTANTS:  # each is a field of a record that knows neither
        holder = {"device": Device, "link": LinkTier, "target": Framework}[constant.owner]
        name = constant.name
        if name.startswith("host."):
            holder, name = HostCost, name.removeprefix("host.")
        assert name in {field.name for field in fields(holder)}, constant.name
        assert 0 <= constant.lower < constant.upper
        assert constant.spread > 1


def test_values_reach_the_records_they_name() -> None:
    cluster = load_preset("h100-sxm:2")
    values = (
        Value(owner="device", of=cluster.device.kind, name="matmul_factor", value=1.5),
        Value(owner="device", of="another", name="matmul_factor", value=9.0),
        Value(owner="link", of="ib-8x400", name="bytes_per_s", value=cluster.tiers[1].bytes_per_s / 2),
        Value(owner="target", of="torchtitan", name="host.step_s", value=0.25),
        Value(owner="target", of="torchtitan", name="overlap_tp", value=0.5),
    )
    changed = on_cluster(cluster, values)
    assert changed.device.matmul_factor == 1.5
    assert changed.tiers[1].contended_bytes_per_s == pytest.approx(cluster.tiers[1].contended_bytes_per_s / 2)
    assert changed.tiers[0] == cluster.tiers[0]
    assert on_framework(framework_named("torchtitan"), values).host.step_s == 0.25
    version = on_framework(framework_named("torchtitan-async-tp"), values)
    assert version.host.step_s == 0.25  # shared
    assert version.overlap_tp == framework_named("torchtitan-async-tp").overlap_tp  # its own
    assert on_framework(framework_named("deepspeed"), values) == framework_named("deepspeed")


def test_a_calibrated_cluster_changes_itself_and_the_target() -> None:
    cluster, target = load_preset("h100-sxm"), framework_named("meshwright")
    source = Source(provenance=Provenance.MEASURED, reference="3 steps of 1 plan: meshwright calibrate")
    constants = tuple(
        CalibratedConstant(owner=owner, of=of, name=name, value=value, source=source)  # type: ignore[arg-type]
        for owner, of, name, value in (
            ("device", cluster.device.kind, "memory_factor", 1.4),
            ("target", "meshwright", "host.launch_factor", 6.0),
        )
    )
    assert as_calibrated(cluster, target) == (cluster, target)
    there, changed = as_calibrated(replace(cluster, calibrated=constants), target)
    assert (there.device.memory_factor, changed.host.launch_factor) == (1.4, 6.0)


def test_an_unknown_constant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown constant 'speed' of a device: expected one of matmul_factor, "):
        _ = Value(owner="device", of="x", name="speed", value=1.0).constant


def test_constants_read_off_by_hand_stand_in_the_code_and_count_among_the_twelve() -> None:
    assert next(each.value for each in BY_HAND if each.name == "operators.UNALIGNED") == UNALIGNED
    fitted, machines = fitted_of_targets(), fitted_of_machines()
    for each in BY_HAND:
        if each.owner == "target":
            target = FRAMEWORKS[each.of]
            assert value_on("target", each.name, target) == each.value
            own = {*fitted.get(target.version_of, {}), *fitted.get(each.of, {})}
            own |= {other.name for other in BY_HAND if other.of == each.of}
            assert len(own) <= MOST, each.of
    by_device = [len(names) for (owner, _), names in machines.items() if owner == "device"]
    assert max(by_device) + sum(each.owner == "device" for each in BY_HAND) <= MOST
