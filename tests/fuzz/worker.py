"""One target in a process of its own: changes, feeds, and keeps what it finds."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from types import FrameType

from pocketslm.errors import PocketSlmError

from . import commands, kept, native, readers, serving
from .target import Target

TARGETS: dict[str, type[Target]] = {
    one.name: one for module in (native, readers, kept, serving, commands) for one in module.TARGETS
}
MEMORY = 3 << 30  # bytes that a target in Python may take beside what it has loaded
POOL = 200  # inputs to go on from
_SLOT = 1 << 20  # of the file that says what is being fed


class Slow(BaseException):
    """An input took more than its time."""


class Feeder:
    """Feeds a target; ``current`` is a file that holds the input that is being fed, for whoever
    looks on when the process ends."""

    def __init__(self, target: Target, current: Path, keep: Path) -> None:
        self.target, self.keep = target, keep
        current.write_bytes(b"\0" * _SLOT)
        with current.open("r+b") as file:
            self._slot = mmap.mmap(file.fileno(), _SLOT)
        self.inputs = self.accepted = 0
        self.found: dict[str, Path] = {}
        signal.signal(signal.SIGPROF, _too_slow)

    def feed(self, data: bytes) -> bool:
        """Whether the input was accepted."""
        self._slot[:8] = min(len(data), _SLOT - 8).to_bytes(8, "little")
        self._slot[8 : 8 + len(data)] = data[: _SLOT - 8]
        self.inputs += 1
        signal.setitimer(signal.ITIMER_PROF, self.target.cpu_seconds)
        try:
            self.target.run(data)
        except PocketSlmError:
            return False
        except (Exception, Slow) as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._keep(data, "".join(traceback.format_exception(error)))
            return False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.accepted += 1
        return True

    def _keep(self, data: bytes, report: str) -> None:
        """Keep an input with its report; of those from one line, the first."""
        where = [line for line in report.splitlines() if line.startswith('  File "')][-1:]
        kind = report.strip().splitlines()[-1].partition(":")[0]
        key = f"{where} {kind}"
        if key not in self.found:
            self.found[key] = keep(self.keep, self.target.name, data, report)


def keep(folder: Path, name: str, data: bytes, report: str) -> Path:
    """Write an input and how it was found; the input's path."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:12]
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(report, "utf-8", "backslashreplace")
    return path


def current_input(current: Path) -> bytes:
    """What was being fed."""
    content = current.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _too_slow(signal_number: int, frame: FrameType | None) -> None:
    raise Slow("it took more than its time")


def work(
    name: str,
    home: Path,
    keep: Path,
    current: Path,
    seed: int,
    *,
    seconds: float = 1e9,
    limit: int = 10**12,
) -> dict[str, object]:
    """Fuzz a target for so long, or so many inputs; the counts."""
    warnings.simplefilter("ignore")
    kind = TARGETS[name]
    if not kind.sanitized:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    rng = Random(seed)
    with tempfile.TemporaryDirectory(prefix="fuzz") as scratch:
        target = kind(home / name, Path(scratch))
        feeder = Feeder(target, current, keep)
        start = time.monotonic()
        seeds = target.seeds()
        if seed == 0:  # a first run also feeds what is whole, and past findings
            for data in dict.fromkeys(seeds):  # some are there twice, to be drawn more often
                feeder.feed(data)
        pool = list(seeds)
        while feeder.inputs < limit and time.monotonic() - start < seconds:
            data = target.mutate(rng.choice(pool), rng)
            if feeder.feed(data) and rng.random() < 0.05:
                # What was accepted is changed further; what it began with stays.
                if len(pool) < len(seeds) + POOL:
                    pool.append(data)
                else:
                    pool[len(seeds) + rng.randrange(POOL)] = data
        target.close()
    return {
        "inputs": feeder.inputs,
        "accepted": feeder.accepted,
        "seconds": round(time.monotonic() - start, 1),
        "findings": [str(path) for path in feeder.found.values()],
    }


def replay(name: str, home: Path, path: Path) -> None:
    """Feed one input; an exception where it is a finding."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as scratch:
        target = TARGETS[name](home / name, Path(scratch))
        try:
            target.run(path.read_bytes())
            print("accepted")
        except PocketSlmError as error:
            print(f"refused: {error}")
        target.close()


def main(name: str, home: str, *rest: str) -> None:
    """Fuzz, the counts going to a file, or feed one input."""
    if len(rest) == 1:
        replay(name, Path(home), Path(rest[0]))
        return
    keep, current, seed, seconds, limit, result = rest
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    counts = work(
        name,
        Path(home),
        Path(keep),
        Path(current),
        int(seed),
        seconds=float(seconds),
        limit=int(limit),
    )
    Path(result).write_text(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
