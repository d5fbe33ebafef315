"""Reading the fields of a Hugging Face config: right type and range, or one sentence naming the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from meshwright import InputError
from meshwright.profiler.layers import MAX_SIZE

MAX_LAYERS = 100_000


class Fields:
    """A config's fields, each under one or two names (``aliases``: ``n_embd`` for ``hidden_size``).

    ``where`` names the config in messages. Every getter takes the value that transformers' own config class fills in
    when the field is absent, and raises ``InputError`` when the field is there and wrong.
    """

    def __init__(self, config: Mapping[str, Any], *, where: str, aliases: Mapping[str, str] | None = None) -> None:
        self._config = config
        self._where = where
        self._aliases = aliases or {}

    def error(self, name: str, problem: str) -> InputError:
        """The error to raise about one field."""
        return InputError(f"{self._where}: {self._shown(name)}: {problem}")

    def size(self, name: str, default: int | None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer of at least ``least``; without a default (None) the field must be there."""
        value = self._get(name, default)
        if value is None:
            problem = "missing" if not self._is_there(name) else f"expected {_range(least, most)}, found null"
            raise self.error(name, problem)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"expected {_range(least, most)}, found {shorten(value)}")
        return value

    def optional_size(self, name: str, default: int | None) -> int | None:
        """An integer of at least 1, or null."""
        if self._get(name, default) is None:
            return None
        return self.size(name, default)

    def number(self, name: str, default: float) -> float:
        """A number that is not negative."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0.0 <= value < math.inf:
            raise self.error(name, f"expected a number of at least 0, found {shorten(value)}")
        return float(value)

    def flag(self, name: str, default: bool, *, null: bool | None = None) -> bool:
        """True or false; ``null`` is what null stands for, where it may be there."""
        value = self._get(name, default)
        if value is None and null is not None:
            return null
        if type(value) is not bool:
            raise self.error(name, f"expected true or false, found {shorten(value)}")
        return value

    def word(self, name: str, default: str) -> str:
        """A text that is not empty; ``default`` where it is absent."""
        value = self._get(name, default)
        if not isinstance(value, str) or not value:
            raise self.error(name, f"expected a word, found {shorten(value)}")
        return value

    def part(self, name: str) -> Mapping[str, Any]:
        """A config inside this one; empty where it is absent or null."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, f"expected an object, found {shorten(value)}")
        return value or {}

    def items(self, name: str, kind: type) -> list[Any] | None:
        """A list of values of one type, or None where it is absent or null."""
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or any(type(item) is not kind for item in value):
            raise self.error(name, f"expected a list of {kind.__name__}, found {shorten(value)}")
        return list(value)

    def num_layers(self, default: int) -> int:
        """``num_hidden_layers``, or ``default`` where it is absent; at most ``MAX_LAYERS``."""
        return self.size("num_hidden_layers", default, most=MAX_LAYERS)

    def head_dim(self, hidden: int, num_heads: int, default: int | None = None) -> int:
        """``head_dim``; absent it is ``default``, and without one (or null) ``hidden // num_heads``."""
        if default is not None:
            return self.size("head_dim", default)
        found = self.optional_size("head_dim", None)
        if found is None and hidden < num_heads:
            raise self.error("num_attention_heads", f"{num_heads} heads do not fit in hidden_size={hidden}")
        return found or hidden // num_heads

    def kv_heads(self, num_heads: int, default: int | None, *, nullable: bool = True) -> int:
        """``num_key_value_heads``: a divisor of the heads; null means as many as there are heads."""
        found = self.optional_size("num_key_value_heads", default) if nullable else None
        if found is None:
            found = num_heads if nullable else self.size("num_key_value_heads", default)
        if num_heads % found:
            raise self.error("num_key_value_heads", f"{found} does not divide num_attention_heads={num_heads}")
        return found

    def _is_there(self, name: str) -> bool:
        return name in self._config or self._aliases.get(name, name) in self._config

    def _shown(self, name: str) -> str:
        alias = self._aliases.get(name, name)
        return alias if alias in self._config and name not in self._config else name

    def _get(self, name: str, default: Any) -> Any:
        alias = self._aliases.get(name, name)
        there = [key for key in dict.fromkeys((name, alias)) if key in self._config]
        if len(there) == 2 and self._config[there[0]] != self._config[there[1]]:
            values = " and ".join(f"{key}={shorten(self._config[key])}" for key in there)
            raise self.error(name, f"two names of one field disagree: {values}")
        return self._config[there[0]] if there else default


def _range(least: int, most: int) -> str:
    return f"an integer from {least} to {most}"


def shorten(value: Any) -> str:
    """A value as JSON, cut to what fits into a sentence."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError, TypeError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
