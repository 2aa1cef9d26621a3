"""Word documents: paragraphs, headings by style, tables row by row, Word's own page breaks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.archive import Archive, parse_xml
from pocketslm.runtime.assistant.readers.limits import BlockCount, check_characters

# Namespaces as Word writes them, and those of the standard's "strict" form.
_NAMESPACES = frozenset(
    (
        "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
        "http://purl.oclc.org/ooxml/wordprocessingml/main",
    )
)
# What stands elsewhere, too: a drawing for old programs, text that a tracked change moves away.
_COPIES = ("http://schemas.openxmlformats.org/markup-compatibility/2006 Fallback", "moveFrom")
_HEADING = re.compile(r"(?:heading|berschrift|titre|titolo|kop) ?(\d)", re.IGNORECASE)
_MARKS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_BEFORE_CELL_END = re.compile(r"(?<! ) ++\| ")


def read(data: bytes) -> Iterator[Block]:
    body = _Body()
    archive = Archive(data)
    xml = archive.read("word/document.xml")
    parse_xml(xml, body.start, body.end, body.text, count=archive.elements)
    # Pages begin where Word broke them when it last saved. A file without breaks has no pages.
    return (block if body.pages > 1 else block._replace(page=None) for block in body.blocks)


class _Paragraph:
    """The paragraph or table row that is being read."""

    def __init__(self, begins: int) -> None:
        self.parts: list[str] = []
        self.level = 0
        self.begins = begins  # its page
        self.rows = 0  # that are open


class _Body:
    """The content of ``word/document.xml``, event by event."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.pages = 1
        self._count = BlockCount()
        self._characters = 0  # of all text, including text that is not yet in a block
        self._now = _Paragraph(self.pages)
        self._around: list[_Paragraph] = []  # those that hold the text box that is being read
        self._name = lru_cache(1024)(_name)  # a document has many tags of few names
        self._in_text = False
        self._skipping = 0  # how many nested copies are open

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = self._name(tag)
        if self._skipping or name in _COPIES:
            self._skipping += name in _COPIES
            return
        now = self._now
        match name:
            case "t":
                self._in_text = True
            case "pStyle":
                style = _value(attributes, "val")
                heading = _HEADING.search(style)
                now.level = min(6, int(heading[1])) if heading else int(style == "Title")
            case "lastRenderedPageBreak":
                self._break()
            case "br" if _value(attributes, "type") == "page":
                self._break()
            case "tr":
                now.rows += 1
            case "txbxContent":
                self._around.append(now)
                self._now = _Paragraph(self.pages)
            case mark if mark in _MARKS:
                now.parts.append(_MARKS[mark])

    def end(self, tag: str) -> None:
        name = self._name(tag)
        if self._skipping:
            self._skipping -= name in _COPIES
            return
        now = self._now
        match name:
            case "t":
                self._in_text = False
            case "tc":
                now.parts.append(" | ")
            case "tr":
                now.rows -= 1
                self._end_block()
            case "p" if now.rows:
                now.parts.append(" ")
            case "p":
                self._end_block()
            case "txbxContent" if self._around:
                self._end_block()
                self._now = self._around.pop()

    def text(self, text: str) -> None:
        if self._in_text and not self._skipping:
            self._characters += len(text)
            check_characters(self._characters)
            self._now.parts.append(text)

    def _break(self) -> None:
        self.pages += 1
        if all(part.isspace() for part in self._now.parts):
            self._now.parts.clear()
            self._now.begins = self.pages

    def _end_block(self) -> None:
        now = self._now
        text = _BEFORE_CELL_END.sub(" | ", "".join(now.parts)).strip(" |\t\n")
        if text:
            block = Block(text, now.level, now.begins)
            self._count.add(block)
            self.blocks.append(block)
        now.parts.clear()
        now.level, now.begins = 0, self.pages


def _name(tag: str) -> str:
    """The tag without Word's namespace. Tags of other namespaces stay as they are."""
    namespace, _, name = tag.rpartition(" ")
    return name if namespace in _NAMESPACES else tag


def _value(attributes: dict[str, str], name: str) -> str:
    return next((v for tag, v in attributes.items() if _name(tag) == name), "")
