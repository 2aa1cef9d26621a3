"""The normalizers of `tokenizer.json`: what is done to a text before it is split.

Normalization forms and case follow Python's own Unicode version. The `tokenizers` wheel has tables
of its own, so the two can differ on characters that Unicode gained in the last years.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from typing import Literal, cast

from pocketslm.runtime.tokenizer import fields
from pocketslm.runtime.tokenizer import unicode_classes as uc
from pocketslm.runtime.tokenizer.charsmap import CharsMap
from pocketslm.runtime.tokenizer.patterns import Pattern, write_class

Normalizer = Callable[[str], str]

_WHITE_SPACE = uc.characters(uc.WHITE_SPACE)
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
KNOWN = (
    *_FORMS,
    *("BertNormalizer", "Lowercase", "Precompiled", "Prepend", "Replace", "Sequence", "Strip"),
)


def build(node: object) -> Normalizer | None:
    """The normalizer that `tokenizer.json`'s `normalizer` describes; None for null."""
    steps = [_step(part) for part in fields.components(node, "normalizer", "normalizers")]
    if not steps:
        return None

    def normalize(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return normalize


def pattern(node: dict[str, object], where: str) -> Pattern:
    """The `pattern` field of a component: `{"String": ...}` or `{"Regex": ...}`."""
    value = fields.field(node, "pattern", dict, where)
    if set(value) == {"String"}:
        return Pattern(fields.field(value, "String", str, f"{where}.pattern"), literal=True)
    if set(value) == {"Regex"}:
        return Pattern(fields.field(value, "Regex", str, f"{where}.pattern"))
    raise fields.unsupported(f"{where}.pattern", sorted(map(str, value)), ("String", "Regex"))


def _step(node: dict[str, object]) -> Normalizer:
    kind = node["type"]
    if kind == "BertNormalizer":
        return _bert(node)
    if kind in _FORMS:
        form = cast("Literal['NFC', 'NFD', 'NFKC', 'NFKD']", kind)
        return partial(unicodedata.normalize, form)
    if kind == "Lowercase":
        return _lowercase
    if kind == "Precompiled":
        return CharsMap(fields.field(node, "precompiled_charsmap", str, "normalizer")).replace
    if kind == "Prepend":
        prefix = fields.field(node, "prepend", str, "normalizer")
        return lambda text: prefix + text if text else text
    if kind == "Replace":
        found = pattern(node, "normalizer")
        content = fields.field(node, "content", str, "normalizer")
        return lambda text: found.replace(text, content)
    if kind == "Strip":
        left = fields.field(node, "strip_left", bool, "normalizer")
        right = fields.field(node, "strip_right", bool, "normalizer")
        return partial(_strip, left=left, right=right)
    raise fields.unsupported("normalizer type", kind, KNOWN)


# The gap below U+2B920 is the wheel's.
BERT_IDEOGRAPHS: uc.Ranges = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip
"""What BERT's normalizer sets apart with spaces."""


def bert_removed() -> uc.Ranges:
    """What BERT's normalizer leaves out of a text: controls, but for the white space among them."""
    controls = ((0x0, 0x8), (0xB, 0xC), (0xE, 0x1F), (0x7F, 0x9F), (0xFFFD, 0xFFFD))
    return uc.union([controls, uc.of_unicode_8("Cf"), uc.category("Co") or ()])


@cache
def _class(ranges: uc.Ranges) -> re.Pattern[str]:
    return re.compile(write_class(ranges))


def _bert(node: dict[str, object]) -> Normalizer:
    where = "normalizer"
    clean = fields.optional(node, "clean_text", bool, True, where)
    apart = fields.optional(node, "handle_chinese_chars", bool, True, where)
    lower = fields.optional(node, "lowercase", bool, True, where)
    strip = fields.optional(node, "strip_accents", bool, lower, where)
    removed, space = _class(bert_removed()), _class(uc.WHITE_SPACE)
    ideograph, accent = _class(BERT_IDEOGRAPHS), _class(uc.of_unicode_8("Mn"))

    def normalize(text: str) -> str:
        if clean:
            text = space.sub(" ", removed.sub("", text))
        if apart:
            text = ideograph.sub(r" \g<0> ", text)
        if strip:
            text = accent.sub("", unicodedata.normalize("NFD", text))
        return _lowercase(text) if lower else text

    return normalize


def _lowercase(text: str) -> str:
    """Character by character as Rust's `char::to_lowercase`: no final-sigma rule."""
    return "".join(map(str.lower, text))


def _strip(text: str, *, left: bool, right: bool) -> str:
    if left:
        text = text.lstrip(_WHITE_SPACE)
    return text.rstrip(_WHITE_SPACE) if right else text
