"""Typed access to untrusted JSON, so that a wrong file is a `TokenizerError` and never a crash."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TypeVar, cast

from pocketslm.errors import TokenizerError

T = TypeVar("T")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MAX_DEPTH = 16
"""Nesting allowed for `Sequence` components; real files use two levels."""
MAX_GROWTH = 64
"""How many times as long as a text its steps may make it; real files reach 36."""
MAX_REPLACEMENT = 18
"""Characters of a replacement in a `Precompiled` table; the longest of NFKC, U+FDFA's, has 18."""


def parse_object(text: str, name: str) -> dict[str, object]:
    """The JSON object in `text`; `name` is the file that the error speaks of."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{name} is not valid JSON ({str(error) or type(error).__name__}); "
            "expected a JSON object as Hugging Face writes it; fetch or export the file again"
        ) from None
    if not isinstance(value, dict):
        raise TokenizerError(
            f"{name} holds a JSON {type(value).__name__}; expected an object; "
            "fetch or export the file again"
        )
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise TokenizerError(
                f"{name} holds a lone surrogate, which has no UTF-8 form; expected Unicode text; "
                "fetch or export the file again"
            ) from None
    return value


def field(node: Mapping[str, object], key: str, kind: type[T], where: str) -> T:
    """`node[key]`, which has to be a `kind` (a bool is not an int)."""
    value = node.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "is missing" if key not in node else f"is {type(value).__name__}"
        raise TokenizerError(
            f"tokenizer.json: {where}.{key} {found}; expected {kind.__name__}; "
            "fetch or export the file again"
        )
    return value


def optional(node: Mapping[str, object], key: str, kind: type[T], default: T, where: str) -> T:
    """Like `field`, with `default` where the key is absent or null."""
    return default if node.get(key) is None else field(node, key, kind, where)


def mapping(value: object, where: str) -> dict[str, object]:
    """`value`, which has to be a JSON object."""
    if not isinstance(value, dict):
        raise TokenizerError(
            f"tokenizer.json: {where} is {type(value).__name__}; expected an object; "
            "fetch or export the file again"
        )
    return cast("dict[str, object]", value)


def unsupported(where: str, found: object, known: tuple[str, ...] | list[str]) -> TokenizerError:
    """The error for a component that exists in the format but not here."""
    return TokenizerError(
        f"tokenizer.json: {where} {found!r} is not supported; supported: {', '.join(known)}; "
        "use a checkpoint with one of these, or implementation='tokenizers'"
    )


def components(node: object, where: str, key: str) -> list[dict[str, object]]:
    """A component flattened: null is [], a `Sequence` gives its members from `node[key]`.

    Together they may make a text at most `MAX_GROWTH` times as long.
    """
    flat = _flattened(node, where, key)
    growth = 1
    for component in flat:
        growth *= _growth(component)
        if growth > MAX_GROWTH:
            raise TokenizerError(
                f"tokenizer.json: {where} makes a text more than {MAX_GROWTH} times as long; "
                "expected one ByteLevel and short replacements; fetch or export the file again"
            )
    return flat


def _growth(component: Mapping[str, object]) -> int:
    """How many times as long a component may make a text, where its file decides that."""
    if component["type"] == "ByteLevel":
        return 4  # the bytes of a character
    if component["type"] == "Precompiled":
        return MAX_REPLACEMENT
    content, pattern = component.get("content"), component.get("pattern")
    if component["type"] != "Replace" or not isinstance(content, str):
        return 1
    old = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(old, str) and old:
        return max(1, -(-len(content) // len(old)))
    return 1 + len(content)  # of what may be found anywhere


def _flattened(node: object, where: str, key: str, depth: int = 0) -> list[dict[str, object]]:
    if node is None:
        return []
    if depth > MAX_DEPTH:
        raise TokenizerError(
            f"tokenizer.json: {where} nests deeper than {MAX_DEPTH} sequences; "
            "expected a flat list; fetch or export the file again"
        )
    component = mapping(node, where)
    if component.get("type") != "Sequence":
        field(component, "type", str, where)
        return [component]
    flat = []
    for index, member in enumerate(field(component, key, list, where)):
        flat += _flattened(member, f"{where}[{index}]", key, depth + 1)
    return flat
