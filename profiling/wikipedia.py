"""Articles of the Wikipedia dump of the catalog, without their markup."""

from __future__ import annotations

import bz2
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


def article(wiki: Path, title: str) -> Iterator[Block]:
    """Paragraphs and headings of an article in the XML dump, without its markup."""
    import html

    dump = bz2.decompress(wiki.read_bytes()).decode("utf-8")
    page = dump[dump.index(f"<title>{title}</title>") :]
    text = html.unescape(page[page.index("<text") : page.index("</text>")].partition(">")[2])
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
