"""Markdown: headings, and text without the marks of emphasis, links and images."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.text import decode, unwrap

_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")
_UNDERLINE = re.compile(r"(=+|-+)\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")
_INLINE = (
    (re.compile(r"!?\[([^\]\n]*)\]\([^)\s]*(?:\s+\"[^\"\n]*\")?\)"), r"\1"),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w_])_(?=\S)([^_\n]+?)(?<=\S)_(?![\w_])"), r"\1"),
    (re.compile(r"`([^`\n]+)`"), r"\1"),
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
)


def read(data: bytes) -> Iterator[Block]:
    lines: list[str] = []
    fence = ""
    for line in [*decode(data).split("\n"), ""]:
        if (mark := _FENCE.match(line)) and fence in ("", mark[1]):
            yield from _paragraph(lines, code=bool(fence))
            fence, lines = ("" if fence else mark[1]), []
            continue
        if fence:
            lines.append(line)
        elif heading := _HEADING.match(line):
            yield from _paragraph(lines)
            yield Block(_plain(heading[2]), len(heading[1]))
            lines = []
        elif lines and _UNDERLINE.match(line):
            *before, title = lines
            yield from _paragraph(before)
            yield Block(_plain(title), 1 if line[0] == "=" else 2)
            lines = []
        elif line.strip():
            lines.append(line)
        else:
            yield from _paragraph(lines)
            lines = []
    yield from _paragraph(lines, code=bool(fence))


def _paragraph(lines: list[str], *, code: bool = False) -> Iterator[Block]:
    if lines:
        yield Block("\n".join(lines) if code else _plain(unwrap("\n".join(lines))))


def _plain(text: str) -> str:
    for pattern, put in _INLINE:
        text = pattern.sub(put, text)
    return text
