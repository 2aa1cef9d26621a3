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
# Encodings that pages and mails declare. Python knows more, but some do not encode text (hex, bz2),
# and some can make half a surrogate pair (utf-7, unicode_escape).
_DECLARED = re.compile(
    r"iso-?8859-?\d+|latin-?\d|windows-?\d+|cp-?\d+|koi8-?[rtu]|gb18030|euc-?jp|"
    r"iso-?2022-?(jp|kr)|mac-?roman"
)
# Names under which browsers read more than their standards hold (https://encoding.spec.whatwg.org).
_WIDER = {
    name: encodings
    for encodings, names in {
        ("cp1252", "latin-1"): "iso-8859-1 iso8859-1 latin1 latin-1 us-ascii ascii x-cp1252",
        ("cp1254", "latin-1"): "iso-8859-9 iso8859-9 latin5 latin-5",
        ("cp874",): "iso-8859-11 iso8859-11 tis-620 tis620",
        ("gb18030",): "gbk gb2312 gb-2312-80 x-gbk chinese cp936 windows-936",
        ("big5hkscs", "cp950"): "big5 big5-hkscs x-x-big5 cp950",
        ("cp932",): "shift-jis sjis x-sjis ms-kanji windows-31j cp932",
        ("cp949",): "euc-kr euckr ks-c-5601-1987 ks-c-5601-1989 ksc5601 korean windows-949 cp949",
        ("mac_roman",): "macintosh x-mac-roman",
        ("mac_cyrillic",): "x-mac-cyrillic",
        ("cp1251",): "x-cp1251",
        ("cp866",): "ibm866",
    }.items()
    for name in names.split()
}
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

    A few bytes that a declared encoding lacks do not make the text one of Windows-1252. Raises
    DocumentError for data that is not text, or is too long.
    """
    if len(data) > MAX_ENCODED_BYTES:
        raise DocumentError(f"holds more than {MAX_ENCODED_BYTES >> 20} MiB of text; split it")
    marked = [encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)]
    known = declared.lower().replace("_", "-")
    believed = _WIDER.get(known) or ((known,) if _DECLARED.fullmatch(known) else ())
    exact = marked or [*believed, "utf-8"]
    tries = [(encoding, "strict") for encoding in exact]
    tries += [] if marked else [*((name, "replace") for name in believed[:1]), ("cp1252", "strict")]
    for encoding, errors in tries:
        try:
            text = data.decode(encoding, errors)
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
