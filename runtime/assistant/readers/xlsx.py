"""Excel workbooks: sheets in their order, row by row with the names of their columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers.archive import Archive, parse_xml, relation_of, relations
from pocketslm.runtime.assistant.readers.limits import check_characters
from pocketslm.runtime.assistant.readers.tables import MOST_COLUMNS, named_rows

_BOOK = "xl/workbook.xml"
# Formats without a definition, and what they show.
_KNOWN_FORMATS = {
    **dict.fromkeys((*range(14, 18), 22, *range(27, 37), *range(50, 59)), "date"),
    **dict.fromkeys((*range(18, 22), *range(45, 48)), "time"),
    **dict.fromkeys((9, 10), "percent"),
}
_ELAPSED = re.compile(r"\[(?:h+|m+|s+)\]")
_LITERAL = re.compile(r'"[^"]*+"?|[\\_*].|\[[^\]]*+\]?')
_ESCAPE = re.compile(r"_x([0-9A-Fa-f]{4})_")  # of a character that XML cannot hold
_COLUMN = re.compile(r"[A-Z]{1,3}")
_LAST_DAY = 2_958_465  # the end of the year 9999
GAP_COST = 8  # an empty cell counts as so many characters, since it takes as much memory
_EPOCH = datetime(1899, 12, 30)  # so that days after February 1900 are right


def read(data: bytes) -> Iterator[Block]:
    archive = Archive(data)
    names = set(archive.names())
    sheets: list[tuple[str, str]] = []
    later = 0  # days, for workbooks that count from 1904

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal later
        name = tag.rpartition(" ")[2]
        if name == "sheet":
            sheets.append((attributes.get("name", ""), relation_of(attributes)))
        elif name == "workbookPr" and attributes.get("date1904") in ("1", "true"):
            later = 1462

    parse_xml(archive.read(_BOOK), start, count=archive.elements)
    targets = relations(archive, _BOOK)
    strings = _strings(archive) if _has(names, "sharedStrings") else []
    shown = _styles(archive) if _has(names, "styles") else []
    for title, part in sheets:
        file = targets.get(part)
        if file in names:
            yield Block(title, 1)
            yield from named_rows(_Sheet(archive, file, strings, shown, later).rows)


def _has(names: set[str], part: str) -> bool:
    return f"xl/{part}.xml" in names


def _strings(archive: Archive) -> list[str]:
    """The texts that cells share, without the readings of Japanese ones."""
    found: list[str] = []
    parts: list[str] = []
    inside = {"t": 0, "rPh": 0}

    def start(tag: str, _: dict[str, str]) -> None:
        if (name := tag.rpartition(" ")[2]) in inside:
            inside[name] += 1

    def end(tag: str) -> None:
        name = tag.rpartition(" ")[2]
        if name in inside:
            inside[name] -= 1
        elif name == "si":
            found.append(_unescaped("".join(parts)))
            parts.clear()

    def text(text: str) -> None:
        if inside["t"] and not inside["rPh"]:
            parts.append(text)

    parse_xml(archive.read("xl/sharedStrings.xml"), start, end, text, count=archive.elements)
    return found


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)).replace("\r", ""), text)


def _meaning(code: str) -> str:
    """What a format shows of a number: a date, a time, a percentage, or the number ("")."""
    code = code.lower()
    elapsed = _ELAPSED.search(code)
    first = _LITERAL.sub("", code).partition(";")[0].replace("general", "")
    if "y" in first or "d" in first or ("m" in first and not set(first) & set("hs0#?")):
        return "date"
    if elapsed or "h" in first or "s" in first:
        return "time"
    return "percent" if "%" in first else ""


def _styles(archive: Archive) -> list[str]:
    """What each cell format shows of a number."""
    codes: dict[str, str] = {}
    formats: list[str] = []
    cells = False

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal cells
        name = tag.rpartition(" ")[2]
        number = attributes.get("numFmtId", "")
        if name == "numFmt":
            codes[number] = _meaning(attributes.get("formatCode", ""))
        elif name == "cellXfs":
            cells = True
        elif name == "xf" and cells:
            known = (
                _KNOWN_FORMATS.get(int(number), "") if re.fullmatch("[0-9]{1,3}", number) else ""
            )
            formats.append(codes.get(number, known))

    def end(tag: str) -> None:
        nonlocal cells
        cells = cells and not tag.endswith(" cellXfs")

    parse_xml(archive.read("xl/styles.xml"), start, end, count=archive.elements)
    return formats


class _Sheet:
    """A sheet's rows of shown values. A shared text counts each time that a cell uses it."""

    def __init__(
        self, archive: Archive, file: str, strings: list[str], shown: list[str], later: int
    ) -> None:
        self.rows: list[list[str]] = []
        self._strings, self._styles, self._later = strings, shown, later
        self._parts: list[str] = []
        self._row: list[str] = []
        self._kind, self._style, self._column = "n", "", 0
        self._reading = False
        self._characters = 0
        xml = archive.read(file)
        parse_xml(xml, self._start, self._end, self._text, count=archive.elements)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        match tag.rpartition(" ")[2]:
            case "row":
                self._row = []
            case "c":
                self._kind = attributes.get("t", "n")
                self._style = attributes.get("s", "")
                place = _COLUMN.match(attributes.get("r", ""))
                self._column = _number(place[0]) if place else len(self._row)
                self._parts.clear()
            case "v" | "t":
                self._reading = True

    def _end(self, tag: str) -> None:
        match tag.rpartition(" ")[2]:
            case "row":
                if self._row:
                    self.rows.append(self._row)
                    self._row = []
            case "c":
                value = self._value("".join(self._parts).strip())
                gap = self._column - len(self._row)
                if value and gap >= 0:
                    if self._column >= MOST_COLUMNS:
                        raise DocumentError(f"has more than {MOST_COLUMNS} columns; split it")
                    self._characters += GAP_COST * gap + len(value)
                    check_characters(self._characters)
                    self._row += [""] * gap + [value]
            case "v" | "t":
                self._reading = False

    def _text(self, text: str) -> None:
        if self._reading:
            self._parts.append(text)

    def _value(self, text: str) -> str:
        if self._kind == "s":
            known = text.isdecimal() and len(text) < 9 and int(text) < len(self._strings)
            return self._strings[int(text)] if known else ""
        if self._kind == "b":
            return "yes" if text == "1" else "no"
        if self._kind == "n" and text:
            return self._shown(text)
        return _unescaped(text)

    def _shown(self, text: str) -> str:
        """A number or a date as people read it."""
        try:
            number = float(text)
        except ValueError:
            return text[:40]
        style = int(self._style) if self._style.isdecimal() and len(self._style) < 9 else -1
        meaning = self._styles[style] if 0 <= style < len(self._styles) else ""
        if meaning == "date" and 0 < number + self._later < _LAST_DAY:
            date = _EPOCH + timedelta(seconds=round((number + self._later) * 86400))
            return date.isoformat(" ", "minutes").removesuffix(" 00:00")
        if meaning == "time" and 0 <= number < _LAST_DAY:
            minutes, seconds = divmod(round(number * 86400), 60)
            shown = f"{minutes // 60}:{minutes % 60:02}"
            return f"{shown}:{seconds:02}" if seconds else shown
        if meaning == "percent":
            return f"{number * 100:.10g}%"
        # As many digits as the program keeps: numbers of articles and accounts have more than ten.
        return f"{number:.15g}" if abs(number) < 1e15 else text[:40]


def _number(letters: str) -> int:
    """A column's place, from 0: A, B, ..., Z, AA."""
    place = 0
    for letter in letters:
        place = place * 26 + ord(letter) - ord("A") + 1
    return place - 1
