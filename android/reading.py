"""What the screens show of documents and answers, worked out without a screen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pocketslm.runtime.assistant.answer import Answer, Citation
from pocketslm.runtime.assistant.document import Document
from pocketslm.runtime.assistant.library import Entry

# A label of more than this may be higher than a graphics card's largest texture, and stays black:
# 60 lines of 34 pixels at three pixels a point are 6,000 of at least 4,096 to 16,384.
PIECE_LINES, PIECE_CHARACTERS = 24, 1200
QUOTE_CHARACTERS = 28  # of a passage, on its button


def pieces(text: str) -> Iterator[tuple[int, int]]:
    """Where the parts of a text that are shown as one label each begin and end: its paragraphs, the
    long ones cut after a line, or after a word."""
    at = 0
    for paragraph in text.split("\n\n"):
        end = at + len(paragraph)
        while at < end:
            stop = _cut(text, at, end)
            if text[at:stop].strip():
                yield at, stop
            at = stop
        at = end + len("\n\n")


def _cut(text: str, start: int, end: int) -> int:
    """The end of the part that begins at ``start``."""
    most = min(end, start + PIECE_CHARACTERS)
    at = start
    for _ in range(PIECE_LINES):
        line = text.find("\n", at, most)
        if line < 0:
            break
        at = line + 1
    else:
        return at
    if most == end:
        return end
    if at > start:
        return at
    space = text.rfind(" ", start, most)
    return space + 1 if space > start else most


def next_place(text: str, wanted: str, after: int = 0) -> tuple[int, int] | None:
    """The next place of a text in another, in capitals or not; behind the last comes the first."""
    if not (wanted := wanted.strip()):
        return None
    pattern = re.compile(re.escape(wanted), re.IGNORECASE)
    found = pattern.search(text, after) or pattern.search(text)
    return found.span() if found else None


def shared(answer: Answer, documents: dict[int, Document]) -> str:
    """An answer as it is sent to others: what was asked, all of the text, and where it stands."""
    lines = [answer.request, answer.text] if answer.request else [answer.text]
    places = dict.fromkeys(
        place_of(documents[c.document], c) for c in answer.citations if c.document in documents
    )
    return "\n\n".join([*lines, "\n".join(places)]).strip()


def place_of(document: Document, citation: Citation) -> str:
    """The title, page and heading of a passage."""
    chunk = document.chunks[citation.chunk]
    page = f"p. {chunk.page}" if chunk.page else ""
    return ", ".join(filter(None, (document.title, page, chunk.heading)))


def button_of(document: Document, citation: Citation, number: int, *, named: bool = False) -> str:
    """What the button of a passage says: its document if ``named``, its page or heading, and its
    first words."""
    chunk = document.chunks[citation.chunk]
    where = f"p. {chunk.page}" if chunk.page else chunk.heading.rpartition(" › ")[2]
    title = document.title[:QUOTE_CHARACTERS] if named else ""
    words = " ".join(document.text[citation.start : citation.end].split())
    short = words if len(words) <= QUOTE_CHARACTERS else f"{words[:QUOTE_CHARACTERS].rstrip()}…"
    return " · ".join(filter(None, (f"{number}", title, where[:QUOTE_CHARACTERS], short)))


def in_order(entries: Sequence[Entry], by: str) -> list[Entry]:
    """Documents by title, or by kind and title; else as they are, the newest first."""
    if by == "title":
        return sorted(entries, key=lambda entry: entry.title.casefold())
    if by == "kind":
        return sorted(entries, key=lambda entry: (entry.kind, entry.title.casefold()))
    return list(entries)


_HEADING = re.compile(r"#{1,6}\s+(.*?)(?:\s+#+)?")
_ITEM = re.compile(r"(\s*)[-*+]\s+(.*)")
_STRONG = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
_SOFT = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*]+?)(?<=[^\s*])\*(?![\w*])")


def markup_of(text: str) -> str:
    """A model's Markdown as Kivy's markup: headings and strong text bold, stress in italics, and
    points with their dots. All else is shown as it is, code too."""
    return "\n".join(map(_line_of, text.split("\n")))


def _line_of(line: str) -> str:
    line = line.replace("&", "&amp;").replace("[", "&bl;").replace("]", "&br;")
    if found := _HEADING.fullmatch(line):
        return f"[b]{_STRONG.sub(lambda strong: strong[2], found[1])}[/b]"
    if found := _ITEM.fullmatch(line):
        line = f"{found[1]}\u2022 {found[2]}"
    line = _STRONG.sub(lambda strong: f"[b]{strong[2]}[/b]", line)
    return _SOFT.sub(lambda soft: f"[i]{soft[1]}[/i]", line)
