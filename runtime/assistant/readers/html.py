"""HTML, and the chapters of an EPUB: text of the body, with its headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.text import decode

_CHARSET = re.compile(rb"charset=[\"']?\s*([\w-]+)", re.IGNORECASE)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_SKIPPED = frozenset(
    re.findall(r"\w+", "script style head nav template svg noscript iframe select")
)
_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        "address article aside blockquote body dd details div dl dt figcaption figure footer form "
        "header hr li main ol p pre section table tbody thead tr ul",
    )
)


def read(data: bytes) -> Iterator[Block]:
    return iter(parse(_decode(data)))


def parse(markup: str) -> list[Block]:
    parser = _Parser()
    parser.feed(markup)
    parser.close()
    parser.end_block()
    return parser.blocks


def _decode(data: bytes) -> str:
    if (charset := _CHARSET.search(data[:2048])) and charset[1].lower() not in (b"utf-8", b"utf8"):
        try:
            return data.decode(charset[1].decode("ascii"))
        except (LookupError, UnicodeDecodeError):
            pass
    return decode(data)


class _Parser(HTMLParser):
    """Collects blocks; a broken or unclosed tag costs structure, never text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._text: list[str] = []
        self._level = 0
        self._skipping = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipping:
            return
        if tag in _SKIPPED:
            self._skipping = tag
        elif tag in _HEADINGS:
            self.end_block()
            self._level = _HEADINGS[tag]
        elif tag in _BLOCKS:
            self.end_block()
            if tag == "li":
                self._text.append("- ")
        elif tag == "br":
            self._text.append("\n")
        elif tag in ("td", "th") and self._text:
            self._text.append(" | ")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._skipping:
            self._skipping = ""
        elif not self._skipping and (tag in _BLOCKS or tag in _HEADINGS):
            self.end_block()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(re.sub(r"\s+", " ", data))

    def end_block(self) -> None:
        text = re.sub(r" *\n *", "\n", "".join(self._text)).strip()
        if text.strip("-| "):
            self.blocks.append(Block(re.sub(r" {2,}", " ", text), self._level))
        self._text, self._level = [], 0
