"""Rich Text Format: text with its paragraphs, headings and tables; no pictures, fields or fonts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.limits import MAX_ENCODED_BYTES, ElementCount

MAX_DEPTH = 1000
# A control word with its number, a byte, a symbol, a brace, or text.
_TOKEN = re.compile(
    rb"\\([a-z]{1,32})(-?\d{1,10})? ?|\\'([0-9a-fA-F]{2})|\\([^a-z'])|([{}])|([^\\{}\r\n]+)",
    re.DOTALL,
)
# Groups that hold no text of the document.
_SKIPPED = frozenset(
    b"fonttbl colortbl stylesheet info pict object header footer headerl headerr headerf footerl "
    b"footerr footerf themedata datastore xmlnstbl listtable listoverridetable generator fldinst "
    b"rsidtbl latentstyles".split()
)
_SAID = {
    b"tab": "\t",
    b"line": "\n",
    b"lbr": "\n",
    b"cell": " | ",
    b"nestcell": " | ",
    b"emspace": " ",
    b"enspace": " ",
    b"qmspace": " ",
    b"emdash": "—",
    b"endash": "–",
    b"bullet": "•",
    b"lquote": "‘",
    b"rquote": "’",
    b"ldblquote": "“",
    b"rdblquote": "”",
}
_SYMBOLS = {b"~": "\xa0", b"_": "-", b"\\": "\\", b"{": "{", b"}": "}"}
_PAGES = {
    page: f"cp{page}"
    for page in (437, 708, 850, 852, 866, 874, 932, 936, 949, 950, *range(1250, 1259))
} | {708: "iso-8859-6", 936: "gb18030", 10000: "mac_roman", 65001: "utf-8"}
_FIRST_PAGES = {b"mac": "mac_roman", b"pc": "cp437", b"pca": "cp850"}
# What a font's number of a character set says of its bytes.
_CHARSETS = {
    **{0: "", 77: "mac_roman", 128: "cp932", 129: "cp949", 134: "gb18030", 136: "big5hkscs"},
    **{161: "cp1253", 162: "cp1254", 163: "cp1258", 177: "cp1255", 178: "cp1256"},
    **{186: "cp1257", 204: "cp1251", 222: "cp874", 238: "cp1250"},
}


def read(data: bytes) -> Iterator[Block]:
    if not data.lstrip()[:5].lower() == b"{\\rtf":
        raise DocumentError("is no RTF; save it as text")
    if len(data) > MAX_ENCODED_BYTES:
        raise DocumentError(f"holds more than {MAX_ENCODED_BYTES >> 20} MiB of RTF; split it")
    return _blocks(data)


def _blocks(data: bytes) -> Iterator[Block]:
    said: list[str] = []
    raw = bytearray()  # bytes that are not decoded yet, since a character may be split
    skipping, after, level, page, row = False, 1, 0, "cp1252", False
    groups: list[tuple[bool, int, str]] = []
    fonts: dict[bytes, str] = {}  # number -> the encoding of its bytes
    listing = 0  # the depth of the list of fonts, while it is read
    named, font = b"", ""  # the font that is listed, and the encoding of the one in use
    left = 0  # characters that old programs show in place of the last \u
    starts = False  # whether a group has just begun
    count = ElementCount(len(data))

    def flush() -> None:
        if raw:
            said.append(raw.decode(font or page, "replace"))
            raw.clear()

    def block() -> Iterator[Block]:
        flush()
        text = "".join(said).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        said.clear()
        if text := text.replace("\0", "").strip(" |\t\n"):
            yield Block(text, level)

    for match in _TOKEN.finditer(data):
        word, number, byte, symbol, brace, text = match.groups()
        begins, starts = starts, False
        count.add()
        if brace == b"{":
            if len(groups) >= MAX_DEPTH:
                raise DocumentError(f"nests RTF deeper than {MAX_DEPTH}")
            groups.append((skipping, after, font))
            starts, left = True, 0
        elif brace:
            if groups:
                if groups[-1][2] != font:
                    flush()
                skipping, after, font = groups.pop()
            left, listing = 0, listing if listing <= len(groups) else 0
        elif symbol == b"*" or (begins and word in _SKIPPED):
            skipping = True
            listing = len(groups) if word == b"fonttbl" else listing
        elif skipping and word != b"bin":
            if listing and word == b"f":
                named = number or b""
            elif listing and word == b"fcharset":
                fonts[named] = _CHARSETS.get(int(number or 0), "")
        elif byte:
            if left:
                left -= 1
            else:
                raw += bytes.fromhex(byte.decode())
        elif text is not None:
            cut = min(left, len(text))
            left -= cut
            raw += text[cut:]
        elif symbol:
            flush()
            said.append(_SYMBOLS.get(symbol, ""))
        elif word == b"u" and number:
            flush()
            code = int(number) % 65536
            said.append(chr(code))
            left = after
        elif word == b"uc" and number:
            after = min(10, max(0, int(number)))
        elif word == b"ansicpg" and number and int(number) in _PAGES:
            page = _PAGES[int(number)]
        elif word == b"f" and fonts.get(number, "") != font:
            flush()
            font = fonts.get(number, "")
        elif word in _FIRST_PAGES:
            page = _FIRST_PAGES[word]
        elif word in (b"deleted", b"v") and number != b"0":
            skipping = True  # until its group ends
        elif word == b"outlinelevel" and number:
            level = min(6, max(0, int(number)) + 1) if int(number) < 9 else 0
        elif word == b"pard":
            level, row = 0, False
        elif word == b"intbl":
            row = True
        elif word == b"bin":
            raise DocumentError("holds binary data, which RTF text has not; save it as text")
        elif word in (b"par", b"sect", b"page", b"row"):
            if word == b"par" and row:
                said.append(" ")
            else:
                yield from block()
        elif word in _SAID:
            flush()
            said.append(_SAID[word])
    yield from block()
