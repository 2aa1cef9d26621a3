"""Articles of the Wikipedia dump of the catalog, without their markup."""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Iterator
from pathlib import Path

from pocketslm.runtime.assistant.document import Block

_NESTED = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_MARKUP = (
    (re.compile(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery).*?</\1>", re.DOTALL), ""),
    (re.compile(r"<[^>]+>|'{2,}|__\w+__"), ""),
    (re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"), ""),
    (re.compile(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]"), r"\1"),
    (re.compile(r"\[https?://\S+ ?([^\]]*)\]"), r"\1"),
    (re.compile(r"\([\s,;]*\)|&nbsp;"), " "),
)
_HEADING = re.compile(r"(={2,6})\s*(.+?)\s*\1$")
_LAST = ("See also", "References", "Notes", "External links", "Further reading")


_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
_SENTENCES = 200  # the least characters of a paragraph of prose


def article(wiki: Path, title: str) -> Iterator[Block]:
    """Paragraphs and headings of an article in the XML dump, without its markup."""
    dump = bz2.decompress(wiki.read_bytes()).decode("utf-8")
    page = _PAGE.match(dump, dump.index(f"<title>{title}</title>"))
    assert page is not None
    return _blocks(page[2])


def prose(wiki: Path) -> str:
    """The paragraphs of all articles, one per line, with an empty line between articles.

    Raises ValueError if the file is not such a dump.
    """
    try:
        dump = bz2.decompress(wiki.read_bytes()).decode("utf-8")
    except (OSError, EOFError) as error:
        raise ValueError(f"not a bz2 file: {error}") from None
    articles = []
    for page in _PAGE.finditer(dump):
        blocks = (block.text for block in _blocks(page[2]) if not block.level)
        if text := "\n".join(text for text in blocks if len(text) >= _SENTENCES):
            articles.append(text)
    if not articles:
        raise ValueError("no dump of articles")
    return "\n\n".join(articles)


def _blocks(markup: str) -> Iterator[Block]:
    text = html.unescape(markup)
    count = 1
    while count:
        text, count = _NESTED.subn("", text)
    for pattern, put in _MARKUP:
        text = pattern.sub(put, text)
    for line in text.splitlines():
        if heading := _HEADING.match(line.strip()):
            if heading[2] in _LAST:
                return
            yield Block(heading[2], len(heading[1]) - 1)
        elif line[:1] not in ("|", "!", ":", "*", "#", ";", "{", "}"):
            yield Block(line)
