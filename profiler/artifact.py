"""The JSON edge: how artifacts (cluster, plan, measurement ...) are written, read, digested and described.

An artifact is a record with the fields ``artifact`` (its kind, a fixed word) and ``schema_version`` (an integer).
Writing and digesting walk the records themselves; pydantic, slow to import, is needed only to check what is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from meshwright import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

MAX_PROBLEMS_SHOWN = 3


@cache
def _adapter(record_type: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(record_type)


def _adapter_of(record_type: Any) -> TypeAdapter[Any]:
    return _adapter(record_type)  # checkers do not know that classes are hashable


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text of a record (SI units, tuples as arrays, enums as their words).

    Raises ``ValueError`` for a NaN or an infinity: JSON has neither, and no record should hold one.
    """
    return json.dumps(_tree(value), indent=indent, ensure_ascii=False, allow_nan=False)


def digest(value: Any, *, without: tuple[str, ...] = ()) -> str:
    """A short fingerprint of a record's content, equal on every machine: ``sha256:`` and 16 hex digits.

    ``without`` names top-level fields that do not belong to the identity (a date, a name). A whole number counts the
    same as an int and as a float, so that a record and its copy read back from a file agree.
    """
    tree = _tree(value)
    for name in without:
        tree.pop(name, None)
    canonical = json.dumps(_whole_numbers_as_int(tree), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _tree(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _tree(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [_tree(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value


def _whole_numbers_as_int(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _whole_numbers_as_int(item) for name, item in tree.items()}
    if isinstance(tree, list):
        return [_whole_numbers_as_int(item) for item in tree]
    return int(tree) if isinstance(tree, float) and tree.is_integer() else tree


def save(value: Any, path: str | Path) -> None:
    """Write an artifact as JSON, whole or not at all (a temporary file beside it, then a rename).

    Raises ``InputError`` when the folder does not exist or cannot be written.
    """
    path = Path(path)
    text = to_json(value) + "\n"
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; an artifact is for colleagues too
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: str | Path) -> None:
    """Say before long work, not after it, that its result could not be saved: raises ``InputError`` as ``save``."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def kind_of(path: str | Path) -> str:
    """The kind of artifact that a file says it holds. Raises ``InputError`` when it is unreadable or says none."""
    tree = _parse(_read(Path(path)), str(path))
    if not isinstance(tree, dict) or not isinstance(tree.get("artifact"), str):
        raise InputError(f"{path} holds no artifact: expected a JSON object with a field 'artifact'")
    return str(tree["artifact"])


def load(record_type: type[T], path: str | Path, *, artifact: str, schema_version: int) -> T:
    """Read an artifact from a JSON file, or say in one sentence why not.

    Raises:
        InputError: the file is missing, unreadable, not JSON, of another kind or version, or has a wrong field;
            the message names the file, the field, what was expected and what was found.
    """
    return loads(record_type, _read(Path(path)), artifact=artifact, schema_version=schema_version, where=str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # a name that no file can have
        raise InputError(f"cannot read {str(path)!r}: {error}") from None


def loads(record_type: type[T], text: str | bytes, *, artifact: str, schema_version: int, where: str) -> T:
    """Read an artifact from JSON text; ``where`` names its origin in error messages. Raises as ``load`` does."""
    from pydantic import ValidationError

    tree = _parse(text, where)
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected a JSON object holding a {artifact}, found {_short(tree)}")
    if tree.get("artifact") != artifact:
        found = _short(tree["artifact"]) if "artifact" in tree else "no field 'artifact'"
        raise InputError(f'{where} is not a {artifact} file: expected "artifact": "{artifact}", found {found}')
    version = tree.get("schema_version")
    if version != schema_version or type(version) is not int:
        raise InputError(
            f"{where}: schema_version is {_short(version)}, this meshwright reads {schema_version}; "
            f"make the {artifact} again with this version, or use the version that wrote it"
        )
    try:
        value: T = _adapter_of(record_type).validate_json(text, strict=True)
        return value
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        shown = "; ".join(_problem(problem) for problem in problems[:MAX_PROBLEMS_SHOWN])
        more = f"; and {len(problems) - MAX_PROBLEMS_SHOWN} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        raise InputError(f"{where}: {shown}{more}") from None


def _parse(text: str | bytes, where: str) -> Any:
    """JSON as the standard has it: no NaN, no field twice (the last would win in silence), integers of 64 bits."""
    if not text.strip():
        raise InputError(f"{where} is empty")
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(
            decoded, object_pairs_hook=_object, parse_int=_int64, parse_float=_finite, parse_constant=_finite
        )
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not a text file: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {_short(twice)} stands twice in one object")
    return tree


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"integer {digits[:20]}{'...' if len(digits) > 20 else ''} has more than 64 bits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is not a finite number")
    return value


def json_schema(record_type: type[Any]) -> dict[str, Any]:
    """The published JSON Schema of an artifact."""
    return _adapter_of(record_type).json_schema()


def _problem(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "the top level"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if problem["type"] == "missing":
        return f"{field}: {message}"
    return f"{field}: {message}, found {_short(problem['input'])}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
