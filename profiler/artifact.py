"""The JSON edge: how artifacts (cluster, plan, measurement ...) are written, read, digested and described.

An artifact is a record with the fields ``artifact`` (its kind, a fixed word) and ``schema_version`` (an integer).
pydantic is imported here, and only when a file is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
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


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text of a record (SI units, tuples as arrays, enums as their words)."""
    return _adapter(type(value)).dump_json(value, indent=indent).decode()


def digest(value: Any, *, without: tuple[str, ...] = ()) -> str:
    """A short fingerprint of a record's content, equal on every machine: ``sha256:`` and 16 hex digits.

    ``without`` names top-level fields that do not belong to the identity (a date, a name).
    """
    tree = json.loads(_adapter(type(value)).dump_json(value))
    for name in without:
        tree.pop(name, None)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    return "sha256:" + hashlib.sha256(canonical).hexdigest()[:16]


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


def load(record_type: type[T], path: str | Path, *, artifact: str, schema_version: int) -> T:
    """Read an artifact from a JSON file, or say in one sentence why not.

    Raises:
        InputError: the file is missing, unreadable, not JSON, of another kind or version, or has a wrong field;
            the message names the file, the field, what was expected and what was found.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return loads(record_type, text, artifact=artifact, schema_version=schema_version, where=str(path))


def loads(record_type: type[T], text: str | bytes, *, artifact: str, schema_version: int, where: str) -> T:
    """Read an artifact from JSON text; ``where`` names its origin in error messages. Raises as ``load`` does."""
    from pydantic import ValidationError

    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected a JSON object holding a {artifact}, found {_short(tree)}")
    if tree.get("artifact") != artifact:
        found = _short(tree["artifact"]) if "artifact" in tree else "no field 'artifact'"
        raise InputError(f'{where} is not a {artifact} file: expected "artifact": "{artifact}", found {found}')
    version = tree.get("schema_version")
    if version != schema_version or isinstance(version, bool):
        raise InputError(
            f"{where}: schema_version is {_short(version)}, this meshwright reads {schema_version}; "
            f"make the {artifact} again with this version, or use the version that wrote it"
        )
    try:
        value: T = _adapter(record_type).validate_json(text, strict=True)
        return value
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        shown = "; ".join(_problem(problem) for problem in problems[:MAX_PROBLEMS_SHOWN])
        more = f"; and {len(problems) - MAX_PROBLEMS_SHOWN} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        raise InputError(f"{where}: {shown}{more}") from None


def json_schema(record_type: type[Any]) -> dict[str, Any]:
    """The published JSON Schema of an artifact."""
    return _adapter(record_type).json_schema()


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
