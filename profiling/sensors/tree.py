"""A device's files and the output of its commands as one text, and as a mapping.

A shell script on the device prints the text. Each line holds a path, a tab and one line of that
file; for a command the path is ``$ COMMAND``. Tests use the same text as a recording.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

Tree = dict[str, str]

COMMAND = "$ "
_UNSAFE = re.compile(r"[^\w@%+=:,./*?\[\]-]", re.ASCII)  # in a shell's word, patterns apart


def script(files: Sequence[str], commands: Sequence[str] = ()) -> str:
    """A script that prints these files, which may be patterns, and commands. It skips what it
    cannot read.

    In a file's name only the marks of a pattern are special, because the device may have named it.
    Reading a file starts no process: that costs microseconds, while a process costs more than the
    kernel needs to answer.
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
    """Map each path and command to its lines, joined by newlines."""
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
    """The integer in a file, or None if the file is missing or holds something else."""
    return whole(tree.get(path, ""))


def whole(text: str, base: int = 10) -> int | None:
    """The integer in a text that a device wrote, or None if it is not a 64-bit integer."""
    try:
        value = int(text, base)
    except ValueError:
        return None
    return value if abs(value) < 1 << 64 else None


def folders(paths: Iterable[str]) -> list[str]:
    """The folders of files, each once, in order."""
    return list(dict.fromkeys(path.rpartition("/")[0] for path in paths))
