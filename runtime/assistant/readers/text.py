"""Plain text: blank lines separate paragraphs, and a form feed begins a page."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.limits import MAX_ENCODED_BYTES, check_characters

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Encodings that pages declare. Python knows more, but some do not encode text (hex, bz2), and some
# can make half a surrogate pair (utf-7, unicode_escape).
_DECLARED = re.compile(
    r"iso-?8859-?\d+|latin-?\d|windows-?\d+|cp-?\d+|koi8-?[rtu]|gbk|gb2312|gb18030|big5(-?hkscs)?|"
    r"shift-?jis|sjis|euc-?(jp|kr)|iso-?2022-?(jp|kr)|macintosh|mac-?roman|tis-?620|us-ascii"
)
_PAGE_END, _LINE_END = re.compile("\f"), re.compile("\n")
BLANK_LINE = re.compile(r"\n\s*\n")
LIST_ITEM = re.compile(r"\s*+(?:[-*•+]|\d{1,3}[.)])\s")
# Shorter lines belong to verse, code or a table, and keep their ends.
_WRAPPED = 50
HEADING_LEVEL, HEADING_CHARACTERS = 2, 70
MOST_LINES = 40


def read(data: bytes) -> Iterator[Block]:
    text = decode(data)
    check_characters(len(text))
    paged = "\f" in text
    for number, page in enumerate(split(_PAGE_END, text), 1):
        place = number if paged else None
        before = ""  # the last paragraph; the next one decides whether it is a heading
        for paragraph in split(BLANK_LINE, page):
            if before.strip():
                level = HEADING_LEVEL if _heads(before, paragraph) else 0
                yield Block(unwrap(before), level, place)
            before = paragraph
        if before.strip():
            yield Block(unwrap(before), 0, place)


def _heads(paragraph: str, after: str) -> bool:
    """Whether a paragraph looks like the heading of the one after it."""
    line = paragraph.strip()
    return (
        len(line) <= HEADING_CHARACTERS
        and "\n" not in line
        and line[-1:] not in ".,;:!…。，；："
        and line[0] not in "-*•+"
        and (line[0].isupper() or not line[0].islower())
        and len(after.strip()) > len(line)
    )


def read_lines(data: bytes) -> Iterator[Block]:
    """Read logs and source code. Every line stays a line; at most MOST_LINES make a block."""
    text = decode(data)
    check_characters(len(text))
    part: list[str] = []
    for line in lines(text):
        if part and (not line.strip() or len(part) == MOST_LINES):
            yield Block("\n".join(part))
            part = []
        if line.strip():
            part.append(line.rstrip())
    if part:
        yield Block("\n".join(part))


def decode(data: bytes, declared: str = "") -> str:
    """Decode UTF-8, UTF-16 with its mark, the encoding ``declared``, or Windows-1252.

    Raises DocumentError for data that is not text, or is too long.
    """
    if len(data) > MAX_ENCODED_BYTES:
        raise DocumentError(f"holds more than {MAX_ENCODED_BYTES >> 20} MiB of text; split it")
    marked = [encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)]
    known = declared.lower().replace("_", "-")
    believed = [known] if _DECLARED.fullmatch(known) else []
    for encoding in marked or [*believed, "utf-8", "cp1252"]:
        try:
            text = data.decode(encoding)
            break
        except (UnicodeDecodeError, LookupError):
            continue
    else:
        raise DocumentError("is not text; save it as UTF-8")
    if "\0" in text or any(mark in text[:4096] for mark in map(chr, range(1, 9))):
        raise DocumentError("is not text; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split(separator: re.Pattern[str], text: str) -> Iterator[str]:
    """As ``separator.split(text)``, one part at a time."""
    start = 0
    for match in separator.finditer(text):
        yield text[start : match.start()]
        start = match.end()
    yield text[start:]


def lines(text: str) -> Iterator[str]:
    return split(_LINE_END, text)


def unwrap(paragraph: str) -> str:
    """Join the lines of a paragraph that an editor had wrapped."""
    joined = io.StringIO()
    length = 0  # of the line that is being joined
    for line in lines(paragraph):
        wrapped = length >= _WRAPPED and not LIST_ITEM.match(line)
        if joined.tell():
            joined.write(" " if wrapped else "\n")
        line = line.strip()
        length = length + 1 + len(line) if wrapped else len(line)
        joined.write(line)
    return joined.getvalue()
