"""What is fuzzed: a target knows its seeds, how to change them, and how to feed one."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import ClassVar

from . import mutate

Mutators = dict[str, mutate.Mutate]  # by the end of a file's name
CORPUS = Path(__file__).parents[1] / "corpus"


class Target:
    """Something that reads what a stranger wrote.

    An input is bytes: the name of a file, a zero byte, and the file's content. ``home``: a folder
    in which ``seeds`` made what the target begins with; ``scratch``: an empty one of its own.
    """

    name: ClassVar[str]
    covers: ClassVar[tuple[str, ...]]  # the files whose lines count, as patterns
    sanitized: ClassVar[bool] = False  # runs C++ under sanitizers
    cpu_seconds: ClassVar[int] = 10  # that an input may take, on this machine
    mutators: ClassVar[Mutators] = {}

    def __init__(self, home: Path, scratch: Path) -> None:
        self.home, self.scratch = home, scratch

    def seeds(self) -> list[bytes]:
        """What was made, and past findings."""
        paths = [*(self.home / "seeds").rglob("*"), *self.findings()]
        return [path.read_bytes() for path in sorted(paths) if path.is_file()]

    @classmethod
    def findings(cls) -> list[Path]:
        """Inputs that once were findings."""
        return sorted((CORPUS / cls.name).glob("*"))

    def mutate(self, data: bytes, rng: Random) -> bytes:
        name, _, content = data.partition(b"\0")
        ending = next((end for end in self.mutators if name.endswith(end.encode())), "")
        return name + b"\0" + self.mutators.get(ending, mutate.binary)(content, rng)

    def run(self, data: bytes) -> None:
        """Feed an input; PocketSlmError where it is refused, anything else is a finding."""
        name, _, content = data.partition(b"\0")
        self.feed(name.decode("utf-8", "replace"), content)

    def feed(self, name: str, content: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """End what it has started."""


class InFolder(Target):
    """A target that reads a folder of which an input is one file, the others being whole."""

    def __init__(self, home: Path, scratch: Path) -> None:
        super().__init__(home, scratch)
        self.folder = scratch / "folder"
        self.folder.mkdir()
        self.whole = {
            str(path.relative_to(home / "whole")): path.read_bytes()
            for path in sorted((home / "whole").rglob("*"))
            if path.is_file()
        }
        for name, content in self.whole.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)

    def seeds(self) -> list[bytes]:
        files = [name.encode() + b"\0" + content for name, content in self.whole.items()]
        return [*files, *super().seeds()]

    def feed(self, name: str, content: bytes) -> None:
        name = name if name in self.whole else next(iter(self.whole))
        path = self.folder / name
        path.unlink()  # the one before may still be mapped
        path.write_bytes(content)
        try:
            self.read(self.folder)
        finally:
            path.unlink()
            path.write_bytes(self.whole[name])

    def read(self, folder: Path) -> None:
        raise NotImplementedError
