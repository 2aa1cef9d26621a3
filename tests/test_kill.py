"""A few rounds of ``python -m tests.kill``, and that it finds what it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import kill
import pytest

ROOT = Path(__file__).parents[1]
ROUNDS = 40


def test_nothing_is_lost() -> None:
    """In a process of its own, which forks."""
    command = [sys.executable, "-m", "tests.kill", "--rounds", str(ROUNDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"all: {ROUNDS} rounds, ")
    assert int(last.split()[3]) >= ROUNDS // 2


class Careless(kill.Target):
    """Writes where others read."""

    name = "careless"

    def work(self) -> None:
        with (self.folder / "file").open("wb", buffering=0) as file:
            for _ in range(10):
                file.write(b"x" * 10)
                Path(self.folder / "other").touch()

    def check(self) -> str:
        path = self.folder / "file"
        size = path.stat().st_size if path.exists() else 0
        kill.require(size in (0, 100), f"{size} bytes of 100")
        return "whole" if size else "none"


class Untidy(Careless):
    """Leaves a file each time."""

    name = "untidy"

    def work(self) -> None:
        (self.folder / f"{len(self.left())}.left").touch()

    def left(self) -> list[Path]:
        return list(self.folder.glob("*.left"))


@pytest.mark.parametrize(("target", "what"), [(Careless, "bytes of 100"), (Untidy, "left over")])
def test_losses_are_found(
    target: type[kill.Target], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kill.TARGETS, target.name, target)
    with pytest.raises(kill.Lost, match=what):
        kill.campaign(target.name, 40)


def test_a_failure_of_the_command_is_no_kill(tmp_path: Path) -> None:
    class Failing(Careless):
        def work(self) -> None:
            raise OSError("full")

    with pytest.raises(kill.Lost, match="failed with 1"):
        kill.run(Failing(tmp_path, Random(0)), None)
