"""The pre-tokenizers of `tokenizer.json`: how a text is cut into the words that BPE merges within.

A step maps pieces to pieces. `at_start` says whether the first piece starts the whole text,
which `Metaspace` with `prepend_scheme: first` asks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from pocketslm.runtime.tokenizer import fields
from pocketslm.runtime.tokenizer import unicode_classes as uc
from pocketslm.runtime.tokenizer.normalizers import pattern
from pocketslm.runtime.tokenizer.patterns import Matches, Pattern, write_class

Step = Callable[[list[str], bool], list[str]]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` with `use_regex` splits by."""

BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
SCHEMES = ("first", "never", "always")
KNOWN = (
    *("BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Sequence", "Split"),
    "WhitespaceSplit",
)


@cache
def byte_alphabet() -> dict[int, int]:
    """Byte -> code point of the visible character that stands for it in byte-level vocabularies."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {**{byte: byte for byte in visible}, **{b: 256 + i for i, b in enumerate(hidden)}}


def build(node: object) -> Step:
    """The step that `tokenizer.json`'s `pre_tokenizer` describes; null leaves pieces whole."""
    parts = fields.components(node, "pre_tokenizer", "pretokenizers")
    kinds = [part["type"] for part in parts]
    if "WhitespaceSplit" in kinds and any(part.get("prepend_scheme") == "first" for part in parts):
        # Whether a word starts the text is not known once white space is gone.
        raise fields.unsupported("pre_tokenizer prepend_scheme", "first", SCHEMES[1:])
    steps = [_step(part) for part in parts]

    def run(pieces: list[str], at_start: bool) -> list[str]:
        for step in steps:
            pieces = step(pieces, at_start)
        return pieces

    return run


def merge_spans(spans: Matches, behavior: str) -> list[tuple[int, int]]:
    """The pieces that `behavior` makes of matches and gaps."""
    if behavior == "Removed":
        return [(start, end) for start, end, matched in spans if not matched]
    if behavior == "Isolated":
        return [(start, end) for start, end, _ in spans]
    out: list[tuple[int, int]] = []
    previous = False
    backwards = behavior == "MergedWithNext"
    for start, end, matched in reversed(spans) if backwards else spans:
        joins = matched == previous if behavior == "Contiguous" else matched and not previous
        if joins and out:
            last = out[-1]
            out[-1] = (start, last[1]) if backwards else (last[0], end)
        else:
            out.append((start, end))
        previous = matched
    return out[::-1] if backwards else out


def _step(node: dict[str, object]) -> Step:
    where = "pre_tokenizer"
    kind = node["type"]
    if kind == "ByteLevel":
        prefix = fields.field(node, "add_prefix_space", bool, where)
        use_regex = fields.optional(node, "use_regex", bool, True, where)
        return _byte_level(Pattern(GPT2) if use_regex else None, prefix)
    if kind == "Digits":
        individual = fields.field(node, "individual_digits", bool, where)
        return _split(Pattern(r"\p{N}"), "Isolated" if individual else "Contiguous", False)
    if kind == "Split":
        behavior = fields.field(node, "behavior", str, where)
        if behavior not in BEHAVIORS:
            raise fields.unsupported("pre_tokenizer behavior", behavior, BEHAVIORS)
        invert = fields.field(node, "invert", bool, where)
        return _split(pattern(node, where), behavior, invert)
    if kind == "Metaspace":
        return _metaspace(node)
    if kind == "WhitespaceSplit":
        return _split(Pattern(r"\s+"), "Removed", False)
    if kind == "BertPreTokenizer":
        return lambda pieces, at_start: [w for p in pieces for w in _bert_words().findall(p)]
    raise fields.unsupported("pre_tokenizer type", kind, KNOWN)


def bert_signs() -> uc.Ranges:
    """What is a word by itself to BERT: punctuation, and all signs of ASCII."""
    ascii_signs = ((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E))
    return uc.union([ascii_signs, uc.of_unicode_8("P")])


@cache
def _bert_words() -> re.Pattern[str]:
    """Signs, one by one, and what stands between them and white space."""
    signs = bert_signs()
    between = write_class(uc.union([signs, uc.WHITE_SPACE]), negated=True)
    return re.compile(f"{between}+|{write_class(signs)}")


def _byte_level(words: Pattern | None, add_prefix_space: bool) -> Step:
    table = byte_alphabet()

    def step(pieces: list[str], at_start: bool) -> list[str]:
        if add_prefix_space:
            pieces = [piece if piece.startswith(" ") else " " + piece for piece in pieces]
        if words is not None:
            pieces = [word for piece in pieces for word in words.pieces(piece)]
        return [piece.encode().decode("latin-1").translate(table) for piece in pieces]

    return step


def _split(found: Pattern, behavior: str, invert: bool) -> Step:
    def step(pieces: list[str], at_start: bool) -> list[str]:
        if behavior == "Isolated":  # so `invert` changes nothing
            return [word for piece in pieces for word in found.pieces(piece)]
        out = []
        for piece in pieces:
            spans = found.spans(piece)
            if invert:
                spans = [(start, end, not matched) for start, end, matched in spans]
            out += [piece[start:end] for start, end in merge_spans(spans, behavior) if start < end]
        return out

    return step


def metaspace_scheme(node: dict[str, object], where: str) -> tuple[str, str]:
    """The replacement character and the prepend scheme of a `Metaspace` component."""
    replacement = fields.field(node, "replacement", str, where)
    scheme = fields.optional(node, "prepend_scheme", str, "always", where)
    if len(replacement) != 1:
        raise fields.unsupported(f"{where} replacement", replacement, ["one character"])
    if scheme not in SCHEMES:
        raise fields.unsupported(f"{where} prepend_scheme", scheme, SCHEMES)
    if not fields.optional(node, "add_prefix_space", bool, True, where):
        scheme = "never"
    return replacement, scheme


def _metaspace(node: dict[str, object]) -> Step:
    mark, scheme = metaspace_scheme(node, "pre_tokenizer")
    split = fields.optional(node, "split", bool, True, "pre_tokenizer")
    boundary = Pattern(mark, literal=True)

    def step(pieces: list[str], at_start: bool) -> list[str]:
        out = []
        for index, piece in enumerate(pieces):
            text = piece.replace(" ", mark)
            prepend = scheme == "always" or (scheme == "first" and at_start and index == 0)
            if prepend and not text.startswith(mark):
                text = mark + text
            if split:
                spans = merge_spans(boundary.spans(text), "MergedWithNext")
                out += [text[start:end] for start, end in spans if start < end]
            else:
                out.append(text)
        return out

    return step
