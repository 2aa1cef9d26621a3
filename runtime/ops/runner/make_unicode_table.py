"""Write unicode_table.inl (ranges of letters, marks, numbers, signs and white space) and
normalization_table.inl (canonical decompositions and combining classes)."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from pocketslm.runtime.tokenizer import unicode_classes


def classes() -> Iterator[str]:
    """Ranges of one class; E and O: upper and lower case in turn, upper at even or odd codes."""
    categories = {
        "U": ("Lu", "Lt"),
        "l": ("Ll",),
        "L": ("Lm", "Lo"),
        "M": ("M",),
        "N": ("N",),
        "P": ("P", "S"),
    }
    spans = {
        kind: unicode_classes.union(unicode_classes.category(name) or () for name in names)
        for kind, names in categories.items()
    }
    spans["S"] = unicode_classes.WHITE_SPACE
    found: list[tuple[int, int, str]] = []
    for first, last, kind in sorted((*span, kind) for kind, own in spans.items() for span in own):
        if first == last and kind in "Ul":
            kind = "E" if (first % 2 == 0) == (kind == "U") else "O"
            if found and found[-1][1:] == (first - 1, kind):
                first = found.pop()[0]
        found.append((first, last, kind))
    return (f"{{{first:#x},{last:#x},{kind}}}," for first, last, kind in found)


def decompositions() -> Iterator[str]:
    for code in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(code)).split()
        if not parts or parts[0].startswith("<"):
            continue
        text = "".join(chr(int(part, 16)) for part in parts)
        composes = int(len(parts) == 2 and unicodedata.normalize("NFC", text) == chr(code))
        cells = [code, *map(ord, text), *([composes] if len(text) == 2 else [])]
        yield f"{{{','.join(map(hex, cells))}}},"


def orders() -> Iterator[str]:
    """Runs of characters of one combining class."""
    first, previous = 0, 0
    for code in range(sys.maxunicode + 1):
        order = unicodedata.combining(chr(code))
        if order == previous:
            continue
        if previous:
            yield f"{{{first:#x},{code - 1:#x},{previous}}},"
        first, previous = code, order


def wrapped(cells: Iterable[str]) -> str:
    lines, line = [], ""
    for cell in cells:
        if len(line) + len(cell) > 98:
            lines.append(line.rstrip())
            line = ""
        line += cell + " "
    return "\n".join([*lines, line.rstrip()]) + "\n"


def main() -> None:
    folder = Path(__file__).parent
    (folder / "unicode_table.inl").write_text("// Unicode 16\n" + wrapped(classes()))
    (folder / "normalization_table.inl").write_text(
        f"// Unicode {unicodedata.unidata_version}\n"
        f"constexpr Decomposition kDecompositions[] = {{\n{wrapped(decompositions())}}};\n"
        f"constexpr Combining kCombining[] = {{\n{wrapped(orders())}}};\n"
    )


if __name__ == "__main__":
    main()
