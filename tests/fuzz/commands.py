"""The command line on files that were changed: an exit status of 0 or 2 and one line, always."""

from __future__ import annotations

import io
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import ClassVar

from . import mutate
from .native import Grammars
from .readers import (
    GGUF,
    Bundles,
    Checkpoints,
    Documents,
    Libraries,
    Recipes,
    Records,
    Tasks,
    Updates,
)
from .target import Mutators, Target


class Talk(Target):
    """What a person types or pipes."""

    name = "talk"
    mutators: ClassVar[Mutators] = {
        "": lambda data, rng: mutate.text(data, rng, ("/clear\n", "\n"))
    }

    def seeds(self) -> list[bytes]:
        return [b"t\0What is it?\n/clear\nAnd then?\n\n/help\n", b"t\0\xff\xfe \xed\xa0\x80\n"]


class Commands(Target):
    """Each input is one of another target's, given to one of the commands that read such.

    In a line PATH is the file or folder, OUT where to write, and HF, BASE, BUNDLE, TEXT, ITEMS and
    LIBRARY are whole ones. Standard input is the input where a line has ``-``.
    """

    name = "command"
    covers = ("cli.py", "*/cli.py", "*/*/cli.py", "terminal.py", "export/pipeline.py")
    cpu_seconds = 60
    few = "-n 2 --no-verify -t 1"
    lines: ClassVar[dict[str, tuple[type[Target], list[str]]]] = {
        "gguf": (
            GGUF,
            [
                "inspect PATH",
                "inspect --json PATH",
                "export PATH OUT --target native",
                "export PATH OUT --target onnx --weights int4",
                "plan PATH OUT ram=1MB --trials 1",
                "prune PATH OUT --layers 1 --by last",
            ],
        ),
        "checkpoint": (
            Checkpoints,
            [
                "inspect PATH",
                "export PATH OUT --target native,onnx",
                "export PATH OUT --target executorch",
                "prune PATH OUT --layers 1 --by last",
                "prune PATH OUT --neurons 32 --text TEXT --tokens 256",
                "delta HF PATH OUT",
                "delta PATH HF OUT --bands 2x8",
                "heal PATH OUT --teacher HF --text TEXT --held-out 0 --steps 1 --batch 1 "
                "--sequence 16",
                "eval BUNDLE --source PATH --text TEXT --windows 1 --window 32",
                "methods PATH --table depth --only last --text TEXT --calibration TEXT "
                "--windows 1 --tokens 512 --results OUT",
            ],
        ),
        "bundle": (
            Bundles,
            [
                "inspect PATH",
                f"run PATH hi --json {few}",
                f"run PATH hi --backend runner {few}",
                f"chat PATH {few} -",
                "embed PATH hi --no-verify",
                "bench PATH -p 4 -n 2 -r 1 --timeout 20",
                f"doc summarize PATH {few}",
                f"doc ask PATH fox --library LIBRARY {few}",
                f"doc suggest PATH --library LIBRARY {few}",
                "eval PATH --source HF --text TEXT --windows 1 --window 32",
                "eval PATH --task ITEMS",
            ],
        ),
        "document": (
            Documents,
            [
                "doc add PATH --library OUT",
                "doc add PATH --library PATH",
                "doc add PATH --library OUT --password-file PATH",
                f"doc summarize BUNDLE --document PATH {few}",
                f"doc ask BUNDLE Rome? --document PATH {few}",
                f"run BUNDLE hi --text PATH {few}",
                "eval BUNDLE --source HF --text PATH --windows 1 --window 32",
                "export HF OUT --weights int4 --method gptq --calibration PATH "
                "--calibration-tokens 512",
                "export HF OUT --vocabulary PATH --vocabulary-size 262",
                "prune HF OUT --layers 1 --text PATH --tokens 512",
                "delta HF BASE OUT --text PATH --tokens 512",
                "heal HF OUT --teacher HF --text PATH --held-out 0 --steps 1 --batch 1 "
                "--sequence 16",
                "inspect PATH",
                "compare PATH PATH",
                "export HF OUT --recipe PATH",
            ],
        ),
        "records": (
            Records,
            [
                "compare PATH",
                "report PATH -o OUT.html",
                "report PATH -o OUT.csv",
                "fit --records PATH --json",
                "fit --records PATH --ram 4GB --bandwidth 30GB/s --int8 300GMAC/s",
            ],
        ),
        "recipe": (Recipes, ["export HF OUT --recipe PATH"]),
        "update": (
            Updates,
            [
                "export BASE+PATH OUT --target native",
                "export BASE OUT --adapter PATH --target native",
                "export BASE+PATH/x.delta OUT --target native",
                "delta BASE BASE+PATH OUT",
                "inspect BASE+PATH",
            ],
        ),
        "library": (
            Libraries,
            [
                "doc list --library PATH",
                "doc list --json --library PATH",
                "doc show 1 --library PATH",
                "doc history --library PATH",
                "doc history 1 --library PATH",
                f"doc ask BUNDLE Rome? --library PATH {few}",
                f"doc summarize BUNDLE --document 1 --library PATH {few}",
                "doc meaning BUNDLE --library PATH",
                "doc remove 1 --library PATH",
                "doc add TEXT --library PATH",
            ],
        ),
        "task": (
            Tasks,
            [
                "eval BUNDLE --task PATH",
                "eval BUNDLE --task PATH --sample 1 --json",
                "eval BUNDLE --task ITEMS --sample 1 --earlier PATH",
                "eval BUNDLE --task ITEMS --save PATH",
            ],
        ),
        "grammar": (
            Grammars,
            [
                f"run BUNDLE hi --json-schema PATH {few}",
                f"run BUNDLE hi --grammar PATH {few}",
                f"run BUNDLE hi --regex CONTENT {few}",
                f"chat BUNDLE --json-schema PATH {few} -",
            ],
        ),
        "talk": (
            Talk,
            [
                f"chat BUNDLE {few} -",
                f"chat BUNDLE {few} --log OUT -",
                f"run BUNDLE - {few}",
                f"run BUNDLE CONTENT {few} --system CONTENT --stop CONTENT",
                "embed BUNDLE - --no-verify",
                "doc add - --library OUT",
                f"doc rewrite BUNDLE - {few}",
                f"doc ask BUNDLE CONTENT --library LIBRARY {few}",
                "doc add CONTENT --library OUT",
                "inspect CONTENT",
                "doc show CONTENT --library LIBRARY",
            ],
        ),
    }

    def __init__(self, home: Path, scratch: Path) -> None:
        from pocketslm.cli import make_parser

        super().__init__(home, scratch)
        self.targets: dict[str, Target] = {}
        for kind, (make, _) in self.lines.items():
            inner = scratch / f"of-{kind}"
            inner.mkdir()
            self.targets[kind] = make(home.parent / make.name, inner)
        self.parser = make_parser()  # once: it takes longer than many a command

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
        choices = self.lines[kind.decode()][1]
        line = choices[min(int(number), len(choices) - 1)]
        self._command(self._filled(line, path, content), content if "-" in line.split() else b"")

    def _filled(self, line: str, path: Path, content: bytes) -> list[str]:
        library = self.scratch / "o.library"
        shutil.copyfile(self.home / "library", library)
        values = {
            **{"PATH": path, "OUT": self.scratch / "out", "LIBRARY": library},
            **{"HF": self.home / "hf", "BASE": self.home.parent / "update" / "base"},
            **{"BUNDLE": self.home / "bundle", "TEXT": self.home / "text.txt"},
            **{"ITEMS": self.home / "items", "CONTENT": os.fsdecode(content).replace("\0", " ")},
        }
        words = [word for word in line.split() if word != "-" or not line.startswith("chat")]
        for name, value in values.items():
            words = [word.replace(name, str(value)) for word in words]
        return words

    def _command(self, line: list[str], given: bytes) -> None:
        from pocketslm.cli import guarded

        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors):
            sys.stdin = io.TextIOWrapper(io.BytesIO(given), "utf-8", "surrogateescape")
            try:
                arguments = self.parser.parse_args(line)
                status = guarded(arguments.run, arguments)
            except SystemExit as error:  # argparse's
                status = error.code if isinstance(error.code, int) else 1
        said = errors.getvalue()
        assert status in (0, 2), f"{line}: {status}"
        assert "Traceback" not in said, said
        if status == 2:
            last = [one for one in said.split("\n") if one.startswith("pocketslm: error: ")]
            usage = "usage: pocketslm" in said and ": error: " in said.splitlines()[-1]
            assert len(last) == 1 or usage, said
            assert usage or said.endswith(f"{last[0]}\n"), said
        assert not any(ord(char) < 32 and char not in "\n\r\t" for char in out.getvalue()), line


TARGETS = (Commands,)
