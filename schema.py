"""JSON as our files have it: read strictly, and checked against the types of a dataclass."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_MOST = 2**64 - 1
_NAMES = {
    str: "a text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    type(None): "null",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


def loads(text: str) -> Any:
    """JSON without keys that stand twice, NaN, infinity or integers beyond 64 bits; ValueError says
    what is wrong."""
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def build(kind: Any, data: Any, name: str = "") -> Any:
    """``data`` of JSON or TOML as the type ``kind``: a dataclass, or what its fields may be.

    Lists become tuples where the type says so. Raises ValueError that names the field, by its path,
    which is missing, unknown or of another type.
    """
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _build_dataclass(kind, data, name)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (kind,) = (one for one in arguments if one is not type(None))
        return build(kind, data, name)
    if origin is Literal:
        if not (isinstance(data, str) and data in arguments):
            raise ValueError(f"{name} is {data!r:.80}, expected one of {', '.join(arguments)}")
        return data
    if origin in (list, tuple):
        items = _of(origin, data, name)
        return origin(build(arguments[0], item, name) for item in items)
    if origin in (dict, Mapping):
        _, value = arguments
        found = _of(dict, data, name)
        return {key: build(value, item, f"{name}.{key}") for key, item in found.items()}
    return _of(kind, data, name)


def _build_dataclass(kind: Any, data: Any, name: str) -> Any:
    _of(dict, data, name or kind.__name__.lower())
    at = f"{name}." if name else ""
    hints, known = _hints(kind), {one.name: one for one in fields(kind)}
    if unknown := sorted(data.keys() - known.keys()):
        raise ValueError(f"{at}{unknown[0]} is unknown, expected some of {', '.join(known)}")
    for one in known.values():
        required = one.default is MISSING and one.default_factory is MISSING
        if required and one.name not in data:
            raise ValueError(f"{at}{one.name} is missing")
    return kind(**{key: build(hints[key], data[key], f"{at}{key}") for key in known if key in data})


def _of(kind: type, data: Any, name: str) -> Any:
    """``data`` if it is of a plain type; no bool is a number, and a whole number is a float too."""
    allowed = {float: (int, float), tuple: (list, tuple)}.get(kind, (kind,))
    right = isinstance(data, allowed) and (kind is bool or not isinstance(data, bool))
    if isinstance(data, int | float):
        right = right and -_MOST <= data <= _MOST  # no NaN is
    if not right:
        raise ValueError(f"{name} is {data!r:.80}, expected {_NAMES[kind]}")
    return data


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} stands twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > len(str(_MOST)) or abs(int(text)) > _MOST:
        raise ValueError(f"{text:.40} is beyond 64 bits")
    return int(text)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
