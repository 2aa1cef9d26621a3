"""Unicode general categories as code point ranges, and the algebra of such ranges.

`re` has no `\\p{L}`, so the classes are written out. They follow Unicode 16, the version of the
`tokenizers` wheel, also where Python's own `unicodedata` is older (Python 3.11 has Unicode 14):
`_ASSIGNED_LATER` lists what Unicode 15 to 16 added or changed.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from functools import cache

Ranges = tuple[tuple[int, int], ...]
"""Sorted, disjoint, not adjacent (first, last) pairs of code points, both inclusive."""

_ASSIGNED_LATER = {
    "Mn": (
        "897 ECE 10D69-10D6D 10EFC-10EFF 11241 113BB-113C0 113CE 113D0 113D2 113E1-113E2 "
        "11F00-11F01 11F36-11F3A 11F40 11F42 11F5A 13440 13447-13455 1611E-16129 "
        "1612D-1612F 1E08F 1E4EC-1E4EF 1E5EE-1E5EF"
    ),
    "Mc": (
        "CF3 113B8-113BA 113C2 113C5 113C7-113CA 113CC-113CD 113CF 1171E 11F03 "
        "11F34-11F35 11F3E-11F3F 11F41 1612A-1612C"
    ),
    "Po": (
        "1B4E-1B4F 1B7F 113D4-113D5 113D7-113D8 11B00-11B09 11BE1 11F43-11F4F 16D6D-16D6F 1E5FF"
    ),
    "Lu": "1C89 A7CB-A7CC A7DA A7DC 10D50-10D65",
    "Ll": "1C8A A7CD A7DB 10D70-10D85 1DF25-1DF2A",
    "So": (
        "2427-2429 2FFC-2FFF 31E4-31E5 31EF 1CC00-1CCEF 1CD00-1CEB3 1F6DC 1F774-1F776 "
        "1F77B-1F77F 1F7D9 1F8B2-1F8BB 1F8C0-1F8C1 1FA75-1FA77 1FA87-1FA89 1FA8F "
        "1FAAD-1FAAF 1FABB-1FABF 1FAC6 1FACE-1FACF 1FADA-1FADC 1FADF 1FAE8-1FAE9 "
        "1FAF7-1FAF8 1FBCB-1FBEF"
    ),
    "Lo": (
        "105C0-105F3 10D4A-10D4D 10D4F 10EC2-10EC4 1123F-11240 11380-11389 1138B 1138E "
        "11390-113B5 113B7 113D1 113D3 11BC0-11BE0 11F02 11F04-11F10 11F12-11F33 1342F "
        "13441-13446 13460-143FA 16100-1611D 16D43-16D6A 18CFF 1B132 1B155 1E4D0-1E4EA "
        "1E5D0-1E5ED 1E5F0 2B739 2EBF0-2EE5D 31350-323AF"
    ),
    "Nd": (
        "10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16D70-16D79 "
        "1CCF0-1CCF9 1E4F0-1E4F9 1E5F1-1E5FA"
    ),
    "Lm": "10D4E 10D6F 16D40-16D42 16D6B-16D6C 1E030-1E06D 1E4EB",
    "Pd": "10D6E",
    "Sm": "10D8E-10D8F",
    "Cf": "13439-1343F",
    "No": "1D2C0-1D2D3",
}

# What Unicode 9 to 16 added to a category, and below what they took out of it.
_SINCE_UNICODE_8 = {
    "Cf": "890-891 8E2 110CD 13430-1343F",
    "Mn": (
        "7FD 897-89F 8CA-8E1 9FE AFA-AFF B55 C04 C3C D00 D3B-D3C D81 EBA ECE 180F 1885-1886 "
        "1ABF-1ACE 1DF6-1DFB A82C A8C5 A8FF A9BD 10D24-10D27 10D69-10D6D 10EAB-10EAC "
        "10EFC-10EFF 10F46-10F50 10F82-10F85 11070 11073-11074 110C2 111C9 111CF 1123E 11241 "
        "1133B 113BB-113C0 113CE 113D0 113D2 113E1-113E2 11438-1143F 11442-11444 11446 1145E "
        "1182F-11837 11839-1183A 1193B-1193C 1193E 11943 119D4-119D7 119DA-119DB 119E0 "
        "11A01-11A0A 11A33-11A38 11A3B-11A3E 11A47 11A51-11A56 11A59-11A5B 11A8A-11A96 "
        "11A98-11A99 11C30-11C36 11C38-11C3D 11C3F 11C92-11CA7 11CAA-11CB0 11CB2-11CB3 "
        "11CB5-11CB6 11D31-11D36 11D3A 11D3C-11D3D 11D3F-11D45 11D47 11D90-11D91 11D95 11D97 "
        "11EF3-11EF4 11F00-11F01 11F36-11F3A 11F40 11F42 11F5A 13440 13447-13455 1611E-16129 "
        "1612D-1612F 16F4F 16FE4 1CF00-1CF2D 1CF30-1CF46 1E000-1E006 1E008-1E018 1E01B-1E021 "
        "1E023-1E024 1E026-1E02A 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF "
        "1E944-1E94A"
    ),
    "P": (
        "61D 9FD A76 C77 C84 1B4E-1B4F 1B7D-1B7F 2E43-2E4F 2E52-2E5D 10D6E 10EAD 10F55-10F59 "
        "10F86-10F89 113D4-113D5 113D7-113D8 1144B-1144F 1145A-1145B 1145D 11660-1166C 116B9 "
        "1183B 11944-11946 119E2 11A3F-11A46 11A9A-11A9C 11A9E-11AA2 11B00-11B09 11BE1 "
        "11C41-11C45 11C70-11C71 11EF7-11EF8 11F43-11F4F 11FFF 12FF1-12FF2 16D6D-16D6F "
        "16E97-16E9A 16FE2 1E5FF 1E95E-1E95F"
    ),
}
_UNTIL_UNICODE_8 = {"Mn": "1734 1171E", "P": "166D 111C9"}

WHITE_SPACE: Ranges = (
    (0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
    (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000),
)  # fmt: skip
"""The property White_Space. Python's own `\\s` differs: it also takes U+001C to U+001F."""

# What Oniguruma's \w has beyond letters, marks, Nd, Nl and Pc: Latin-1 numbers, circled letters.
_WORD_EXTRA: Ranges = (
    (0xB2, 0xB3), (0xB9, 0xB9), (0xBC, 0xBE), (0x24B6, 0x24E9),
    (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189),
)  # fmt: skip


def union(parts: Iterable[Ranges]) -> Ranges:
    """All code points that are in at least one of `parts`."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pair for part in parts for pair in part):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    """All code points that are not in `ranges`."""
    gaps = []
    start = 0
    for first, last in ranges:
        if first > start:
            gaps.append((start, first - 1))
        start = last + 1
    if start <= sys.maxunicode:
        gaps.append((start, sys.maxunicode))
    return tuple(gaps)


def size(ranges: Ranges) -> int:
    """How many code points are in `ranges`."""
    return sum(last - first + 1 for first, last in ranges)


def characters(ranges: Ranges) -> str:
    """All characters of (small) `ranges`, as one string."""
    return "".join(chr(code) for first, last in ranges for code in range(first, last + 1))


def below(ranges: Ranges, limit: int) -> Ranges:
    """The part of `ranges` below `limit`."""
    return tuple((first, min(last, limit - 1)) for first, last in ranges if first < limit)


def parse(text: str) -> Ranges:
    """Ranges written as `897 10D69-10D6D`."""
    parts = (part.partition("-") for part in text.split())
    return tuple((int(first, 16), int(last or first, 16)) for first, _, last in parts)


@cache
def _categories() -> dict[str, Ranges]:
    """Two-letter category -> ranges."""
    later = {
        code: name
        for name, text in _ASSIGNED_LATER.items()
        for first, last in parse(text)
        for code in range(first, last + 1)
    }
    runs: dict[str, list[tuple[int, int]]] = {}
    category = unicodedata.category
    previous, start = "", 0
    for code in range(0xE01F0 + 1):  # beyond are only unassigned and private-use code points
        name = later.get(code) or category(chr(code))
        if name != previous:
            if previous:
                runs.setdefault(previous, []).append((start, code - 1))
            previous, start = name, code
    runs["Cn"].append((start, 0xEFFFF))
    for plane in (0xF0000, 0x100000):
        runs["Co"].append((plane, plane + 0xFFFD))
        runs["Cn"].append((plane + 0xFFFE, plane + 0xFFFF))
    return {name: union([tuple(pairs)]) for name, pairs in runs.items()}


@cache
def category(name: str) -> Ranges | None:
    """The ranges of a general category such as `L` or `Nd`; None if there is none of that name."""
    if len(name) not in (1, 2):
        return None
    members = [ranges for key, ranges in _categories().items() if key.startswith(name)]
    return union(members) if members else None


@cache
def of_unicode_8(name: str) -> Ranges:
    """The category `Cf`, `Mn` or `P` as Unicode 8 had it.

    The parts of the `tokenizers` wheel that are for BERT still go by these tables.
    """
    outside = union([complement(category(name) or ()), parse(_SINCE_UNICODE_8[name])])
    return union([complement(outside), parse(_UNTIL_UNICODE_8.get(name, ""))])


@cache
def word() -> Ranges:
    """What `\\w` means to Oniguruma, the engine inside the `tokenizers` wheel."""
    names = ("L", "M", "Nd", "Nl", "Pc")
    return union([*(category(name) or () for name in names), _WORD_EXTRA])
