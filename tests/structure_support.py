"""Schemas, values and texts by chance, for the tests of constrained decoding."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocketslm.errors import UsageError
from pocketslm.runtime.constraint import Constraint, TokenTexts

END = 256  # the token that ends a text
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4")
PATTERNS = (
    "^[a-z]+$",
    "^[A-Z]{2}-[0-9]{1,4}$",
    "ab",
    "^(red|green|blue)( light)?$",
    "^x|y$",
    "^\\d{3}",
    "^[^ ]*$",
    "^.{2,4}$",
    '^["\\\\a\n]{1,3}$',
    "^\\S+\\s\\S+$",
)
NAMES = ("name", "age", "a", "ab", "tags", "x-1", "größe", 'q"t', "note", "value")


def byte_texts() -> TokenTexts:
    """A vocabulary of all bytes and an end."""
    return TokenTexts([*(bytes([byte]) for byte in range(256)), b""], [END])


def usual_pieces() -> list[bytes]:
    """The bytes of each token: single ones, the end, and some across the borders of JSON."""
    rng = random.Random(5)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(300)]
    usual = ['": "', '": ', '", "', '"}', '"},', "],", "]]", "}}", '{"', '["', "[[", "\\n", '\\"']
    usual += [
        "true",
        "false",
        "null",
        " null",
        ", ",
        ": ",
        "\n  ",
        "\n    ",
        "00",
        "12",
        "-",
        "0.",
        ".5",
    ]
    usual += [f" {word}" for word in words[:100]] + [f'{word}"' for word in words[:50]] + words
    usual += [
        "2024-",
        "-02-",
        "@example",
        ".com",
        "T12",
        ":30",
        "Z",
        "é",
        "größe",
        "日本",
        "日本語",
    ]
    texts = [text.encode() for text in dict.fromkeys(usual)]
    texts += ["語".encode()[:2], "日本".encode()[1:], "é".encode()[1:] + b"a"]
    return [*(bytes([byte]) for byte in range(256)), b"", *texts]


def accepts(constraint: Constraint, text: str | bytes) -> bool:
    """Whether the text is whole, read byte by byte."""
    constraint.restart()
    try:
        for byte in text.encode() if isinstance(text, str) else text:
            constraint.advance(byte)
    except UsageError:
        return False
    return constraint.may_end


def write_by_chance(
    constraint: Constraint, pieces: Sequence[bytes], rng: random.Random, steps: int = 400
) -> bytes | None:
    """A whole text of tokens that were allowed, chosen by chance; None if it took too long.

    Later steps prefer what closes, so that most texts come to an end.
    """
    constraint.restart()
    out = b""
    for step in range(steps):
        allowed = np.flatnonzero(constraint.allowed()).tolist()
        assert allowed, out
        closing = [t for t in allowed if t == END or (pieces[t] and pieces[t][:1] in b'"]}')]
        whole = END in closing
        chosen = rng.choice(allowed)
        if step > 25 and closing and rng.random() < 0.7:
            chosen = END if whole else rng.choice(closing)
        if chosen == END:
            return out
        constraint.advance(chosen)
        out += pieces[chosen]
        if constraint.must_end:
            return out
    return None


class SchemaMaker:
    """Schemas of the supported keywords, by chance."""

    def __init__(self, seed: int, *, formats: bool = True) -> None:
        self.rng = random.Random(seed)
        self.formats = formats
        self.defs: dict[str, Any] = {}

    def make(self) -> Any:
        schema = self.schema(0)
        if self.rng.random() < 0.15:
            schema = self.recursive()
        if isinstance(schema, dict) and self.defs:
            schema = {**schema, "$defs": self.defs}
        return schema

    def recursive(self) -> dict[str, Any]:
        own = {"value": self.schema(2), "next": {"$ref": "#/$defs/node"}}
        if self.rng.random() < 0.5:
            own["next"] = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3}
        self.defs["node"] = {
            "type": "object",
            "properties": own,
            "required": ["value"],
            "additionalProperties": False,
        }
        return {"$ref": "#/$defs/node"}

    def schema(self, depth: int) -> Any:
        rng = self.rng
        kinds = [self.string, self.integer, self.number, self.boolean, self.enum, self.const]
        if depth < 3:
            kinds += [self.object, self.object, self.array, self.array, self.any_of, self.one_of]
            kinds += [self.reference, self.all_of, self.several]
        if depth == 0 and rng.random() < 0.7:
            return self.object(0)
        return rng.choice(kinds)(depth)

    def bound(self) -> float | int:
        rng = self.rng
        choice = rng.random()
        if choice < 0.5:
            return rng.randint(-120, 120)
        if choice < 0.7:
            return rng.randint(-(10**6), 10**6)
        return round(rng.uniform(-50, 50), rng.randint(1, 4))

    def bounds(self, schema: dict[str, Any], *, whole: bool) -> dict[str, Any]:
        rng = self.rng
        low, high = sorted((self.bound(), self.bound()))
        high += 2 if whole else 0.5
        if rng.random() < 0.5:
            schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
        if rng.random() < 0.5:
            schema[rng.choice(["maximum", "exclusiveMaximum"])] = high
        return schema

    def integer(self, depth: int) -> dict[str, Any]:
        return self.bounds({"type": "integer"}, whole=True)

    def number(self, depth: int) -> dict[str, Any]:
        return self.bounds({"type": "number"}, whole=False)

    def boolean(self, depth: int) -> dict[str, Any]:
        return {"type": self.rng.choice(["boolean", "null"])}

    def string(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        schema: dict[str, Any] = {"type": "string"}
        choice = rng.random()
        if choice < 0.25:
            schema["pattern"] = rng.choice(PATTERNS)
            if rng.random() < 0.3:
                schema["maxLength"] = rng.randint(8, 12)
        elif choice < 0.4 and self.formats:
            schema["format"] = rng.choice(FORMATS)
        else:
            low = rng.randint(0, 4)
            if rng.random() < 0.4:
                schema["minLength"] = low
            if rng.random() < 0.4:
                schema["maxLength"] = low + rng.randint(0, 20)
        return schema

    def value(self) -> Any:
        rng = self.rng
        return rng.choice(
            [
                None,
                True,
                False,
                0,
                -7,
                1.5,
                12345,
                "",
                "red",
                "größe",
                'a"b\\',
                "\n",
                [1, "x"],
                {"k": []},
            ]
        )

    def enum(self, depth: int) -> dict[str, Any]:
        values = [self.value() for _ in range(self.rng.randint(1, 5))]
        return {"enum": [v for i, v in enumerate(values) if v not in values[:i]]}

    def const(self, depth: int) -> dict[str, Any]:
        return {"const": self.value()}

    def object(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        names = rng.sample(NAMES, rng.randint(0, 4))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth + 1) for name in names},
        }
        required = [name for name in names if rng.random() < 0.6]
        if required:
            schema["required"] = required
        choice = rng.random()
        if choice < 0.6:
            schema["additionalProperties"] = False
        elif choice < 0.8:
            schema["additionalProperties"] = self.schema(3)
        return schema

    def array(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth + 1)}
        low = rng.randint(0, 3)
        if rng.random() < 0.5:
            schema["minItems"] = low
        if rng.random() < 0.6:
            schema["maxItems"] = low + rng.randint(0, 3)
        if rng.random() < 0.2:
            schema["prefixItems"] = [self.schema(3) for _ in range(rng.randint(1, 2))]
        return schema

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth + 1) for _ in range(self.rng.randint(1, 3))]}

    def one_of(self, depth: int) -> dict[str, Any]:
        kinds = [self.string, self.integer, self.boolean, self.array]
        chosen = self.rng.sample(kinds, 2)
        return {"oneOf": [kind(depth + 1) for kind in chosen]}

    def all_of(self, depth: int) -> dict[str, Any]:
        first, second = self.object(2), self.object(2)
        first.pop("additionalProperties", None)
        second.pop("additionalProperties", None)
        return {"allOf": [first, second]}

    def several(self, depth: int) -> dict[str, Any]:
        schema = self.bounds({"type": ["integer", "string", "null"]}, whole=True)
        return {**schema, "maxLength": self.rng.randint(0, 9)}

    def reference(self, depth: int) -> dict[str, Any]:
        name = f"d{len(self.defs)}/~"
        self.defs[name] = True  # its place
        self.defs[name] = self.schema(depth + 1)
        pointer = name.replace("~", "~0").replace("/", "~1")
        return {"$ref": f"#/$defs/{pointer}"}


def changed(value: Any, rng: random.Random) -> Any:
    """The value with something in it changed, added or taken away; members keep their order."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        out = dict(value)
        choice = rng.random()
        if choice < 0.25:
            del out[name]
        elif choice < 0.4:
            out["other"] = 1
        else:
            out[name] = changed(value[name], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        choice = rng.random()
        if choice < 0.25:
            return value[:at] + value[at + 1 :]
        if choice < 0.4:
            return [*value, value[at]]
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    if isinstance(value, bool) or value is None:
        return rng.choice([True, False, None, 0])
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 10, str(value), 0])
    if isinstance(value, float):
        return rng.choice([round(value + 0.5, 6), -value, round(value / 3, 6), 0])
    if isinstance(value, str):
        return rng.choice([value + "z", value[:-1], "", value.upper(), value + "é", 3, "red"])
    return rng.choice([{}, [], {"a": 1}, [0], "x", 0])


def simple(value: Any) -> bool:
    """Whether every number of a value is written in few digits, by our writer and by Python."""
    if isinstance(value, dict):
        return all(map(simple, value.values()))
    if isinstance(value, list):
        return all(map(simple, value))
    if isinstance(value, float):
        text = json.dumps(value)
        return "e" not in text and len(text) <= 15 and not text.endswith(".0")
    return not isinstance(value, int) or abs(value) < 10**15
