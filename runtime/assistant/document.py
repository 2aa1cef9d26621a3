"""A document: its text, and the chunks that retrieval and prompts work with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pocketslm.runtime.assistant.language import detect
from pocketslm.runtime.assistant.words import each_sentence

if TYPE_CHECKING:
    from pocketslm.runtime.assistant.library import Library

# About 200 tokens of English: three fit a prompt that a small model still reads well.
CHUNK_CHARACTERS = 900
HEADING_CHARACTERS = 120


class Block(NamedTuple):
    """A part that a reader found: a paragraph or heading (level 1 to 6), and its page if known."""

    text: str
    level: int = 0
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage, text[start:end] of its document; ``heading``: the path to it, outermost first."""

    index: int
    start: int
    end: int
    page: int | None
    heading: str


@dataclass(frozen=True, slots=True)
class Source:
    """A document as it was read, before it has a place in a library."""

    title: str
    kind: str
    text: str
    chunks: tuple[Chunk, ...]
    pages: int | None
    language: str


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a library. ``id`` is its number there, ``added`` an ISO time in UTC,
    ``language`` a code of ISO 639-1, empty if the language is not known.
    """

    id: int
    title: str
    kind: str
    added: str
    text: str
    chunks: tuple[Chunk, ...]
    pages: int | None
    language: str
    library: Library

    def passage(self, chunk: Chunk) -> str:
        return self.text[chunk.start : chunk.end]


def make_source(title: str, kind: str, blocks: Iterable[Block]) -> Source:
    """The text of blocks, with a blank line between them, in chunks.

    A chunk ends with a section, or at the end of a sentence near CHUNK_CHARACTERS. A sentence that
    is longer than that is cut.
    """
    parts: list[str] = []
    chunks: list[Chunk] = []
    path: list[tuple[int, str]] = []  # headings above, with their levels
    page: int | None = None
    first: tuple[int, int | None] | None = None  # start and page of the chunk that is open
    body = False  # whether the open chunk holds more than headings
    at = end = 0

    def close() -> None:
        nonlocal first, body
        if first is not None:
            heading = " › ".join(name for _, name in path)
            chunks.append(Chunk(len(chunks), first[0], end, first[1], heading))
        first, body = None, False

    for block in blocks:
        text = block.text.strip()
        if not text:
            continue
        page = block.page or page
        if first and body and (block.level or end - first[0] > CHUNK_CHARACTERS // 2):
            close()
        if block.level:
            path = [(level, name) for level, name in path if level < block.level]
            path.append((block.level, " ".join(text.split())[:HEADING_CHARACTERS]))
        for start, stop in _pieces(text):
            if first is not None and at + stop - first[0] > CHUNK_CHARACTERS:
                close()
            first = first or (at + start, block.page)
            end = at + stop
        body = body or not block.level
        parts.append(text)
        at += len(text) + 2
    close()
    text = "\n\n".join(parts)
    return Source(title, kind, text, tuple(chunks), page, detect(text))


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Sentences, the overlong ones cut at a space."""
    for start, end in each_sentence(text):
        while end - start > CHUNK_CHARACTERS:
            space = text.rfind(" ", start + 1, start + CHUNK_CHARACTERS)
            cut = space if space > start else start + CHUNK_CHARACTERS
            yield start, cut
            start = cut
        yield start, end
