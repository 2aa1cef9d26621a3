"""OpenDocument texts: headings, paragraphs, lists; tables row by row; the program's own pages."""

from __future__ import annotations

from collections.abc import Iterator

from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.archive import Archive, parse_xml
from pocketslm.runtime.assistant.readers.limits import BlockCount

_OASIS = "urn:oasis:names:tc:opendocument:xmlns:"
# Elements that are not text of the document: deleted text and comments.
_SKIPPED = (f"{_OASIS}text:1.0 tracked-changes", f"{_OASIS}office:1.0 annotation")
_MOST_SPACES = 100  # for which one mark can stand


def read(data: bytes) -> Iterator[Block]:
    body = _Body()
    archive = Archive(data)
    xml = archive.read("content.xml")
    parse_xml(xml, body.start, body.end, body.text, count=archive.elements)
    return (block if body.pages > 1 else block._replace(page=None) for block in body.blocks)


class _Body:
    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.pages = 1
        self._count = BlockCount()
        self._parts: list[str] = []
        self._level = self._paragraphs = self._rows = self._skipping = 0
        self._item = False  # whether a list item has just begun
        # Notes and text boxes stand within a paragraph, which goes on after them.
        self._around: list[tuple[list[str], int, int, int, bool]] = []
        self._citing = 0  # a note's number
        self._after: list[Block] = []  # notes of the paragraph that is being read

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if self._skipping or tag in _SKIPPED:
            self._skipping += tag in _SKIPPED
            return
        match _name(tag):
            case "note-body" | "text-box":
                state = self._parts, self._level, self._paragraphs, self._rows, self._item
                self._around.append(state)
                self._parts, self._level, self._paragraphs, self._rows = [], 0, 0, 0
                self._item = False
            case "note-citation":
                self._citing += 1
            case "h":
                self._paragraphs += 1
                level = attributes.get(f"{_OASIS}text:1.0 outline-level", "1")
                self._level = min(6, max(1, int(level))) if level in "123456789" else 6
            case "p":
                self._paragraphs += 1
            case "list-item":
                self._item = True
            case "table-row":
                self._rows += 1
            case "tab":
                self._parts.append("\t")
            case "line-break":
                self._parts.append("\n")
            case "soft-page-break":
                self.pages += 1
            case "s":
                often = attributes.get(f"{_OASIS}text:1.0 c", "1")
                many = len(often) > 3 or not often.isdecimal()
                self._parts.append(" " * (1 if many else min(_MOST_SPACES, int(often))))

    def end(self, tag: str) -> None:
        if self._skipping:
            self._skipping -= tag in _SKIPPED
            return
        match _name(tag):
            case "note-body" | "text-box" if self._around:
                self._end_block()
                state = self._around.pop()
                self._parts, self._level, self._paragraphs, self._rows, self._item = state
            case "note-citation":
                self._citing -= 1
            case "table-cell" if self._rows:
                self._parts.append(" | ")
            case "table-row":
                self._rows -= 1
                self._end_block()
            case "h" | "p":
                self._paragraphs -= 1
                if self._rows:
                    self._parts.append(" ")
                else:
                    self._end_block()

    def text(self, text: str) -> None:
        if self._paragraphs and not self._skipping and not self._citing:
            self._parts.append(text.replace("\n", " "))

    def _end_block(self) -> None:
        text = "".join(self._parts).replace("  | ", " | ").strip(" |\t\n")
        self._parts.clear()
        if text:
            block = Block(f"- {text}" if self._item and not self._level else text, self._level)
            block = block._replace(page=self.pages)
            self._count.add(block)
            (self._after if self._around else self.blocks).append(block)
        if not self._around:
            self.blocks += self._after
            self._after.clear()
        self._level, self._item = 0, False


def _name(tag: str) -> str:
    """The name of an OpenDocument tag without its namespace."""
    namespace, _, name = tag.rpartition(" ")
    return name if namespace.startswith(_OASIS) else ""
