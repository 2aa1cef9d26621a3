"""A device's files and the output of its commands as one text, and as a mapping.

The text is what a shell script prints on the device, one line of a file a line: the path, a tab,
the line. For a command the path is ``$ COMMAND``. The same text is a recording for tests.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

Tree = dict[str, str]

COMMAND = "$ "
_UNSAFE = re.compile(r"[^\w@%+=:,./*?\[\]-]", re.ASCII)  # in a shell's word, patterns apart


def script(files: Sequence[str], commands: Sequence[str] = ()) -> str:
    """Prints these files, which may be patterns, and commands; what cannot be read is left out.

    Of a file's name only the marks of a pattern mean something: the device may have named it.
    A file takes no new process: reading one costs microseconds, while starting one costs more than
    the kernel needs to answer.
    """
    lines = 'while read -r v || [ -n "$v" ]; do echo "$f\t$v"; done'
    parts = []
    if files:
        names = " ".join(_UNSAFE.sub(r"\\\g<0>", file) for file in files)
        parts.append(f'for f in {names}; do {lines} < "$f"; done 2>/dev/null')
    for command in commands:
        assert "'" not in command
        parts.append(f"f='{COMMAND}{command}'; {command} 2>/dev/null | {lines}")
    return "\n".join([*parts, "true"])


def parse(text: str) -> Tree:
    """Paths and commands with their lines, joined by newlines."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        path, tab, value = line.partition("\t")
        if tab and path.startswith(("/", COMMAND)):
            found.setdefault(path, []).append(value.replace("\0", "").strip())
    return {path: "\n".join(lines) for path, lines in found.items()}


def matching(tree: Tree, pattern: str) -> list[str]:
    """Paths of the tree that a shell pattern names, in natural order (cpu2 before cpu10)."""
    return sorted(fnmatch.filter(tree, pattern), key=natural)


def natural(path: str) -> list[tuple[int, str]]:
    """A sorting key under which numbers count as numbers."""
    parts, digits = [], ""
    for character in path + "/":
        if character.isdecimal():
            digits += character
            continue
        if digits:
            parts.append((int(digits[:100]), ""))
            digits = ""
        parts.append((-1, character))
    return parts


def number(tree: Tree, path: str) -> int | None:
    """A file that holds one integer; None where it is missing or holds something else."""
    return whole(tree.get(path, ""))


def whole(text: str, base: int = 10) -> int | None:
    """The integer that a text is, as a device wrote it; None where it is none of 64 bits."""
    try:
        value = int(text, base)
    except ValueError:
        return None
    return value if abs(value) < 1 << 64 else None


def folders(paths: Iterable[str]) -> list[str]:
    """The folders of files, each once, in order."""
    return list(dict.fromkeys(path.rpartition("/")[0] for path in paths))
