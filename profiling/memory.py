"""The memory of this process, as the system counts it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketslm.errors import BackendError

if TYPE_CHECKING:
    import resource

_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class Memory:
    """Sizes in bytes. A size that the system does not tell is None.

    - ``peak_rss``: the most that was ever resident.
    - ``rss_anon``, ``rss_file``: resident now, in own pages and in pages of mapped files.
    - ``pss``, ``pss_file``: the same, but pages that several processes map count in part.
    """

    peak_rss_bytes: int
    rss_anon_bytes: int | None = None
    rss_file_bytes: int | None = None
    pss_bytes: int | None = None
    pss_file_bytes: int | None = None


def memory() -> Memory:
    """Measure this process: from /proc on Linux, from getrusage elsewhere."""
    if _STATUS.exists():
        rollup = _ROLLUP.read_text(encoding="utf-8") if _ROLLUP.exists() else ""
        return parse_status(_STATUS.read_text(encoding="utf-8") + rollup)
    peak = _usage().ru_maxrss
    # macOS counts bytes, the BSDs KiB.
    return Memory(peak if sys.platform == "darwin" else peak * 1024)


@dataclass(frozen=True)
class Spent:
    """User and system time of this process, and page faults that had to read from storage."""

    cpu_ns: int
    major_faults: int

    def __sub__(self, before: Spent) -> Spent:
        return Spent(self.cpu_ns - before.cpu_ns, self.major_faults - before.major_faults)


def spent() -> Spent:
    """What this process has used so far."""
    usage = _usage()
    return Spent(round((usage.ru_utime + usage.ru_stime) * 1e9), usage.ru_majflt)


def _usage() -> resource.struct_rusage:
    try:
        import resource
    except ImportError:
        raise BackendError(
            "this system does not tell what a process used; measure on Linux or macOS"
        ) from None
    return resource.getrusage(resource.RUSAGE_SELF)


def parse_status(text: str) -> Memory:
    """Read ``/proc/<pid>/status`` and ``smaps_rollup``, whose "kB" are KiB.

    VmHWM starts anew with each program. getrusage's maximum survives exec, so a small child of a
    large parent would report the parent's memory.
    """
    kib = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            kib[name] = int(value.removesuffix(" kB")) * 1024
    return Memory(
        kib["VmHWM"], kib.get("RssAnon"), kib.get("RssFile"), kib.get("Pss"), kib.get("Pss_File")
    )
