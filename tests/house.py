"""Checks of the house: how long files are, who imports whom, and what was copied.

    python tests/house.py        prints the longest files, then each finding in one line

CONTRIBUTING.md states the rules; `bootstrap.py test` runs this.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = (".py", ".cpp", ".h", ".inl", ".c")
MOST_LINES = 600
SAME_LINES = 12
LONGEST_SHOWN = 5

# Each folder may import itself and those before it.
ORDER = ("models", "runtime", "export", "profiling", "android")
NO_TORCH = ("runtime", "profiling/devices", "android")
# A file that may import what stands behind it, and why.
ALLOWED = {
    "export/plan.py": "a search under a budget measures what it tries",
    "export/bits.py": "holds its choice against the types of a peer",
}

# Tables that a program wrote: no one reads or edits them.
GENERATED = ("_table.inl",)

# Two files that may hold the same lines, and why.
MAY_REPEAT: dict[frozenset[str], str] = {}

# Comments and imports; the last is a name in an import of several lines.
_SILENT = re.compile(r"#|//|\*|import |from \S+ import |using |\w+,$")
Line = tuple[int, str]  # its number in the file and its normalized text


def main() -> int:
    files = code_files(ROOT)
    counts = sorted(((len(text.splitlines()), name) for name, text in files.items()), reverse=True)
    shown = ", ".join(f"{name} {count}" for count, name in counts[:LONGEST_SHOWN])
    print(f"longest of {len(files)} files: {shown}")
    findings = [*too_long(files), *wrong_imports(files), *copies(files)]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def code_files(root: Path) -> dict[str, str]:
    """Every source file that git knows, by its name."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True)
    names = [name for name in listed.stdout.decode().split("\0") if name.endswith(CODE)]
    names = [name for name in names if not name.endswith(GENERATED) and (root / name).is_file()]
    return {name: (root / name).read_text(encoding="utf-8") for name in names}


def too_long(files: dict[str, str]) -> Iterator[str]:
    for name, text in files.items():
        if (count := len(text.splitlines())) > MOST_LINES:
            yield f"{name}: {count} lines, at most {MOST_LINES}; move a part to a file of its own"


def wrong_imports(files: dict[str, str]) -> Iterator[str]:
    for name, text in files.items():
        folder = name.split("/")[0]
        if not name.endswith(".py") or folder not in ORDER:
            continue
        behind = () if name in ALLOWED else ORDER[ORDER.index(folder) + 1 :]
        for node in ast.walk(ast.parse(text)):
            for module in _imported(node):
                top, _, rest = module.partition(".")
                if top == "pocketslm" and rest.split(".")[0] in (*behind, "tests"):
                    yield f"{name}:{node.lineno}: imports {module}, which stands behind it"
                if top == "torch" and name.startswith(NO_TORCH):
                    yield f"{name}:{node.lineno}: imports torch, which phones do not have"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        # `from pocketslm import profiling` names the folder behind the dot.
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def copies(files: dict[str, str]) -> Iterator[str]:
    """Runs of lines that stand in two places, each run once."""
    lines = {name: normalized(text) for name, text in files.items()}
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, own in lines.items():
        for at in range(len(own) - SAME_LINES + 1):
            places[tuple(text for _, text in own[at : at + SAME_LINES])].append((name, at))
    told: set[tuple[str, int]] = set()
    for found in places.values():
        (first, start), *others = found
        for name, at in others:
            overlaps = name == first and at < start + SAME_LINES
            if overlaps or frozenset((first, name)) in MAY_REPEAT:
                continue
            if (name, at - 1) not in told:  # else it goes on from a run that was told
                one, two = f"{first}:{lines[first][start][0]}", f"{name}:{lines[name][at][0]}"
                yield f"{one} and {two} hold the same {SAME_LINES} lines"
            told.add((name, at))


def normalized(text: str) -> list[Line]:
    """The lines that say something: no blanks, comments, imports or lone brackets."""
    said = []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"\s+", " ", line.strip())
        if re.search(r"\w", line) and not _SILENT.match(line):
            said.append((number, line))
    return said


if __name__ == "__main__":
    sys.exit(main())
