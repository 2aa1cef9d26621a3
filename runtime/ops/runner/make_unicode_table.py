"""Write unicode_table.inl (ranges of letters, marks, numbers, signs and white space),
normalization_table.inl (canonical decompositions and combining classes) and bert_table.inl (what
BERT's normalizer and words go by)."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from pocketslm.runtime.tokenizer import normalizers, pretokenizers, unicode_classes


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


def bert_classes() -> Iterator[str]:
    """Ranges of what is removed (R), an accent (A), a word by itself (P), or set apart (I)."""
    kinds = {
        "R": normalizers.bert_removed(),
        "A": unicode_classes.of_unicode_8("Mn"),
        "P": pretokenizers.bert_signs(),
        "I": normalizers.BERT_IDEOGRAPHS,
    }
    found = sorted((*span, kind) for kind, spans in kinds.items() for span in spans)
    return (f"{{{first:#x},{last:#x},{kind}}}," for first, last, kind in found)


def lower_case() -> Iterator[str]:
    """Runs of every `step`-th character whose lower case is `delta` on."""
    runs: list[list[int]] = []  # first, last, step, delta
    for code in range(sys.maxunicode + 1):
        lower = chr(code).lower()
        if len(lower) != 1 or ord(lower) == code:
            continue  # but for U+0130 the lower case of one character is one
        delta = ord(lower) - code
        last = runs[-1] if runs else None
        if last and last[3] == delta and code - last[1] in ((1, 2) if last[2] == 0 else (last[2],)):
            last[1:3] = code, code - last[1]
        else:
            runs.append([code, code, 0, delta])
    return (f"{{{first:#x},{last:#x},{step or 1},{delta}}}," for first, last, step, delta in runs)


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
    version = f"// Unicode {unicodedata.unidata_version}\n"
    (folder / "bert_table.inl").write_text(
        f"// Unicode 8\nconstexpr Range kRanges[] = {{\n{wrapped(bert_classes())}}};\n"
        f"{version}constexpr Lower kLowerRuns[] = {{\n{wrapped(lower_case())}}};\n"
    )
    (folder / "normalization_table.inl").write_text(
        f"{version}"
        f"constexpr Decomposition kDecompositions[] = {{\n{wrapped(decompositions())}}};\n"
        f"constexpr Combining kCombining[] = {{\n{wrapped(orders())}}};\n"
    )


if __name__ == "__main__":
    main()
