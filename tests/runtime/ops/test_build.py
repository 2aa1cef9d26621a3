"""A library in the cache is what was built, or it is built again."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from pocketslm.runtime.ops import build
from pocketslm.runtime.ops.built import cache_directory, is_whole, seal, source_hash


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library, sealed as the real ones are."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    output = folder / "libanswer.so"
    command = [*build.find_toolchain().command, "-shared", "-fPIC", str(source), "-o", str(output)]
    subprocess.run(command, check=True)
    assert not is_whole(output)
    seal(output)
    return output


def test_a_sealed_library_loads(built: Path) -> None:
    assert is_whole(built)
    assert ctypes.CDLL(str(built)).answer() == 42


def test_any_other_content_is_not_whole(built: Path, tmp_path: Path) -> None:
    data = built.read_bytes()
    path = tmp_path / built.name
    for content in (
        b"",
        *(data[:size] for size in (1, 100, 4096, len(data) // 2, len(data) - 1)),
        data[:-40],
        data + b"\0",
        data[:200] + bytes([data[200] ^ 1]) + data[201:],
        bytes(len(data)),
    ):
        path.write_bytes(content)
        assert not is_whole(path)
    assert not is_whole(tmp_path / "nothing")
    assert not is_whole(tmp_path)


def test_objects_that_nothing_used_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while another process compiles: one lock is held for each, not one for all."""
    monkeypatch.setenv("POCKETSLM_CACHE", str(tmp_path))
    folder = cache_directory() / "objects"
    old, fresh = folder / "ab" / "ab01.o", folder / "cd" / "cd02.o"
    for path in (old, fresh):
        path.parent.mkdir(parents=True)
        path.touch()
    os.utime(old, (0, 0))
    with build._locked(fresh.parent):
        assert build._objects() == folder
    assert list(folder.rglob("*.o")) == [fresh]


def test_a_cut_library_in_the_cache_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETSLM_CACHE", str(tmp_path))
    version, cache = source_hash(), cache_directory()
    # No library of a package.
    monkeypatch.setattr("pocketslm.runtime.ops.built.SOURCES", tmp_path)
    cache.mkdir()
    made: list[Path] = []
    monkeypatch.setattr(build, "build_library", lambda place: made.append(place) or place)
    monkeypatch.setattr(build, "build_runner", lambda place, target: made.append(place) or place)
    library = cache / f"libpocketslm-{version}.so"
    runner = cache / f"pocketslm-run-{version}"
    for path in (library, runner):
        path.write_bytes(b"cut")
    assert (build.library(), build.runner()) == (cache, runner)
    assert made == [cache, runner]
    for path in (library, runner):
        seal(path)
    assert (build.library(), build.runner()) == (library, runner)
    assert len(made) == 2


def test_a_target_that_is_none_names_those_there_are() -> None:
    with pytest.raises(build.BuildError, match="unknown target arm64-linux; known: .*macos"):
        build.find_toolchain("arm64-linux")
