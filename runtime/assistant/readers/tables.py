"""Tables, read for questions: each row is a passage, and each cell has its column's name."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

from pocketslm.errors import DocumentError
from pocketslm.runtime.assistant.document import Block
from pocketslm.runtime.assistant.readers import text
from pocketslm.runtime.assistant.readers.limits import check_characters

NAME_CHARACTERS = 60  # of a column's name, which every row repeats
MOST_COLUMNS = 1 << 14  # as a spreadsheet has
_DELIMITERS = "\t;|,"
_LOOKED_AT = 20  # rows that tell the delimiter
_NAMED = re.compile(r"sep=([,;\t|])\n")
_NUMBER = re.compile(r"[-+]?[\d.,:/ %€$£-]*\d[\d.,:/ %€$£-]*")
# The most characters without a line end. Files with longer lines are not tables.
_LONGEST_LINE = 1 << 20


def read(data: bytes) -> Iterator[Block]:
    """Read comma-separated values. A file with a single column is read as text."""
    content = text.decode(data)
    check_characters(len(content))
    longest = max((len(line) for line in text.lines(content)), default=0)
    delimiter = "" if longest > _LONGEST_LINE else _delimiter(content)
    return named_rows(_rows(content, delimiter)) if delimiter else text.read(data)


def _delimiter(content: str) -> str:
    """What stands between cells; empty where nothing does.

    That is what cuts all of the first rows into equally many cells, commas last: "1,5;2,5" are two
    numbers. Where nothing does, it is what cuts the first row into most.
    """
    named = _NAMED.match(content)  # by spreadsheets, for themselves
    if named:
        return named[1]
    widths: dict[str, list[int]] = {}
    for delimiter in _DELIMITERS:
        rows = (row for row in _rows(content, delimiter) if any(cell.strip() for cell in row))
        widths[delimiter] = []
        with suppress(DocumentError):  # who takes this delimiter is told
            widths[delimiter] += (len(row) for row in islice(rows, _LOOKED_AT))
        if widths[delimiter] and widths[delimiter][0] > 1 == len(set(widths[delimiter])):
            return delimiter
    best = max(_DELIMITERS, key=lambda one: widths[one][:1])
    return best if widths[best][:1] > [1] else ""


def _rows(content: str, delimiter: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(content, newline=""), delimiter=delimiter)
    except csv.Error as error:
        raise DocumentError(f"is a damaged table: {error}") from None


def named_rows(rows: Iterable[Sequence[str]]) -> Iterator[Block]:
    """Blocks of rows, as "column: value | column: value". Without a row of names, cells have no
    names.

    The first row with two cells names the columns if all of its cells are words. Rows before it are
    titles.
    """
    names: list[str] | None = None
    for row in rows:
        if len(row) > MOST_COLUMNS:
            raise DocumentError(f"is a table of more than {MOST_COLUMNS} columns; split it")
        cells = [" ".join(cell.split()) for cell in row]
        filled = [cell for cell in cells if cell]
        if not filled:
            continue
        if names is None and len(filled) == 1 < len(cells):
            yield Block(filled[0])
        elif names is None:
            words = len(filled) > 1 and not any(map(_NUMBER.fullmatch, filled))
            names = [cell[:NAME_CHARACTERS] for cell in cells] if words else []
            yield Block(" | ".join(filled))
        else:
            yield Block(" | ".join(_named(names, cells)))


def _named(names: Sequence[str], cells: Sequence[str]) -> Iterator[str]:
    for at, cell in enumerate(cells):
        if cell:
            name = names[at] if at < len(names) else ""
            yield f"{name}: {cell}" if name else cell
