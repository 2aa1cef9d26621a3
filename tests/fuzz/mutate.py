"""Changes of an input: each takes bytes and a source of chance, and gives other bytes."""

from __future__ import annotations

import copy
import functools
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]
MAX_BYTES = 200_000  # of what a change may grow to

# Whole numbers and floats that programs forget.
WHOLE = (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 255, 256, 2**15, 2**16 - 1)
LARGE = (2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 64, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, -0.0, -1.0, 0.0, 1e-9, 65504.0)
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.5, 1e308, float("nan"), float("inf"), 1e-320),
    *(2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30, -(2**63), "", "x", "0", "é\U0001f642"),
    *("\0", "\ud800", "../x", "a\nb", "\x1b[31m", "%s{0}{{x}}", [], {}, [[]], [None], [0, -1]),
    *({"": {}}, {"x": [1]}, ["a", "b", "c"], [1e999, "nan"], "true", "none", "1" * 400),
)


def binary(data: bytes, rng: Random, end: int | None = None) -> bytes:
    """Up to four changes of bytes, half of them of the first ``end``."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        size = len(changed)
        if not size:
            break
        limit = min(end, size) if end and rng.random() < 0.5 else size
        at = rng.randrange(limit)
        match rng.randrange(10):
            case 0 | 1 | 2:
                changed[at] = rng.choice(
                    (0, 1, 16, 64, 127, 128, 255, changed[at] ^ 1 << rng.randrange(8))
                )
            case 3 | 4 | 5:
                at &= ~3
                word = number(rng)
                changed[at : at + len(word)] = word
            case 6:
                other = rng.randrange(size)
                length = rng.randint(1, 32)
                changed[at : at + length] = changed[other : other + length]
            case 7:
                del changed[at : at + rng.choice((1, 2, 4, 8, 64))]
            case 8:
                length = rng.choice((1, 4, 8, 64))
                changed[at:at] = changed[at : at + length]
            case 9:
                if rng.random() < 0.3:
                    del changed[at:]
    return bytes(changed[:MAX_BYTES])


def number(rng: Random) -> bytes:
    """A number of 1 to 8 bytes, little-endian."""
    match rng.randrange(4):
        case 0:
            return struct.pack(rng.choice(("<f", "<d")), rng.choice(FLOATS))
        case 1:
            return struct.pack("<e", rng.choice((float("nan"), float("inf"), 65504.0, 6e-8)))
        case 2:
            return (rng.choice(LARGE) % 2**64).to_bytes(8, "little")[: rng.choice((4, 8))]
        case _:
            return rng.choice(WHOLE).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]


def text(data: bytes, rng: Random, words: Sequence[str] = ()) -> bytes:
    """Up to four changes of text: words put in, pieces taken out, moved or repeated."""
    changed = data.decode("utf-8", "replace")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        end = at + rng.choice((1, 1, 2, 5, 20, 80))
        match rng.randrange(8):
            case 0 | 1 | 2 if words:
                changed = changed[:at] + rng.choice(words) + changed[at:]
            case 3:
                changed = changed[:at] + changed[end:]
            case 4:
                times = rng.choice((2, 3, 10, 100))
                changed = changed[:at] + changed[at:end] * times + changed[end:]
            case 5:
                piece = changed[at:end]
                other = rng.randrange(len(changed) + 1)
                changed = changed[:other] + piece + changed[other:]
            case 6 if words:
                changed = changed[:at] + rng.choice(words) + changed[end:]
            case _:
                changed = (
                    changed[:at]
                    + chr(
                        rng.choice(
                            (
                                0,
                                9,
                                10,
                                13,
                                27,
                                34,
                                39,
                                60,
                                92,
                                123,
                                0x85,
                                0x2028,
                                0xFEFF,
                                0x1F642,
                                rng.randrange(32, 127),
                            )
                        )
                    )
                    + changed[at + 1 :]
                )
        changed = changed[:MAX_BYTES]
    return changed.encode("utf-8", "replace")


@functools.lru_cache(64)
def _parsed(data: bytes) -> Any:
    return json.loads(data)


def json_tree(data: bytes, rng: Random) -> bytes:
    """Up to three changes of a JSON tree; sometimes of its text, or its bytes."""
    if rng.random() < 0.1:
        return text(
            data, rng, ('"', "{", "}", "[", "]", ",", ":", "null", "1e999", "\\u", "NaN", "[[[[")
        )
    try:
        root = copy.deepcopy(_parsed(data))
    except (ValueError, RecursionError):
        return text(data, rng)
    for _ in range(rng.randint(1, 3)):
        root = _changed(root, rng, 0)
    try:
        return json.dumps(root, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except RecursionError:
        return data


def _changed(node: Any, rng: Random, depth: int) -> Any:
    """The node with one change in it or of it."""
    if isinstance(node, dict | list) and node and (depth == 0 or rng.random() < 0.75):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice(keys)
        action = rng.random()
        if action < 0.6 + 0.3 * isinstance(node[key], dict | list):
            node[key] = _changed(node[key], rng, depth + 1)
        elif action < 0.8:
            del node[key]
        elif isinstance(node, dict):
            other = rng.choice(keys) if rng.random() < 0.7 else str(rng.choice(STRANGE))
            node[other] = copy.deepcopy(node[key])
        else:
            node[key:key] = [copy.deepcopy(node[key])] * rng.choice((1, 2, 5, 50))
        return node
    match node, rng.randrange(6):
        case str(), 0:
            return node + rng.choice(("x", " ", "\n", "\0", node, "é", "\ud83d"))
        case str(), 1:
            return node[: rng.randrange(len(node) + 1)]
        case bool(), _:
            return copy.deepcopy(rng.choice(STRANGE))
        case int() | float(), 0 | 1:
            return rng.choice((node + 1, node - 1, -node, node * 2, node / 2, node * 1000))
        case int() | float(), 2:
            return str(node)
        case int(), 3:
            return rng.choice((*WHOLE, *LARGE))
        case _, 4:
            return [node] * rng.choice((1, 2, 100))
        case _:
            return copy.deepcopy(rng.choice(STRANGE))


def json_lines(data: bytes, rng: Random) -> bytes:
    """Changes in one line of several JSON objects, or of their order."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    if rng.random() < 0.9:
        lines[at] = json_tree(lines[at], rng)
    else:
        lines[at:at] = rng.choice(([], lines, [lines[rng.randrange(len(lines))]] * 3))
    return b"\n".join(lines)[:MAX_BYTES]


def safetensors(data: bytes, rng: Random) -> bytes:
    """Changes of the header's tree, the length kept right, or of any bytes."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3 or length > len(data) - 8:
        return binary(data, rng, 8 + length)
    header = json_tree(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def zipped(data: bytes, rng: Random, words: Sequence[str] = ()) -> bytes:
    """Changes of a member of a zip file, or of any bytes."""
    if rng.random() < 0.25:
        return binary(data, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # changed before
        return binary(data, rng)
    if not members:
        return binary(data, rng)
    at = rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(12):
        case 0:
            name = text(name.encode(), rng, ("../", "/", "\\", "a.xhtml")).decode()
        case 1:
            members.append(rng.choice(members))
        case 2:
            content = binary(content, rng)
        case _:
            content = text(content, rng, words)
    members[at] = name, content
    out = io.BytesIO()
    method = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, content in members:
                archive.writestr(name.replace("\0", "") or "x", content)
    return out.getvalue()
