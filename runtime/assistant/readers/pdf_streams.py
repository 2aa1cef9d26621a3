"""What pages draw, for pypdf: the text that its own parser finds, in a fraction of the time.

pypdf parses content streams byte by byte, in Python. The scanner here matches whole tokens, skips
what draws no text, and leaves a stream with unusual parts to pypdf. Everything that is done for a
file counts, in forms and fonts too, so that a small file cannot ask for much.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from itertools import islice
from typing import IO, Any, NamedTuple

import pypdf._page
import pypdf._text_extraction
from pypdf import apply_configuration, get_configuration
from pypdf._text_extraction import get_display_str, get_text_operands
from pypdf._text_extraction._text_extractor import TextExtraction
from pypdf.generic import ArrayObject, ContentStream, NameObject, StreamObject, read_object
from pypdf.generic._font import Font

# Thousandths of an em. Typesetters that justify draw no spaces but move the pen by 180 to 400.
WIDEST_JOINT = 140
# Work is counted in units of a fifth of a microsecond or so.
UNITS_OF_SMALL, UNITS_A_BYTE = 2_000_000, 18  # what a file may ask for: the larger of both
BYTES_A_UNIT = 8  # of a stream
CHARACTERS_A_UNIT = 2  # of the text that is shown
UNITS_OF_OPERATION = 6  # any, and each of its tokens one more
UNITS_OF_STEP = 12  # more, to show a string or to change the font
UNITS_OF_MOVE = 60  # more, to move the pen
UNITS_OF_STRING = 48  # more, for one that a font has not shown before
UNITS_BY_PYPDF = 24  # for a token that pypdf parses
UNITS_OF_FORM = 1000
UNITS_OF_FONT, UNITS_OF_GLYPH, UNITS_OF_KNOWN_FONT, UNITS_OF_NO_FONT = 1000, 20, 6, 80
MAX_FONTS = 256  # kept from page to page
MAX_SHOWN, LONG_STRING = 10_000, 64  # strings of a font that are kept, and characters of one
LONG_LINE = 4096  # characters, which pypdf would copy with each that follows

_SPACE = rb"[\t\n\f\r ]"
_END = rb"(?=[\t\n\f\r ()<>\[\]/%]|\Z)"
_NUMBER = rb"[+-]?(?:[0-9]{1,9}+(?:\.[0-9]{0,9}+)?+|\.[0-9]{1,9}+)" + _END
_STRING = rb"\((?:[^()\\]++|\\.|\((?:[^()\\]++|\\.)*+\))*+\)"
_HEX = rb"<[0-9a-fA-F\t\n\f\r ]*+>"
_SKIPPED = rb"[mlcvyhSsFfBbnWwJjMdigGkK]|[fBbW]\*|re|ri|gs|sh|cs|CS|scn?|SCN?|rg|RG|BMC|BDC|EMC"
_KINDS = {
    "numbers": rb"(?:" + _NUMBER + _SPACE + rb"*+)++",
    "string": _STRING,
    "operator": rb"[A-Za-z'\"][^\x00-\x20()<>\[\]{}/%]*+" + _END,
    "hexadecimal": _HEX,
    "name": rb"/[!\"$&'*-.0-;=?-Z\\^-z|~]*+" + _END,
    "array": rb"\[(?:\([^()\\]*+\)|" + _NUMBER + rb"|" + _SPACE + rb"++)*+\]",
    "open": rb"\[",
    "close": rb"\]",
    "dictionary": rb"<<(?:[^<>()%]|" + _STRING + rb"|" + _HEX + rb")*+>>",
    "nothing": rb"%[^\r\n]*+|" + _SPACE + rb"++",
}
_TOKEN = re.compile(
    # First operations without text, with their numbers.
    rb"(?:(?:(?:%b%b++){0,6}+(?:%b)%b%b*+)++|" % (_NUMBER, _SPACE, _SKIPPED, _END, _SPACE)
    + b"|".join(b"(?P<%b>%b)" % (name.encode(), kind) for name, kind in _KINDS.items())
    + rb")%b*+" % _SPACE,
    re.DOTALL,
)
_LAST = b"\nend"  # an operator that no stream has
_MOVES = frozenset(b"Td TD Tm T* ' \"".split())
_KEPT = _MOVES | frozenset(b"BT ET cm Tf Tj Do q Q Tz Tc Tw TL TJ".split())


class Exhausted(BaseException):
    """A file asks for more than it may. It is no ``Exception``, since pypdf catches those."""


class Shown(NamedTuple):
    """The text of a string in a font, its width, and how many glyphs it has."""

    text: str
    width: float
    glyphs: int


class Work:
    """How much more may be done for a file of ``size`` bytes; and its fonts, which pages share."""

    def __init__(self, size: int) -> None:
        self.left = max(UNITS_OF_SMALL, UNITS_A_BYTE * size)
        self._fonts: dict[int, tuple[Any, Font]] = {}
        self._shown: dict[int, dict[bytes | str, Shown | None]] = {}
        self._kept = 0  # objects of the pages before

    def take(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise Exhausted

    def font(self, resource: Any) -> Font:
        """pypdf's font of a resource, which is made once."""
        self.take(UNITS_OF_KNOWN_FONT)
        if known := self._fonts.get(id(resource)):
            return known[1]
        self.take(UNITS_OF_FONT)
        font = Font.from_font_resource(resource)
        self.take(UNITS_OF_GLYPH * len(font.character_map))
        if len(self._fonts) == MAX_FONTS:
            self._fonts.clear()
            self._shown.clear()
        # With the resource, whose address stays its own.
        self._fonts[id(resource)] = resource, font
        self._shown[id(font)] = {}
        return font

    def shown(self, font: Font) -> dict[bytes | str, Shown | None]:
        """What is known of the strings that a font shows."""
        return self._shown.get(id(font), {})

    def end_page(self, objects: dict[Any, Any]) -> None:
        """Take the streams of a page, which are large, from what a reader keeps. Other objects
        stay: pages share them, and many are packed together."""
        new = list(islice(reversed(objects), max(0, len(objects) - self._kept)))
        for key in new:
            if isinstance(objects[key], StreamObject):
                del objects[key]
        self._kept = len(objects)


_work: ContextVar[Work] = ContextVar("work")


@contextmanager
def counting(work: Work) -> Iterator[None]:
    """Let pypdf read pages by this module, in this context only. Raises Exhausted."""
    places: tuple[tuple[Any, str, Any], ...] = (
        (pypdf._page, "TextExtraction", _extraction),
        (pypdf._page, "Font", _Fonts),
        (pypdf._text_extraction, "ContentStream", _Contents),
    )
    for module, name, ours in places:
        setattr(module, name, ours)
    token = _work.set(work)
    try:
        yield
    finally:
        _work.reset(token)


class _Contents(ContentStream):
    """A page's or a form's stream; its operations are those of text."""

    def _parse_content_stream(self, stream: IO[Any]) -> None:
        work = _work.get(None)
        if work is None:
            super()._parse_content_stream(stream)
            return
        data = stream.read()
        work.take(UNITS_OF_FORM + len(data) // BYTES_A_UNIT)
        found = _operations(data, work)
        if found is not None:
            self._operations = found
            return
        most = min(get_configuration().stream_parsing_work_maximum_count, work.left)
        limits = get_configuration().with_overwrites(
            stream_parsing_work_maximum_count=1 + most // UNITS_BY_PYPDF
        )
        try:
            with apply_configuration(limits):
                super()._parse_content_stream(
                    BytesIO(data + _LAST)
                )  # which takes what is left over
        except Exception:
            work.take(UNITS_BY_PYPDF * len(data) // 4)  # of a form, which may be used again
            raise
        for operands, operator in self._operations:
            # The last one is no operation of the stream, and no handler knows it.
            _charge(work, operands, operator, UNITS_BY_PYPDF)


def _charge(work: Work, operands: Any, operator: bytes, units: int) -> None:
    """Count an operation whose tokens cost ``units`` each."""
    tokens, steps, characters = 1 + len(operands), 1, 0
    for operand in operands:
        if isinstance(operand, bytes):
            characters += len(operand)
        elif isinstance(operand, list):
            tokens += len(operand)
            for one in operand:
                if isinstance(one, bytes):
                    steps, characters = steps + 1, characters + len(one)
                elif isinstance(one, int | float) and one < -WIDEST_JOINT:  # a gap between words
                    steps += 2
    work.take(
        tokens * units
        + (UNITS_OF_MOVE if operator in _MOVES else UNITS_OF_OPERATION)
        + steps * UNITS_OF_STEP
        + characters // CHARACTERS_A_UNIT
    )


def _operations(data: bytes, work: Work) -> list[tuple[Any, bytes]] | None:
    """The operations that have to do with text, or None for a stream that pypdf must parse."""
    found: list[tuple[Any, bytes]] = []
    operands: list[Any] = []
    outside = operands  # of an array
    at, match = 0, _TOKEN.scanner(data).match  # type: ignore[attr-defined]
    while token := match():
        at, kind = token.end(), token.lastgroup
        work.take(1)
        if kind == "numbers":
            numbers = token["numbers"].split()
            work.take(len(numbers))
            operands += map(float, numbers)
        elif kind == "string":
            text = token["string"]
            if b"\\" in text:
                work.take(len(text))
                operands.append(read_object(BytesIO(text), None, "bytes"))
            else:
                operands.append(text[1:-1])
        elif kind == "hexadecimal":
            digits = b"".join(token["hexadecimal"][1:-1].split()).decode()
            operands.append(bytes.fromhex(digits + "0" * (len(digits) % 2)))
        elif kind == "nothing":
            continue
        elif kind == "name":
            operands.append(NameObject(token["name"].decode()))
        elif kind == "array" and operands is outside:
            operands.append(_array(token["array"]))
        elif operands is not outside:
            if kind != "close":
                return None
            outside.append(ArrayObject(operands))
            operands = outside
        elif kind == "open":
            operands = []
        elif kind == "dictionary":
            operands.append(None)
        elif kind == "close" or (operator := token["operator"]) in (b"BI", b"ID", b"EI"):
            return None
        else:
            if operator in _KEPT:
                _charge(work, operands, operator, 1)
                found.append((operands, operator))
            operands = outside = []
    return found if at == len(data) and operands is outside else None


def _array(token: bytes) -> ArrayObject:
    """An array of numbers and of strings without escapes."""
    found: list[Any] = []
    parts = iter(token[1:-1].replace(b")", b"(").split(b"("))  # numbers and strings take turns
    for numbers in parts:
        if numbers:
            found += map(float, numbers.split())
        if (string := next(parts, None)) is not None:
            found.append(string)
    return ArrayObject(found)


class _Fonts:
    """Makes pypdf's fonts, each once."""

    @staticmethod
    def from_font_resource(resource: Any) -> Font:
        work = _work.get(None)
        if work is None:
            return Font.from_font_resource(resource)
        return work.font(resource)


def _extraction() -> TextExtraction:
    work = _work.get(None)
    return TextExtraction() if work is None else _Extraction(work)


class _Extraction(TextExtraction):
    """Puts operations together to lines. Their text goes to the visitor; what pypdf returns of it
    is not complete."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work
        self._known: tuple[Font | None, dict[bytes | str, Shown | None]] = None, {}
        self._settled = False  # whether the pen has not moved since a string was shown

    def process_tj_offset(self, offset: float, space_width: float) -> None:
        """See gaps between words of fonts without a space.

        pypdf takes half the average width of a font's glyphs for half a space. Gaps of justified
        text are narrower, so it would join the words.
        """
        super().process_tj_offset(offset, min(space_width, WIDEST_JOINT))

    def process_operation(self, operator: bytes, operands: list[Any]) -> None:
        if operator != b"Tj":
            self._settled = False
        elif operands and self._show(operands[0]):
            return
        super().process_operation(operator, operands)

    def _handle_tf(self, operands: list[Any]) -> None:
        if not operands or operands[0] not in self.fonts:
            self._work.take(UNITS_OF_NO_FONT)  # pypdf makes one each time
        super()._handle_tf(operands)

    def _show(self, string: Any) -> bool:
        """Show a string as ``Tj`` does, if this font has shown it before and it runs from left to
        right; whether it did."""
        if self.rtl_dir or not isinstance(string, bytes | str):
            return False
        if self.font is not self._known[0]:
            self._known = self.font, self._work.shown(self.font)
        known = self._known[1]
        try:
            shown = known[string]
        except KeyError:
            if len(known) == MAX_SHOWN:
                known.clear()
            shown = known[string] = self._shown(string)
        if shown is None:
            return False
        size, self._previous_font_space = self._actual_str_size, None
        self.text += shown.text
        size["str_widths"] += shown.width * self.font_size + 1000 * self.char_spacing * shown.glyphs
        size["str_height"] = self.font_size
        # Text where the pen was already ends neither a line nor a word.
        follows = self._settled and self.text[-1:] not in ("", "\n")
        if not follows or len(self.text) > LONG_LINE:
            self._post_process_text_operation(0.0)
            self._settled = self._stays()
        return True

    def _shown(self, string: bytes | str) -> Shown | None:
        self._work.take(UNITS_OF_STRING)
        if len(string) > LONG_STRING:
            return None
        identity = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
        glyphs, is_text, width = get_text_operands(
            [string],  # type: ignore[list-item]
            identity,
            identity,
            self.font,
            self.orientations,
        )
        text, rtl, before = get_display_str(
            "", identity, identity, None, self.font, glyphs, 1.0, False, None
        )
        if (rtl or before) and not is_text:
            return None
        return Shown(glyphs if is_text else text, width, len(glyphs))

    def _post_process_text_operation(self, str_widths: float) -> None:
        super()._post_process_text_operation(str_widths)
        # Only the last character counts for what follows, and each operation would copy the rest.
        self.output = self.output[-1:]
        if len(self.text) > LONG_LINE and self.visitor_text is not None:
            if self.rtl_dir:  # it grows at its beginning
                self._work.take(len(self.text) >> 8)
                return
            self.visitor_text(
                self.text[:-1], self.memo_cm, self.memo_tm, self.font_resource, self.font_size
            )
            self.text = self.text[-1:]

    def _stays(self) -> bool:
        """Whether a string that is shown next, without a move, is found to follow the last one."""
        tm, cm = self.tm_matrix, self.cm_matrix
        return (
            self._line_span is not None
            and self.font_size > 0
            and self.font_size * self._space_width > 1e-9
            and abs(tm[0] * cm[0] + tm[1] * cm[2]) + abs(tm[0] * cm[1] + tm[1] * cm[3]) > 1e-9
        )
