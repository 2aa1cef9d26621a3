"""Write the ``precompiled_charsmap`` of a tokenizer, SentencePiece's table of what is replaced.

The form is that of `pocketslm.runtime.tokenizer.charsmap`. A unit of the trie has the label of the
byte that leads to it in its low 8 bits, whether a replacement ends there in bit 8, and from bit 10
the exclusive or of its place with where its children begin. A replacement's unit has its place
among the replacements.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from pocketslm.models.tensors import Array

_HAS_LEAF, _IS_LEAF, _OFFSET_BIT = 1 << 8, 1 << 31, 10
_MOST_UNITS = 1 << 21  # that an offset of 21 bits reaches
_WINDOW = 256  # units at the end among which a place is looked for


def write_charsmap(replacements: Mapping[str, str]) -> bytes:
    """The charsmap that replaces each key by its value. Keys and values hold no NUL."""
    values = bytearray()
    tree: dict[int, object] = {}
    for key, value in sorted(replacements.items()):
        node = tree
        for byte in key.encode():
            node = node.setdefault(byte, {})  # type: ignore[assignment]
        node[0] = len(values)
        values += value.encode() + b"\0"
    units = _placed(tree)
    return struct.pack("<I", units.nbytes) + units.astype("<u4").tobytes() + bytes(values)


def _placed(tree: dict[int, object]) -> Array:
    """The units of a tree of bytes, in which 0 leads to a number."""
    units = np.zeros(_MOST_UNITS, np.uint32)
    used, begun = np.zeros(_MOST_UNITS, bool), np.zeros(_MOST_UNITS, bool)
    used[0] = True
    todo, last = [(0, tree)], 0
    while todo:
        place, children = todo.pop()
        labels = np.array(list(children), np.int64)
        begin, at = 0, max(1, last - _WINDOW)
        while not begin:
            some = np.arange(at, at + _WINDOW)
            free = ~(begun[some] | used[some[:, None] ^ labels].any(1))
            begin, at = int(some[free.argmax()]) if free.any() else 0, at + _WINDOW
        begun[begin] = used[begin ^ labels] = True
        last = max(last, begin | 255)
        units[place] |= (place ^ begin) << _OFFSET_BIT | (_HAS_LEAF if 0 in children else 0)
        for label, below in children.items():
            if isinstance(below, int):
                units[begin] = _IS_LEAF | below
            else:
                assert isinstance(below, dict)
                units[begin ^ label] = label
                todo.append((begin ^ label, below))
    return units[: last + 1]
