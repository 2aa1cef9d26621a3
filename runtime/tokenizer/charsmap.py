"""SentencePiece's table of replacements, the `precompiled_charsmap` of a `tokenizer.json`.

It is, in base64: the size of a trie in bytes (uint32), the trie (uint32 units, a double array as
Darts-clone writes it) and replacements in UTF-8, each up to a NUL. The trie leads from the bytes
of a text to the place of its replacement.

Like the `tokenizers` wheel, this takes a grapheme cluster of fewer than 6 bytes whole: the shortest
key that it begins with decides, and the replacement stands for all of it. A longer cluster goes
character by character. So only short clusters have to be found, which marks make of a character.
What joins without a mark (letters of Hangul, flags, emoji around U+200D, Indic consonants around a
virama) has 6 bytes and more. It is not joined here, so that the text differs from the wheel's where
a mark of 2 bytes, such as U+0301, follows the second of two such characters and that one has a
replacement. No language writes this.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from functools import cache, lru_cache

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import unicode_classes as uc
from pocketslm.runtime.tokenizer.fields import MAX_REPLACEMENT
from pocketslm.runtime.tokenizer.patterns import write_class

CACHED_CLUSTERS = 1 << 14
_WHOLE = 6  # bytes from which on a cluster is taken character by character
_VALUE, _HAS_VALUE = 1 << 31, 1 << 8


class CharsMap:
    """`replace` gives a text with all that the table says.

    Raises `TokenizerError` for a table that leads out of its bounds or makes a character longer
    than `MAX_REPLACEMENT`.
    """

    def __init__(self, encoded: str) -> None:
        try:
            blob = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise _refusal("is not base64") from None
        size = int.from_bytes(blob[:4], "little")
        if not 0 < size <= len(blob) - 4 or size % 1024:
            raise _refusal(f"has a trie of {size} bytes in {len(blob)}")
        self._units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self._texts = blob[4 + size :]
        self._check()
        self._cluster = lru_cache(maxsize=CACHED_CLUSTERS)(self._replaced)
        self._characters = _Characters(self)

    def _check(self) -> None:
        try:
            texts = self._texts.decode()
        except UnicodeDecodeError:
            raise _refusal("has replacements that are not UTF-8") from None
        if max(map(len, texts.split("\0"))) > MAX_REPLACEMENT:
            raise _refusal(f"has a replacement of more than {MAX_REPLACEMENT} characters")
        starts = {0, len(self._texts)}
        at = 0
        for character in texts:
            starts.add(at)
            at += len(character.encode())
        units = self._units
        for at, unit in enumerate(units):
            if unit & _VALUE:
                continue
            child = at ^ _offset(unit)
            if child >= len(units) or (
                unit & _HAS_VALUE and units[child] & (_VALUE - 1) not in starts
            ):
                raise _refusal(f"leads out of its bounds at unit {at}")

    def find(self, text: str) -> str | None:
        """The replacement of the shortest key that `text` begins with; None if there is none."""
        units = self._units
        at = _offset(units[0])
        for byte in text.encode():
            at ^= byte
            unit = units[at]
            if not byte or unit & (_VALUE | 0xFF) != byte:
                return None
            at ^= _offset(unit)
            if unit & _HAS_VALUE:
                start = units[at] & (_VALUE - 1)
                return self._texts[start:].split(b"\0", 1)[0].decode()
        return None

    def replace(self, text: str) -> str:
        """`text` with its clusters and characters replaced."""
        plain = text.isascii() or not _joining().search(text)  # a quick look at most texts
        parts = (_CRLF if plain else _clusters()).split(text)
        parts[::2] = [part.translate(self._characters) for part in parts[::2]]
        parts[1::2] = map(self._cluster, parts[1::2])
        return "".join(parts)

    def _replaced(self, cluster: str) -> str:
        found = self.find(cluster) if len(cluster.encode()) < _WHOLE else None
        return cluster.translate(self._characters) if found is None else found


class _Characters(dict[int, "str | int"]):
    """Code point -> replacement, for `str.translate`; filled as texts need it."""

    def __init__(self, table: CharsMap) -> None:
        self._find = table.find

    def __missing__(self, code: int) -> str | int:
        found = self._find(chr(code))
        self[code] = code if found is None else found
        return self[code]


def _offset(unit: int) -> int:
    """From a unit to its children, by exclusive or."""
    return unit >> 10 << ((unit & 1 << 9) >> 6)


def _refusal(reason: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer.json: normalizer.precompiled_charsmap {reason}; expected the table that "
        "SentencePiece writes; fetch or export the file again"
    )


_CRLF = re.compile("(\r\n)")
# What joins a cluster and is no mark (Mn, Mc, Me), then marks that join none, as of Unicode 17.
_JOINS_TOO = (
    "E33 EB3 1ACF-1ADD 1AE0-1AEB 200C-200D FF9E-FF9F 10EFA-10EFB 11B60-11B67 1E6E3 1E6E6 "
    "1E6EE-1E6EF 1E6F5 1F3FB-1F3FF E0020-E007F"
)
_STAYS_APART = (
    "102B-102C 1038 1062-1064 1067-106D 1083 1087-108C 108F 109A-109C 1A61 1A63-1A64 AA7B AA7D "
    "11720-11721"
)
# What takes the next character along.
_PREPENDED = (
    "600-605 6DD 70F 890-891 8E2 D4E 110BD 110CD 111C2-111C3 113D1 1193F 11941 11A84-11A89 11D46 "
    "11F02"
)
_CONTROLS_TOO = "2065 FFF0-FFF8"


_BELOW_10000: uc.Ranges = ((0, 0xFFFF),)


def _without(ranges: uc.Ranges, *parts: uc.Ranges) -> uc.Ranges:
    return uc.complement(uc.union([uc.complement(ranges), *parts]))


def _either(ranges: uc.Ranges) -> str:
    """Any character of `ranges`: `re` tries ranges above U+FFFF one by one, so only there."""
    above = write_class(_without(ranges, _BELOW_10000))
    return f"(?:{write_class(uc.below(ranges, 0x10000))}|[\U00010000-\U0010ffff](?<={above}))"


@cache
def _joining() -> re.Pattern[str]:
    """What every cluster holds but CR LF."""
    return re.compile(_either(uc.union([_joins(), uc.parse(_PREPENDED)])))


@cache
def _joins() -> uc.Ranges:
    marks = _without(uc.category("M") or (), uc.parse(_STAYS_APART))
    return uc.union([marks, uc.parse(_JOINS_TOO)])


@cache
def _clusters() -> re.Pattern[str]:
    """Clusters of more than one character, as a group."""
    names = ("Cc", "Cf", "Zl", "Zp")
    controls = uc.union([*(uc.category(name) or () for name in names), uc.parse(_CONTROLS_TOO)])
    controls = _without(controls, _joins(), uc.parse(_PREPENDED))
    base, mark = _either(uc.complement(controls)), _either(_joins())
    prefix = _either(uc.parse(_PREPENDED))
    return re.compile(f"(\r\n|{prefix}+{base}?{mark}*|{base}{mark}+)")
