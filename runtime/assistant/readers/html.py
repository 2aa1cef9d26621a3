"""HTML, and the chapters of an EPUB: text of the body, with its headings.

It uses a scanner of our own. ``html.parser`` takes quadratic time for tags that do not end, in some
versions of Python. Here every failed search is made only once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape

from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.limits import ElementCount
from pocketslm.runtime.assistant.readers.text import decode

_CHARSET = re.compile(
    rb"(?:charset|<\?xml[^<>]{1,40}encoding)\s*+=[\s\"']*+([\w-]+)", re.IGNORECASE
)
_OPENING = re.compile(r"<(!--|[!?]|/?[a-zA-Z]|/)")
_TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*+)(?:[^>=]++|=\s*+(?:\"[^\"]*+\"|'[^']*+')?+)*+>")
_TAG_TO_FIRST_END = re.compile(r"<(/?)([a-zA-Z][^\s/>]*+)[^>]*+>")
_LONG_NUMBER = re.compile(r"&#[xX]?[0-9a-fA-F]{9,}+;?")
_SPACE = re.compile(r"\s++")
_SPACES, _LINE_END = re.compile(" {2,}+"), re.compile(" ?\n ?")
_POWER = re.compile(r"[-+−]?\d")  # 10 to the power of 6 is no 106
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
# Elements whose content is not text to read. ``head`` needs no entry: its other elements are empty.
_SKIPPED = {
    name: re.compile(rf"</(?i:{name})(?=[\s/>])")
    for name in (
        *("script", "style", "title", "nav", "template"),
        *("svg", "noscript", "iframe", "select"),
    )
}
_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        "address article aside blockquote body dd details div dl dt figcaption figure footer form "
        "header hr li main ol p pre section table tbody thead tr ul",
    )
)


def read(data: bytes, count: ElementCount | None = None) -> Iterator[Block]:
    """The blocks of a page. ``count`` counts the tags of a file with several pages."""
    charset = _CHARSET.search(data[:2048])
    markup = decode(data, charset[1].decode("ascii") if charset else "")
    return parse(markup, count or ElementCount(len(data)))


def parse(markup: str, count: ElementCount) -> Iterator[Block]:
    """The blocks of a page. A broken or unclosed tag costs structure, never text."""
    page = _Page()
    for tag, text in _pieces(markup, count):
        if block := page.take(tag, text):
            yield block
    if block := page.end_block():
        yield block


def _pieces(markup: str, count: ElementCount) -> Iterator[tuple[str, str]]:
    """The tags and the text of a page that are to be read, in order; one of both is empty.

    A tag is its name, with a slash before it if it ends an element.
    """
    missing: set[str] = set()  # marks that do not occur any more
    tag = _TAG

    def end_of(mark: str, start: int) -> int:
        """The end of the next ``mark``, or 0 if there is none."""
        if mark in missing:
            return 0
        if mark in _SKIPPED:
            found = _SKIPPED[mark].search(markup, start)
            place = found.start() if found else -1
        else:
            place = markup.find(mark, start)
        if place < 0:
            missing.add(mark)
            return 0
        return place if mark in _SKIPPED else place + len(mark)

    at = text_from = 0
    while (start := markup.find("<", at)) >= 0:
        count.add()
        name, end = "", 0
        if found := ">" not in missing and tag.match(markup, start):
            end, name = found.end(), found[1] + found[2].lower()
        elif (opening := _OPENING.match(markup, start)) and opening[1] == "!--":
            end = end_of("-->", start + len("<!")) or opening.end()
        elif opening:
            end = end_of(">", start)
            if end and opening[1][-1].isalpha():
                # Its quotes do not close, so other quotes do not count either.
                tag = _TAG_TO_FIRST_END
                if found := tag.match(markup, start):
                    end, name = found.end(), found[1] + found[2].lower()
        if not end:  # a "<" that is text
            at = start + 1
            continue
        if start > text_from:
            yield "", markup[text_from:start]
        if name in _SKIPPED:
            end = end_of(name, end) or end
        elif name:
            yield name, ""
        at = text_from = end
    if text_from < len(markup):
        yield "", markup[text_from:]


class _Page:
    """Puts pieces together into blocks."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._level = 0
        self._raised = False  # whether the text that comes is a superscript

    def take(self, tag: str, text: str) -> Block | None:
        """Add a tag or text. Returns the block that it ends."""
        ended, name = None, tag.removeprefix("/")
        if tag:
            self._raised = tag == "sup"
        if not tag:
            if "&" in text:
                text = unescape(_LONG_NUMBER.sub("\ufffd", text))
            if self._raised and self._text and _POWER.match(text) and self._text[-1][-1:].isdigit():
                self._text.append("^")
            self._text.append(_SPACE.sub(" ", text))
        elif name in _HEADINGS or name in _BLOCKS:
            ended = self.end_block()
            if tag in _HEADINGS:
                self._level = _HEADINGS[tag]
            elif tag == "li":
                self._text.append("- ")
        elif tag == "br":
            self._text.append("\n")
        elif tag in ("td", "th") and self._text:
            self._text.append(" | ")
        return ended

    def end_block(self) -> Block | None:
        ended = None
        if self._text:
            text = _SPACES.sub(" ", "".join(self._text))
            text = _LINE_END.sub("\n", text).strip()
            if text.strip("-| "):
                ended = Block(text, self._level)
            self._text = []
        self._level = 0
        return ended
