"""Fields of a foreign configuration, read by name; what is left over is held to account.

A field that changes the arithmetic is used or refused by name, never ignored.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any

from pocketslm.errors import CheckpointError

_LISTS = tomllib.loads(
    resources.files("pocketslm.models.architectures").joinpath("fields.toml").read_text("utf-8")
)
_HARMLESS, _HARMLESS_GGUF = (frozenset(_LISTS[n]) for n in ("harmless", "harmless_gguf"))
_ARITHMETIC: dict[str, list[Any]] = {
    name: _LISTS["neutral"].get(name, []) for name in [*_LISTS["arithmetic"], *_LISTS["neutral"]]
}


class Fields:
    """The fields of a configuration; each that is asked for counts as used.

    ``where`` names the file in messages, ``prefix`` stands before every key (GGUF's architecture).
    """

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix
        self.used: set[str] = set()
        self.notes: list[str] = []

    def __call__(self, name: str, default: Any = None) -> Any:
        """The field's value; ``default`` where it is absent or null."""
        self.used.add(name)
        value = self.data.get(self.prefix + name)
        return default if value is None else value

    def stated(self, name: str, default: Any) -> Any:
        """The field's value, null too; ``default`` only where the field is absent."""
        value = self(name)
        return value if self.prefix + name in self.data else default

    def but(self, **changes: Any) -> Fields:
        """The same fields with others in their place; what is read of them counts here too."""
        other = Fields({**self.data, **changes}, self.where, self.prefix)
        other.used, other.notes = self.used, self.notes
        return other

    def need(self, name: str) -> Any:
        """The field's value; CheckpointError where there is none."""
        value = self(name)
        if value is None:
            raise CheckpointError(
                f"{self.where} has no {self.prefix + name!r}; is this a decoder-only model?"
            )
        return value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.need(name) if default is None else self(name, default)
        return self.whole(value, name, least)

    def whole(self, value: Any, name: str, least: int = 1) -> int:
        """``value`` as an integer that a size may be."""
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise CheckpointError(
                f"{self.where}: {name} is {_short(value)}, expected an integer from {least} "
                "to 2147483647"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return self._number(name, self.need(name) if default is None else self(name, default))

    def epsilon(self, name: str, default: float) -> float:
        """The number that keeps norms from dividing by 0. Null is none, to transformers either."""
        return self._number(name, self.stated(name, default))

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise CheckpointError(f"{self.where}: {name} is {_short(value)}, expected a number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self(name, default)
        if not isinstance(value, bool) and value not in (0, 1):
            raise CheckpointError(
                f"{self.where}: {name} is {_short(value)}, expected true or false"
            )
        return bool(value)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.need(name) if default is None else self(name, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.where}: {name} is {_short(value)}, expected a text")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """A field that is an object; empty where it is absent."""
        value = self(name, {})
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.where}: {name} is {_short(value)}, expected an object")
        return dict(value)

    def numbers(self, value: Any, count: int, name: str) -> tuple[float, ...]:
        """``value`` as ``count`` positive numbers."""
        good = isinstance(value, list | tuple) and all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e30 for x in value
        )
        if not good or len(value) != count:
            raise CheckpointError(f"{self.where}: {name} is not a list of {count} positive numbers")
        return tuple(float(x) for x in value)

    def per_layer(self, name: str, layers: int, default: Any = None) -> list[Any]:
        """A field that is one value for all layers, or a list with one for each."""
        value = self(name, default)
        if isinstance(value, list | tuple):
            if len(value) != layers:
                raise CheckpointError(
                    f"{self.where}: {name} has {len(value)} entries, expected {layers}"
                )
            return list(value)
        return [value] * layers

    def settle(self) -> list[str]:
        """Refuses fields that change the arithmetic and were not used; names unknown ones."""
        unknown = []
        for name, value in self.data.items():
            if name in self.used or name in _HARMLESS or _empty(value):
                continue
            if name in _ARITHMETIC:
                if value in _ARITHMETIC[name]:
                    continue
                raise CheckpointError(
                    f"{self.where}: {name} is {_short(value)}, which "
                    f"{self.data.get('model_type', 'this architecture')} is not known to have; "
                    "it changes what the model computes and is not supported"
                )
            unknown.append(name)
        if unknown:
            names = ", ".join(sorted(unknown))
            self.notes.append(f"{self.where}: unknown fields were not used: {names}")
        return self.notes

    def settle_gguf(self) -> None:
        """The same for GGUF metadata: below the architecture's prefix, every key counts."""
        for key, value in self.data.items():
            name = key.removeprefix(self.prefix)
            if name == key or name in self.used or name in _HARMLESS_GGUF or _empty(value):
                continue
            raise CheckpointError(
                f"{self.where}: {key} is {_short(value)}, which this architecture is not known to "
                "have; it may change what the model computes and is not supported"
            )


def need_pattern(f: Fields, every: int, usual: int) -> None:
    """CheckpointError where layers are to repeat after ``every`` and the family has ``usual``."""
    if every != usual and f("layer_types") is None:
        raise CheckpointError(
            f"{f.where}: sliding_window_pattern is {every} without layer_types; transformers does "
            f"not read it in this family, which has {usual}"
        )


def layer_types(f: Fields, layers: int, pattern: list[str], known: Collection[str]) -> list[str]:
    """``layer_types``, or what the family's ``pattern`` says where the field is absent."""
    value = f("layer_types", pattern)
    right = isinstance(value, list) and len(value) == layers
    if not right or any(not isinstance(kind, str) or kind not in known for kind in value):
        raise CheckpointError(
            f"{f.where}: layer_types is {_short(value)}, expected a list of {layers} of "
            + ", ".join(known)
        )
    return list(value)


def _empty(value: Any) -> bool:
    return value is None or value is False or value in (0, "", [], {})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
