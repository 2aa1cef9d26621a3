"""Folders and files that appear whole: made beside their place, then renamed into it.

A folder under way is locked by its process. What a killed process left is known by its lock being
free, and goes when the next one works in the same place.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketslm.errors import ExportError
from pocketslm.locks import lock

Say = Callable[[str], None]
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_PART = ".part-"
_OLD = ".old"  # the folder that was there, for a moment, where two cannot change places at once


@contextmanager
def aside(parent: Path, prefix: str = _PART) -> Iterator[Path]:
    """A new folder in ``parent`` to work in, which goes with all that is still in it at the end.

    What killed processes left of folders with this prefix goes first. Raises OSError where nothing
    can be written there.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent):
        _sweep(parent, prefix)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        held = lock(folder, wait=False)
    try:
        yield folder
    finally:
        if held is not None:
            os.close(held)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a new file, which takes its place when the block ends well, all of
    it on the disk first; else it goes. What a killed process left has the same name, and is written
    over. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        _sync_one(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def published(
    out: Path, *, replace: bool = False, say: Say = lambda message: None
) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place when the block ends well.

    ``replace``: in place of the folder that is there, see :func:`put`. Raises ExportError where
    ``out`` is in the way, also of another process that was faster, or cannot be written.
    """
    out = out.resolve() if replace else out
    try:
        with aside(out.parent, f".{out.name}{_PART}") as folder:
            yield folder
            put(folder, out, replace, say)
    except OSError as error:
        ours = error.filename is None or str(error.filename).startswith(str(out.parent))
        what = f"write {out}" if ours else f"use {error.filename}"
        raise ExportError(f"cannot {what}: {error.strerror or error}") from error


def put(folder: Path, out: Path, replace: bool, say: Say = lambda message: None) -> None:
    """Give ``folder`` the name ``out``, all of it on the disk first.

    ``replace``: Linux lets it change places with the folder that is there at once; elsewhere there
    is a moment in which ``out`` does not exist, and ``say`` tells so.
    """
    folder.chmod(0o755)
    _sync(folder)
    with _locked(out.parent):
        if not out.exists():
            folder.rename(out)
        elif not replace:
            raise ExportError(f"{out} was made by another export meanwhile; use --overwrite")
        elif not _exchange(folder, out):
            say(f"this system cannot exchange folders at once: for a moment there was no {out}")
            old = out.with_name(f".{out.name}{_PART}{os.getpid()}{_OLD}")
            out.rename(old)
            folder.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        _sync_one(out.parent)


def put_file(file: Path, out: Path) -> None:
    """Give a file the name ``out``, in place of any that has it, all of it on the disk first."""
    _sync_one(file)
    file.replace(out)
    _sync_one(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at once; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


def _sweep(parent: Path, prefix: str) -> None:
    """Remove what killed processes left, and bring back what one had moved away."""
    for left in sorted(parent.glob(f"{glob.escape(prefix)}*")):
        if left.is_symlink() or not left.is_dir() or (held := lock(left, wait=False)) is None:
            continue
        os.close(held)
        home = parent / left.name[1:].rpartition(_PART)[0]
        if left.name.endswith(_OLD) and not home.exists():
            left.rename(home)
        else:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else makes, sweeps or puts folders in this one meanwhile."""
    held = lock(folder)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _sync(folder: Path) -> None:
    """To the disk, so that a power cut leaves no folder of the right name with half its data."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync_one(path)


def _sync_one(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folders
    held = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can sync a folder
            os.fsync(held)
    finally:
        os.close(held)
