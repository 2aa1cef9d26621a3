"""PowerPoint presentations: each slide a page, its title a heading; tables row by row."""

from __future__ import annotations

from collections.abc import Iterator

from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.archive import Archive, parse_xml, relation_of, relations
from pocketslm.runtime.assistant.readers.limits import BlockCount

_SHOW = "ppt/presentation.xml"
_TITLES = ("title", "ctrTitle")


def read(data: bytes) -> Iterator[Block]:
    archive = Archive(data)
    order: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag.rpartition(" ")[2] == "sldId":
            order.append(relation_of(attributes))

    parse_xml(archive.read(_SHOW), start, count=archive.elements)
    targets, names = relations(archive, _SHOW), set(archive.names())
    count = BlockCount()
    files = [targets[part] for part in dict.fromkeys(order) if part in targets]
    for page, file in enumerate((file for file in files if file in names), 1):
        yield from _Slide(archive, file, page, count).blocks


class _Slide:
    """A slide's paragraphs and rows; its title comes first, wherever it stands."""

    def __init__(self, archive: Archive, file: str, page: int, count: BlockCount) -> None:
        self.blocks: list[Block] = []
        self._page, self._count = page, count
        self._parts: list[str] = []
        self._title = self._reading = False
        self._rows = 0
        xml = archive.read(file)
        parse_xml(xml, self._start, self._end, self._text, count=archive.elements)
        self.blocks.sort(key=lambda block: not block.level)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        match tag.rpartition(" ")[2]:
            case "sp":
                self._title = False
            case "ph":
                self._title = attributes.get("type") in _TITLES
            case "tr":
                self._rows += 1
            case "t":
                self._reading = True
            case "br":
                self._parts.append("\n")

    def _end(self, tag: str) -> None:
        match tag.rpartition(" ")[2]:
            case "t":
                self._reading = False
            case "sp":
                self._title = False
            case "tc":
                self._parts.append(" | ")
            case "tr":
                self._rows -= 1
                self._end_block()
            case "p" if self._rows:
                self._parts.append(" ")
            case "p":
                self._end_block()

    def _text(self, text: str) -> None:
        if self._reading:
            self._parts.append(text)

    def _end_block(self) -> None:
        text = "".join(self._parts).replace(" \n", "\n").replace("  | ", " | ").strip(" |\n")
        self._parts.clear()
        if text:
            block = Block(text, int(self._title), self._page)
            self._count.add(block)
            self.blocks.append(block)
