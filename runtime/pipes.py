"""Waiting for a child process to write."""

from __future__ import annotations

import sys
import time

_PAUSE_S = 0.001  # between two looks, where the system has nothing to wait with


def has_input(pipe: int, timeout_s: float | None) -> bool:
    """Wait until a pipe can be read or has ended; False: neither within ``timeout_s``.

    Raises OSError for a pipe that was closed.
    """
    if sys.platform == "win32":
        import _winapi
        import msvcrt

        end = None if timeout_s is None else time.monotonic() + timeout_s
        handle = msvcrt.get_osfhandle(pipe)
        # An ended pipe is an OSError here, and no input either way.
        while not _winapi.PeekNamedPipe(handle, 0)[0]:
            if end is not None and time.monotonic() > end:
                return False
            time.sleep(_PAUSE_S)
        return True
    import select

    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    return bool(ready.poll(timeout_s and timeout_s * 1000))
