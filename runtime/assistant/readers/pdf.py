"""PDF by pypdf, page by page: paragraphs by the space above a line, headings by their size."""

from __future__ import annotations

import io
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from pocketslm.errors import DocumentError, LockedError
from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers import ocr
from pocketslm.runtime.assistant.readers.text import LIST_ITEM

MAX_PAGES = 5000
MAX_PICTURES = 1000  # of pages without text: each takes Tesseract a second or more
MAX_UNPACKED = 32 << 20  # of one stream
HEADING = 1.15  # times the size of the page's text
TITLE = 1.35
FULL = 0.7  # of the longest line of a paragraph: shorter ones end where their author ended them
GAP = 1.35  # times the usual way from line to line begins a paragraph
HEADING_CHARACTERS = 120
_HYPHENATED = re.compile(r"[^\W\d_](?:-|\u00ad|\u2010)$")
# Ligatures, which fonts have and nobody types.
_LIGATURES = {
    code: unicodedata.normalize("NFKC", chr(code)) for code in (*range(0xFB00, 0xFB07), 0xA0)
}


def read(data: bytes, password: str = "") -> Iterator[Block]:
    try:
        from pypdf import PdfReader, apply_configuration, errors, get_configuration

        from pocketslm.runtime.assistant.readers import pdf_streams
    except ImportError:
        raise DocumentError(
            "is a PDF, which needs pypdf; `pip install pocketslm[assistant]`"
        ) from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings are not for our users
    limits = get_configuration().with_overwrites(
        zlib_maximum_output_length=MAX_UNPACKED,
        lzw_maximum_output_length=MAX_UNPACKED,
        run_length_maximum_output_length=MAX_UNPACKED,
    )
    work = pdf_streams.Work(len(data))
    pictures = 0
    try:
        with apply_configuration(limits):
            reader = PdfReader(io.BytesIO(data), strict=False)
            if reader.is_encrypted and not (reader.decrypt("") or reader.decrypt(password)):
                raise LockedError("needs another password" if password else "needs a password")
            if (count := len(reader.pages)) > MAX_PAGES:
                raise DocumentError(f"has {count} pages, at most {MAX_PAGES} are read")
        for number in range(1, count + 1):
            page = _Page()
            with apply_configuration(limits), pdf_streams.counting(work):
                source = reader.pages[number - 1]
                source.extract_text(visitor_text=page.take)
                blocks = list(page.blocks(number))
                if not blocks and ocr.available():
                    for picture in ocr.pictures_of(source):
                        pictures += 1
                        if pictures > MAX_PICTURES:
                            raise DocumentError(f"has more than {MAX_PICTURES} pictures; split it")
                        blocks += ocr.read_picture(picture, number)
            yield from blocks
            work.end_page(reader.resolved_objects)
    except pdf_streams.Exhausted:
        raise DocumentError("draws too much on its pages for its size; print it anew") from None
    except DocumentError:
        raise
    except GeneratorExit:
        raise
    except errors.DependencyError:
        raise DocumentError(
            "is encrypted, which needs cryptography; `pip install cryptography`, or save it without"
        ) from None
    # pypdf raises many kinds for files that are damaged on purpose, RecursionError among them.
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DocumentError(f"is a damaged PDF: {reason}") from None


class _Line(NamedTuple):
    text: str
    size: float
    y: float


class _Page:
    """The lines of a page with the size of their letters and their height on the page."""

    def __init__(self) -> None:
        self._lines: list[_Line] = []
        self._parts: list[str] = []
        self._size = self._y = 0.0
        self._fresh = True

    def take(self, text: str, cm: list[float], tm: list[float], _: Any, size: Any) -> None:
        """Take a piece of text from pypdf, with the matrices that place it."""
        text = text.translate(_LIGATURES).encode("utf-8", "replace").decode("utf-8")
        first, *others = text.split("\n")
        self._add(first, cm, tm, size)
        for other in others:
            self._end_line()
            self._add(other, cm, tm, size)

    def _add(self, text: str, cm: list[float], tm: list[float], size: Any) -> None:
        if not text:
            return
        self._parts.append(text)
        if text.strip():
            scale = (abs(tm[0] * tm[3] - tm[1] * tm[2]) * abs(cm[0] * cm[3] - cm[1] * cm[2])) ** 0.5
            self._size = max(self._size, abs(float(size)) * scale)
            if self._fresh:
                self._y = tm[4] * cm[1] + tm[5] * cm[3] + cm[5]
                self._fresh = False

    def _end_line(self) -> None:
        if text := "".join(self._parts).strip():
            self._lines.append(_Line(text, self._size, self._y))
        elif self._lines:
            self._lines.append(_Line("", 0.0, self._y))
        self._parts, self._size, self._fresh = [], 0.0, True

    def blocks(self, number: int) -> Iterator[Block]:
        """The page's paragraphs and headings."""
        self._end_line()
        sizes: Counter[float] = Counter()
        for line in self._lines:
            sizes[round(line.size, 1)] += len(line.text)
        usual = max(sizes, key=sizes.__getitem__, default=0.0)
        leading = _leading([line for line in self._lines if round(line.size, 1) == usual])
        paragraph: list[str] = []
        level, before = 0, None

        def end() -> Iterator[Block]:
            if paragraph:
                yield Block(_joined(paragraph, FULL if not level else 0), level, number)
                paragraph.clear()

        for line in self._lines:
            now = _level(line, usual)
            down = before.y - line.y if before else 0.0
            far = leading and down > GAP * max(leading, line.size)
            if not line.text or now != level or (far and before):
                yield from end()
            if line.text:
                level, before = now, line
                paragraph.append(line.text)
        yield from end()


def _level(line: _Line, usual: float) -> int:
    if not usual or line.size < HEADING * usual or len(line.text) > HEADING_CHARACTERS:
        return 0
    return 1 if line.size >= TITLE * usual else 2


def _leading(lines: list[_Line]) -> float:
    """The usual distance from a line to the next."""
    ways: Counter[float] = Counter()
    for one, other in pairwise(lines):
        if 0 < one.y - other.y < 4 * one.size:
            ways[round(one.y - other.y, 1)] += 1
    return max(ways, key=ways.__getitem__, default=0.0)


def _joined(lines: list[str], full: float) -> str:
    """Join the lines of a paragraph. Lines shorter than ``full`` times the longest end an item or a
    verse, and keep their ends. Words that a line end had divided become whole again.
    """
    least = full * max(map(len, lines))
    parts: list[str] = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if _HYPHENATED.search(line) and after[:1].islower():
            parts.append(line[:-1])
        else:
            wrapped = len(line) >= least and not LIST_ITEM.match(after)
            parts.append(line + (" " if wrapped else "\n"))
    return "".join(parts).rstrip()
