"""Write unicode_table.inl: ranges of letters, numbers and white space."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

# White_Space in Unicode's PropList; str.isspace() has four separators more.
SPACES = {*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029}
SPACES |= {0x202F, 0x205F, 0x3000}


def kind(code: int) -> str | None:
    if code in SPACES:
        return "S"
    category = unicodedata.category(chr(code))[0]
    return category if category in "LN" else None


def ranges() -> list[tuple[int, int, str]]:
    found: list[tuple[int, int, str]] = []
    for code in range(sys.maxunicode + 1):
        k = kind(code)
        if k is None:
            continue
        if found and found[-1][1] == code - 1 and found[-1][2] == k:
            found[-1] = (found[-1][0], code, k)
        else:
            found.append((code, code, k))
    return found


def main() -> None:
    cells = [f"{{{first:#x}, {last:#x}, {k}}}," for first, last, k in ranges()]
    lines, line = [f"// Unicode {unicodedata.unidata_version}"], ""
    for cell in cells:
        if len(line) + len(cell) > 98:
            lines.append(line.rstrip())
            line = ""
        line += cell + " "
    Path(__file__).with_name("unicode_table.inl").write_text(
        "\n".join([*lines, line.rstrip()]) + "\n"
    )


if __name__ == "__main__":
    main()
