"""What must not go on as it was in a process that came out of ``os.fork()``.

Threads and children stay with the parent: a lock that another thread held would be waited for for
ever, and a pipe to a child is the parent's to write.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forked(Protocol):
    """An object that is told, in the new process, before anything else uses it there."""

    def after_fork(self) -> None: ...


_watching: WeakSet[Forked] = WeakSet()


def watch(thing: Forked) -> None:
    """Call ``thing.after_fork()`` in every process that this one forks."""
    _watching.add(thing)


def _tell() -> None:
    for thing in list(_watching):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell)
