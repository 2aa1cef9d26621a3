"""Oniguruma regular expressions, as `tokenizer.json` carries them, on the standard library's `re`.

The translation writes every class (`\\p{..}`, `\\s`, `[...]`) out as code point ranges. A pattern
is compiled twice, each on first use: for ASCII text with the classes cut to ASCII, which is
small and fast, and for all of Unicode.

A pattern comes from a file that somebody else wrote, and `re` backtracks, so patterns that could
take time exponential in the length of a text are refused: a group may not be repeated, and a
top-level alternative may hold at most `MAX_REPEATS` unbounded repeats and `MAX_CHOICES` groups
and optional parts. The split patterns of known models hold two and two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property, lru_cache

from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import unicode_classes as uc

MAX_LENGTH = 4096
MAX_REPEATS = 3
MAX_CHOICES = 8
_LARGE = 3  # a bounded repeat above this counts as unbounded

_CONTROL = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "a": 0x07, "e": 0x1B}
_GROUPS = re.compile(r"\((?:\?(?::|=|!|>|<=|<!|i:|-i:))?")
_REPEAT = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})([?+]?)")
_HEX = re.compile(r"x\{([0-9A-Fa-f]{1,8})\}|x([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{4})")
_PROPERTY = re.compile(r"([pP])\{(\^?)(\w+)\}")

Matches = list[tuple[int, int, bool]]
"""(start, end, is a match) of consecutive spans that cover a text."""


class Pattern:
    """A compiled pattern, or a literal string."""

    def __init__(self, source: str, *, literal: bool = False) -> None:
        self.source = re.escape(source) if literal else source
        self._literal = literal
        if not literal:
            _compile(source, 0x80)  # so that a bad pattern is an error at load time

    @cached_property
    def _ascii(self) -> re.Pattern[str]:
        return re.compile(self.source) if self._literal else _compile(self.source, 0x80)

    @cached_property
    def _unicode(self) -> re.Pattern[str]:
        return re.compile(self.source) if self._literal else _compile(self.source, 0)

    def _for(self, text: str) -> re.Pattern[str]:
        return self._ascii if text.isascii() else self._unicode

    def spans(self, text: str) -> Matches:
        """Matches and the gaps between them, in order, covering `text`."""
        out: Matches = []
        previous = 0
        for match in self._for(text).finditer(text):
            start, end = match.span()
            if start != previous:
                out.append((previous, start, False))
            out.append((start, end, True))
            previous = end
        if previous != len(text):
            out.append((previous, len(text), False))
        return out

    def pieces(self, text: str) -> list[str]:
        """`text` cut into matches and gaps, none empty: the behaviour `Isolated`, but faster."""
        pattern = self._for(text)
        found = pattern.findall(text) if not pattern.groups else []
        if sum(map(len, found)) == len(text):  # matches lie apart, so there is no gap
            return [piece for piece in found if piece]
        return [text[start:end] for start, end, _ in self.spans(text) if start != end]

    def replace(self, text: str, content: str) -> str:
        """`text` with every match replaced by `content`, taken literally."""
        return self._for(text).sub(lambda _: content, text)


@lru_cache(maxsize=64)
def _compile(source: str, limit: int) -> re.Pattern[str]:
    if len(source) > MAX_LENGTH:
        raise _refusal(source[:40] + "...", f"it is longer than {MAX_LENGTH} characters")
    try:
        return re.compile("".join(_translate(source, limit)))
    except (re.error, RecursionError, OverflowError) as error:
        raise _refusal(source, str(error)) from None


def _refusal(source: str, reason: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer.json: the pattern {source!r} cannot be used: {reason}; expected a regular "
        "expression of classes, \\p{category}, groups without repeats and look-around; "
        "use implementation='tokenizers' if you trust this file"
    )


def _translate(source: str, limit: int) -> Iterator[str]:
    """The pieces of an equivalent `re` pattern; classes end below `limit` unless it is 0."""
    at = depth = repeats = choices = 0
    after_group = False
    while at < len(source):
        char = source[at]
        if match := _REPEAT.match(source, at):
            unbounded = _is_unbounded(source, match, after_group)
            repeats += unbounded
            choices += not unbounded
            yield match.group()
            at = match.end()
            after_group = False
        elif char == "(":
            group = _group(source, at)
            depth += 1
            choices += 1
            yield "(?:" if group == "(" else group
            at += len(group)
            after_group = False
        elif char in "[\\":
            ranges, negated, at = (_class if char == "[" else _escape)(source, at)
            yield write_class(uc.below(ranges, limit) if limit else ranges, negated)
            after_group = False
        else:
            after_group = char == ")"
            depth -= after_group
            if char == "|" and depth == 0:
                repeats = choices = 0
            yield {"^": "(?m:^)", "$": "(?m:$)", "{": r"\{", "}": r"\}"}.get(char, char)
            at += 1
        if repeats > MAX_REPEATS or choices > MAX_CHOICES:
            raise _refusal(
                source,
                f"an alternative has more than {MAX_REPEATS} unbounded repeats or "
                f"{MAX_CHOICES} groups and optional parts",
            )


def _group(source: str, at: int) -> str:
    """What opens the group at `source[at]`: `(`, `(?:`, a look-around or a case switch."""
    match = _GROUPS.match(source, at)
    assert match is not None
    group = match.group()
    if group == "(" and source.startswith("(?", at):
        raise _refusal(source, f"the group {source[at : at + 4]!r} is not supported")
    return group


def _is_unbounded(source: str, match: re.Match[str], after_group: bool) -> bool:
    """Whether the repeat is (nearly) unbounded; refuses what could backtrack exponentially."""
    token, least, comma, most = match.group(0, 1, 2, 3)
    if token.startswith("{"):
        if not least and not most:
            raise _refusal(source, f"the repeat {token!r} has no bounds")
        if match.group(4) == "+":
            raise _refusal(source, f"the repeat {token!r} means different things to engines")
        upper = int((most if comma else least) or _LARGE + 1)
    else:
        upper = 1 if token[0] == "?" else _LARGE + 1
    if after_group and upper > 1:
        raise _refusal(source, "it repeats a group, which can take exponential time")
    return upper > _LARGE


def _escape(source: str, at: int) -> tuple[uc.Ranges, bool, int]:
    """Like `_class`, for the escape that starts at `source[at]`."""
    letter = source[at + 1 : at + 2]
    if not letter:
        raise _refusal(source, "it ends in a backslash")
    if match := _PROPERTY.match(source, at + 1):
        ranges = uc.category(match.group(3))
        if ranges is None:
            raise _refusal(source, f"{match.group()!r} is not a general category")
        negated = (match.group(1) == "P") != bool(match.group(2))
        return ranges, negated, match.end()
    if match := _HEX.match(source, at + 1):
        code = int(match.group(1) or match.group(2) or match.group(3), 16)
        return _single(code), False, match.end()
    if letter.lower() == "s":
        return uc.WHITE_SPACE, letter == "S", at + 2
    if letter.lower() == "d":
        return uc.category("Nd") or (), letter == "D", at + 2
    if letter.lower() == "w":
        return uc.word(), letter == "W", at + 2
    if letter in _CONTROL:
        return _single(_CONTROL[letter]), False, at + 2
    if letter.isalnum():
        raise _refusal(source, f"the escape '\\{letter}' is not supported")
    return _single(ord(letter)), False, at + 2


def _single(code: int) -> uc.Ranges:
    return ((code, code),)


def _class(source: str, at: int, depth: int = 0) -> tuple[uc.Ranges, bool, int]:
    """The class that starts at `source[at]`: its ranges, whether it is negated, where it ends."""
    if depth > 4:
        raise _refusal(source, "its classes nest deeper than 4")
    at += 1
    negated = source.startswith("^", at)
    at += negated
    parts: list[uc.Ranges] = []
    low: int | None = None  # the left end of a range 'a-' that waits for its right end
    while at < len(source):
        if source[at] == "]" and parts:
            return uc.union(parts), negated, at + 1
        if source.startswith(("[:", "&&"), at):
            raise _refusal(source, f"{source[at : at + 2]!r} in a class is not supported")
        if source[at] == "[":
            part, inverted, at = _class(source, at, depth + 1)
        elif source[at] == "\\":
            part, inverted, at = _escape(source, at)
        else:
            part, inverted, at = _single(ord(source[at])), False, at + 1
        single = part[0][0] if uc.size(part) == 1 and not inverted else None
        if low is not None:
            if single is None or single < low:
                raise _refusal(source, "a range in a class has no right end")
            parts.append(((low, single),))
            low = None
        elif single is not None and source.startswith("-", at) and source[at + 1 : at + 2] != "]":
            low = single
            at += 1
        else:
            parts.append(uc.complement(part) if inverted else part)
    raise _refusal(source, "a class is not closed")


def write_class(ranges: uc.Ranges, negated: bool = False) -> str:
    """A character class of `re` that is the code points in `ranges`, or all others."""
    if not ranges:
        return r"[\x00-\U0010FFFF]" if negated else r"(?!)"
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1] and not negated:
        return re.escape(chr(ranges[0][0]))
    body = "".join(
        f"\\U{first:08x}" if first == last else f"\\U{first:08x}-\\U{last:08x}"
        for first, last in ranges
    )
    return f"[{'^' if negated else ''}{body}]"
