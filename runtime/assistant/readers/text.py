"""Plain text: paragraphs apart by blank lines; a form feed begins a page."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LIST_ITEM = re.compile(r"\s*(?:[-*•+]|\d+[.)])\s")
# Shorter lines are verse, code or a table, and keep their ends.
_WRAPPED = 50


def read(data: bytes) -> Iterator[Block]:
    pages = decode(data).split("\f")
    for number, page in enumerate(pages, 1):
        for paragraph in re.split(r"\n\s*\n", page):
            yield Block(unwrap(paragraph), page=number if len(pages) > 1 else None)


def decode(data: bytes) -> str:
    """UTF-8, UTF-16 with its mark, or Windows-1252; DocumentError for what is no text."""
    marked = (encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark))
    try:
        text = data.decode(next(marked, "utf-8"))
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            raise DocumentError("is not text; save it as UTF-8") from None
    if text.count("\0") or sum(text[:4096].count(mark) for mark in map(chr, range(1, 9))):
        raise DocumentError("is not text; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def unwrap(paragraph: str) -> str:
    """The lines of a paragraph joined where an editor had wrapped them."""
    joined = ""
    for line in paragraph.split("\n"):
        last = joined.rsplit("\n", 1)[-1]
        wrapped = len(last) >= _WRAPPED and not _LIST_ITEM.match(line)
        joined += (" " if wrapped else "\n" if joined else "") + line.strip()
    return joined
