"""Markdown: headings, and text without front matter and the marks of emphasis, links and images.

Every pattern here takes time linear in the text: its repetitions are possessive, and two of its
attempts never read the same characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.limits import check_characters
from pocketslm.runtime.assistant.readers.text import decode, lines, unwrap

_HEADING = re.compile(r"(#{1,6})\s")
_UNDERLINE = re.compile(r"(=++|-++)\s*+$")
_FENCE = re.compile(r"\s*+(```|~~~)")
# The first line of a file that has front matter, and what may end it.
_FRONT_MATTER = {"---": ("---", "..."), "+++": ("+++",)}
_FIELD = re.compile(r"\s*+(?:#|[\w\"'.-]++\s*+[:=])")
_LINK = re.compile(
    r"!?\[([^\[\]\n]*+)\]\((?:[^()\s]|\([^()\s]*+\))*+(?:[ \t]++\"[^\"\n]*+\")?+[ \t]*+\)"
)
_MARK = re.compile(r"(?<!`)(`++)([^`\n]++)\1(?!`)|\*++|_++|\n")


def read(data: bytes) -> Iterator[Block]:
    text = decode(data)
    check_characters(len(text))
    paragraph: list[str] = []
    fence = ""
    for line in lines(text[_front_matter(text) :]):
        if (mark := _FENCE.match(line)) and fence in ("", mark[1]):
            yield from _paragraph(paragraph, code=bool(fence))
            fence, paragraph = ("" if fence else mark[1]), []
            continue
        if fence:
            paragraph.append(line)
        elif heading := _HEADING.match(line):
            yield from _paragraph(paragraph)
            yield Block(_plain(_title(line[heading.end() :])), len(heading[1]))
            paragraph = []
        elif paragraph and _UNDERLINE.match(line):
            *before, title = paragraph
            yield from _paragraph(before)
            yield Block(_plain(title), 1 if line[0] == "=" else 2)
            paragraph = []
        elif line.strip():
            paragraph.append(line)
        else:
            yield from _paragraph(paragraph)
            paragraph = []
    yield from _paragraph(paragraph, code=bool(fence))


def _front_matter(text: str) -> int:
    """The beginning of the text after the fields at its top, which describe it (YAML or TOML)."""
    rows = lines(text)
    first = next(rows)
    ends = _FRONT_MATTER.get(first.rstrip(), ())
    length = len(first) + 1
    for number, line in enumerate(rows):
        if not ends or (number == 0 and not _FIELD.match(line)):
            break
        length += len(line) + 1
        if line.rstrip() in ends:
            return length
    return 0


def _title(text: str) -> str:
    """A heading without the number signs that may close it."""
    text = text.strip()
    title = text.rstrip("#")
    return title.rstrip() if not title or title[-1].isspace() else text


def _paragraph(rows: list[str], *, code: bool = False) -> Iterator[Block]:
    if rows:
        yield Block("\n".join(rows) if code else _plain(unwrap("\n".join(rows))))


def _plain(text: str) -> str:
    for _ in range(2):  # an image in a link, then the link
        text = _LINK.sub(r"\1", text)
    return _without_emphasis(_without_comments(text))


def _without_comments(text: str) -> str:
    parts: list[str] = []
    at = 0
    while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start)) >= 0:
        parts.append(text[at:start])
        at = end + len("-->")
    return "".join([*parts, text[at:]])


def _without_emphasis(text: str) -> str:
    """Text without marks of emphasis and code. A mark is removed if its partner is on the same
    line.
    """
    parts: list[str] = []
    opened: dict[str, int] = {}  # mark -> its place in ``parts``
    at = 0
    for match in _MARK.finditer(text):
        parts.append(text[at : match.start()])
        at = match.end()
        mark = match[2] or match.group()
        if mark == "\n":
            opened.clear()
        elif not match[1]:
            before, after = text[match.start() - 1 : match.start()], text[at : at + 1]
            anywhere = mark == "**"  # inside a word the others are not marks
            closes = before and not before.isspace() and (anywhere or not after.isalnum())
            if closes and mark in opened:
                parts[opened.pop(mark)] = mark = ""
            elif after and not after.isspace() and (anywhere or not before.isalnum()):
                opened[mark] = len(parts)
        parts.append(mark)
    return "".join([*parts, text[at:]])
