"""The command line on files that were changed: an exit status of 0 or 2 and one line, always."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import ClassVar

from .readers import GGUF, Bundles, Checkpoints, Documents, Records
from .target import Target

Line = Callable[[Path, Path], list[str]]  # the file or folder, and where to write


class Commands(Target):
    """Each input is one of another target's, given to one of the commands that read such."""

    name = "command"
    covers = ("cli.py", "*/cli.py", "*/*/cli.py", "terminal.py", "export/pipeline.py")
    cpu_seconds = 60
    lines: ClassVar[dict[str, tuple[type[Target], list[Line]]]] = {
        "gguf": (
            GGUF,
            [
                lambda path, out: ["inspect", str(path)],
                lambda path, out: ["inspect", "--json", str(path)],
                lambda path, out: ["export", str(path), str(out), "--target", "native"],
                lambda path, out: ["plan", str(path), str(out), "ram=1MB", "--trials", "1"],
            ],
        ),
        "checkpoint": (
            Checkpoints,
            [
                lambda path, out: ["inspect", str(path)],
                lambda path, out: ["export", str(path), str(out), "--target", "native,onnx"],
                lambda path, out: ["prune", str(path), str(out), "--layers", "1", "--by", "last"],
            ],
        ),
        "bundle": (
            Bundles,
            [
                lambda path, out: ["inspect", str(path)],
                lambda path, out: ["run", str(path), "hi", "-n", "2", "--no-verify", "--json"],
                lambda path, out: ["embed", str(path), "hi", "--no-verify"],
                lambda path, out: [
                    "bench",
                    str(path),
                    "-p",
                    "4",
                    "-n",
                    "2",
                    "-r",
                    "1",
                    "--timeout",
                    "20",
                ],
                lambda path, out: [
                    "doc",
                    "summarize",
                    str(path),
                    "--no-verify",
                    "--max-new-tokens",
                    "4",
                ],
            ],
        ),
        "document": (
            Documents,
            [
                lambda path, out: ["doc", "add", str(path), "--library", str(out)],
                lambda path, out: ["doc", "add", str(path), "--library", str(path)],
            ],
        ),
        "records": (
            Records,
            [
                lambda path, out: ["compare", str(path)],
                lambda path, out: ["report", str(path), "-o", str(out.with_suffix(".html"))],
                lambda path, out: ["report", str(path), "-o", str(out.with_suffix(".csv"))],
                lambda path, out: ["fit", "--records", str(path), "--json"],
            ],
        ),
    }

    def __init__(self, home: Path, scratch: Path) -> None:
        super().__init__(home, scratch)
        self.targets: dict[str, Target] = {}
        for kind, (make, _) in self.lines.items():
            inner = scratch / f"of-{kind}"
            inner.mkdir()
            self.targets[kind] = make(home.parent / make.name, inner)

    def seeds(self) -> list[bytes]:
        made = []
        for kind, target in self.targets.items():
            seeds = target.seeds()
            # One of each kind as often as one of another, whatever their seeds.
            made += [f"{kind} 0 ".encode() + seeds[at % len(seeds)] for at in range(40)]
        return made + [path.read_bytes() for path in self.findings()]

    def mutate(self, data: bytes, rng: Random) -> bytes:
        kind, _, content = data.split(b" ", 2)
        choices = self.lines[kind.decode()][1]
        changed = self.targets[kind.decode()].mutate(content, rng)
        return b"%b %d %b" % (kind, rng.randrange(len(choices)), changed)

    def run(self, data: bytes) -> None:
        kind, number, rest = data.split(b" ", 2)
        name, _, content = rest.partition(b"\0")
        for path in self.scratch.glob("[fo]*"):
            if not path.name.startswith("of-"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        target = self.targets[kind.decode()]
        whole: dict[str, bytes] = getattr(target, "whole", {})
        path = self.scratch / f"f{Path(name.decode('utf-8', 'replace')).suffix}"
        if kind == b"gguf":
            path = self.scratch / "f.gguf"
        if whole:
            for file, intact in whole.items():
                (path / file).parent.mkdir(parents=True, exist_ok=True)
                (path / file).write_bytes(content if file == name.decode() else intact)
        else:
            path.write_bytes(content)
        line = self.lines[kind.decode()][1][int(number)](path, self.scratch / "out")
        self._command(line)

    def _command(self, line: list[str]) -> None:
        from pocketslm.cli import main

        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors):
            sys.stdin = io.StringIO("")
            try:
                status = main(line)
            except SystemExit as error:  # argparse's
                status = error.code if isinstance(error.code, int) else 1
        said = errors.getvalue()
        assert status in (0, 2), f"{line}: {status}"
        assert "Traceback" not in said, said
        if status == 2:
            last = [one for one in said.split("\n") if one.startswith("pocketslm: error: ")]
            assert len(last) == 1, said
            assert said.endswith(f"{last[0]}\n"), said
        assert not any(ord(char) < 32 and char not in "\n\r\t" for char in out.getvalue()), line


TARGETS = (Commands,)
