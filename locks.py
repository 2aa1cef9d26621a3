"""Locks on folders, between processes. A lock ends with the process that holds it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path


def lock(folder: Path, *, wait: bool = True) -> int | None:
    """An open file that holds the folder's lock until it is closed.

    - ``wait``: wait for another process that has the lock. It is then also an open file where the
      file system has no locks. Without it the answer is None where the lock cannot be had.
    """
    try:
        held = _open(folder)
    except FileNotFoundError:  # its owner removed it meanwhile
        if wait:
            raise
        return None
    try:
        _hold(held, wait)
    except OSError:
        if not wait:
            os.close(held)
            return None
    return held


def _open(folder: Path) -> int:
    if sys.platform == "win32":
        # Windows opens no folders. This file beside it goes when the last process closes it.
        return os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT | os.O_TEMPORARY)
    return os.open(folder, os.O_RDONLY)


def _hold(held: int, wait: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        while wait:
            with suppress(OSError):  # it gives up after ten seconds
                return msvcrt.locking(held, msvcrt.LK_LOCK, 1)
        return msvcrt.locking(held, msvcrt.LK_NBLCK, 1)
    import fcntl

    return fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
