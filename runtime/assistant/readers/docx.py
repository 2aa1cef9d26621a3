"""Word documents: paragraphs, headings by style, tables row by row, Word's own page breaks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.archive import Archive, parse_xml

_NAMESPACE = "http://schemas.openxmlformats.org/wordprocessingml/2006/main "
_HEADING = re.compile(r"(?:heading|berschrift|titre|titolo|kop) ?(\d)", re.IGNORECASE)
_MARKS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}


def read(data: bytes) -> Iterator[Block]:
    body = _Body()
    parse_xml(Archive(data).read("word/document.xml"), body.start, body.end, body.text)
    # Pages are where Word broke them when it last saved; a file without breaks names none.
    return (block if body.pages > 1 else block._replace(page=None) for block in body.blocks)


class _Body:
    """What ``word/document.xml`` says, event by event."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._parts: list[str] = []
        self._level = 0
        self.pages = self._begins = 1
        self._in_text = False
        self._rows = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        match tag.removeprefix(_NAMESPACE):
            case "t":
                self._in_text = True
            case "pStyle":
                style = attributes.get(_NAMESPACE + "val", "")
                heading = _HEADING.search(style)
                self._level = min(6, int(heading[1])) if heading else int(style == "Title")
            case "lastRenderedPageBreak":
                self._break()
            case "br" if attributes.get(_NAMESPACE + "type") == "page":
                self._break()
            case "tr":
                self._rows += 1
            case mark if mark in _MARKS:
                self._parts.append(_MARKS[mark])

    def end(self, tag: str) -> None:
        match tag.removeprefix(_NAMESPACE):
            case "t":
                self._in_text = False
            case "tc":
                self._parts.append(" | ")
            case "tr":
                self._rows -= 1
                self._end_block()
            case "p" if self._rows:
                self._parts.append(" ")
            case "p":
                self._end_block()

    def text(self, text: str) -> None:
        if self._in_text:
            self._parts.append(text)

    def _break(self) -> None:
        self.pages += 1
        if not "".join(self._parts).strip():
            self._begins = self.pages

    def _end_block(self) -> None:
        text = re.sub(r" +\| ", " | ", "".join(self._parts)).strip(" |\t\n")
        self.blocks.append(Block(text, self._level, self._begins))
        self._parts, self._level, self._begins = [], 0, self.pages
