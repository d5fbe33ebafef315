from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Literal

import pytest

from meshwright import InputError
from meshwright.profiler import artifact
from meshwright.profiler.record import record


@record
class Leaf:
    rate_bytes_per_s: float
    count: int = 0


@record
class Thing:
    artifact: Literal["thing"] = "thing"
    schema_version: int = 3
    name: str
    leaves: tuple[Leaf, ...]
    on: bool = False

    def __post_init__(self) -> None:
        if not self.leaves:
            raise InputError("a thing has leaves")


THING = Thing(name="gear ±", leaves=(Leaf(rate_bytes_per_s=1.5), Leaf(rate_bytes_per_s=2e9, count=7)))


def read(text: str | bytes) -> Thing:
    return artifact.loads(Thing, text, artifact="thing", schema_version=3, where="x.json")


def changed(**fields: object) -> str:
    return json.dumps(json.loads(artifact.to_json(THING)) | fields)


def test_what_is_saved_loads_equal(tmp_path: Path) -> None:
    path = tmp_path / "thing.json"
    artifact.save(THING, path)
    assert artifact.load(Thing, path, artifact="thing", schema_version=3) == THING
    assert path.read_text().endswith("}\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thing.json"], "no temporary file stays"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_digest_follows_content_and_not_what_is_left_out() -> None:
    other_name = Thing(name="other", leaves=THING.leaves)
    assert artifact.digest(THING) == artifact.digest(read(artifact.to_json(THING)))
    assert artifact.digest(THING) != artifact.digest(other_name)
    assert artifact.digest(THING, without=("name",)) == artifact.digest(other_name, without=("name",))
    assert artifact.digest(THING).startswith("sha256:") and len(artifact.digest(THING)) == 7 + 16


def test_digest_does_not_tell_a_whole_float_from_an_int() -> None:
    # a float field set to 5 in Python is 5 in memory, and 5.0 after a trip through a file
    built = Thing(name="a", leaves=(Leaf(rate_bytes_per_s=5),))
    assert artifact.digest(built) == artifact.digest(read(artifact.to_json(built)))


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifact.to_json(Leaf(rate_bytes_per_s=float("nan")))


BAD: list[tuple[str | bytes, str]] = [
    ("", "is empty"),
    ("  \n", "is empty"),
    ("{", "not valid JSON"),
    (b"\x00\xff\xfe\x80", "not UTF-8"),
    ('"word"', "expected a JSON object holding a thing"),
    ("[" * 100_000, "nested too deeply"),
    ("{}", "no field 'artifact'"),
    (changed(artifact="plan"), 'expected "artifact": "thing", found "plan"'),
    (changed(artifact=["thing"]), 'found \\["thing"\\]'),
    (changed(schema_version=4), "schema_version is 4, this meshwright reads 3"),
    (changed(schema_version=3.0), "schema_version is 3.0"),
    (changed(schema_version=True), "schema_version is true"),
    (changed(schema_version=None), "schema_version is null"),
    (changed(name=5), "name: input should be a valid string, found 5"),
    (changed(on=1), "on: input should be a valid boolean, found 1"),
    (changed(extra=1), "extra: unexpected keyword argument"),
    (changed(leaves=[]), "a thing has leaves"),
    (changed(leaves=[{"rate_bytes_per_s": "1"}]), "leaves.0.rate_bytes_per_s: input should be a valid number"),
    (changed(leaves=[{"rate_bytes_per_s": 1, "count": True}]), "leaves.0.count: input should be a valid integer"),
    (changed(leaves=[{"rate_bytes_per_s": 1, "count": 1.5}]), "leaves.0.count"),
    (changed(leaves=[{"rate_bytes_per_s": 1, "count": 2**63}]), "more than 64 bits"),
    (changed(leaves=[{"rate_bytes_per_s": 1, "count": 10**5000 // 10**1000}]), "more than 64 bits"),
    (changed(leaves=[{"rate_bytes_per_s": float("nan")}]), "NaN is not a finite number"),
    (changed(leaves=[{"rate_bytes_per_s": float("-inf")}]), "-Infinity is not a finite number"),
    (changed().replace("1.5", "1e999"), "1e999 is not a finite number"),
    (changed().replace('"on"', '"name": "a", "on"'), 'field "name" stands twice'),
    (changed(leaves=[{}] * 9), "leaves.0.rate_bytes_per_s: field required; .* and 6 more"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_bad_file_is_answered_with_one_sentence(text: str | bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        read(text)
    assert str(caught.value).startswith("x.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_cannot_be_read_or_written_is_said(tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("a\0b"), "null byte"),
    ]:
        with pytest.raises(InputError, match=rf"cannot read .*{reason}"):
            artifact.load(Thing, path, artifact="thing", schema_version=3)
    with pytest.raises(InputError, match=r"cannot write .*No such file"):
        artifact.save(THING, tmp_path / "no" / "thing.json")


def test_what_could_not_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    artifact.check_writable(tmp_path / "there.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"cannot write .*: Is a directory"):
        artifact.check_writable(tmp_path)
    with pytest.raises(InputError, match=r"cannot write .*: No such file or directory"):
        artifact.check_writable(tmp_path / "nowhere" / "there.json")


def test_schema_names_fields_and_forbids_others() -> None:
    schema = artifact.json_schema(Thing)
    assert schema["required"] == ["name", "leaves"]
    assert schema["additionalProperties"] is False
