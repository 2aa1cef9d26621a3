"""Objects that start afresh in a process that ``os.fork()`` made.

Threads and child processes stay with the parent. In the fork, a lock that another thread held would
never be released, and a pipe to a child still belongs to the parent.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forked(Protocol):
    """An object that is told of a fork, in the new process, before anything else uses it there."""

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
