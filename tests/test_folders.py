"""Folders appear whole, replace each other at once, and leave nothing when a process dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pocketslm import folders
from pocketslm.errors import ExportError
from pocketslm.folders import published, written


def write(out: Path, text: str, **options: object) -> None:
    with published(out, **options) as folder:  # type: ignore[arg-type]
        (folder / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from pocketslm.folders import published

with published(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
    print("begun", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "o[u]t"
    command = [sys.executable, "-c", KILLED, str(out)]
    living, killed = (
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    )
    for process in (living, killed):
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(names(tmp_path)) == 2
    write(out, "first")
    assert len(names(tmp_path)) == 2  # the living one's, and ours
    living.communicate("go on", timeout=60)
    assert living.returncode != 0  # ours was faster
    assert names(tmp_path) == ["o[u]t"]
    assert (out / "file").read_text() == "first"


def test_a_folder_that_its_owner_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes keep files in one folder: what one lists the other may be done with."""
    with folders.aside(tmp_path) as other:
        kept = folders.lock

        def late(folder: Path, *, wait: bool = True) -> int | None:
            if folder == other:
                other.rmdir()
            return kept(folder, wait=wait)

        monkeypatch.setattr(folders, "lock", late)
        with folders.aside(tmp_path) as mine:
            assert names(tmp_path) == [mine.name]


def test_a_second_one_without_overwrite_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def slower() -> None:
        with published(out):
            write(out, "first")

    with pytest.raises(ExportError, match="made by another export meanwhile"):
        slower()
    assert (out / "file").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_folders_change_places_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is renamed by itself, so that there is no moment without one of them."""
    out = tmp_path / "out"
    write(out, "first")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("a rename of one folder"))
    said: list[str] = []
    write(out, "second", replace=True, say=said.append)
    assert (out / "file").read_text() == "second"
    assert names(tmp_path) == ["out"]
    assert said == []


def test_where_they_cannot_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, "first")
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    said: list[str] = []
    write(out, "second", replace=True, say=said.append)
    assert (out / "file").read_text() == "second"
    assert names(tmp_path) == ["out"]
    assert "for a moment there was no" in said[0]
    # A process that was killed in that moment: the next one brings the old folder back.
    out.rename(tmp_path / ".out.part-abc.old")
    (tmp_path / ".out.part-abc").mkdir()
    with pytest.raises(ExportError, match="meanwhile"):
        write(out, "third")
    assert (out / "file").read_text() == "second"
    assert names(tmp_path) == ["out"]


def test_a_link_keeps_pointing_at_what_was_replaced(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "bundle"
    write(real, "first")
    (tmp_path / "out").symlink_to(real)
    write(tmp_path / "out", "second", replace=True)
    assert (tmp_path / "out").is_symlink()
    assert (real / "file").read_text() == "second"


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with written(file) as part:
        part.write_text("one")
        assert not file.exists()
    assert file.read_text() == "one"
    with suppress(KeyboardInterrupt), written(file) as part:
        part.write_text("tw")
        raise KeyboardInterrupt
    assert (file.read_text(), list(tmp_path.iterdir())) == ("one", [file])
    with pytest.raises(OSError, match="No such file"), written(tmp_path / "no" / "file") as part:
        part.write_text("")


def test_the_error_names_what_failed(tmp_path: Path) -> None:
    def reading() -> None:
        with published(tmp_path / "out"):
            Path("/nowhere").read_text()

    with pytest.raises(ExportError, match="cannot use /nowhere: No such file"):
        reading()
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        write(tmp_path / "file" / "out", "x")
