"""Polls a device's sensors beside a run.

One shell on the device answers all polls and reads files without starting a process, so a poll of
ten files costs the device a fraction of a millisecond.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pocketslm.errors import DeviceError
from pocketslm.profiling.devices.device import Device, watchdog
from pocketslm.profiling.records import TracePoint
from pocketslm.profiling.sensors import cpufreq, power, thermal
from pocketslm.profiling.sensors.tree import Tree, parse, script, whole
from pocketslm.runtime.cores import Cluster

FILES = tuple(dict.fromkeys((*cpufreq.FILES, *thermal.FILES, *power.FILES)))
COMMANDS = tuple(dict.fromkeys((*thermal.COMMANDS, *power.COMMANDS)))
POLL_TIMEOUT_S = 30.0
_END = "end of poll"


def read_sensors(device: Device) -> Tree:
    """Read everything that the device tells, once."""
    return parse(device.shell(script(FILES, COMMANDS)))


@dataclass(frozen=True)
class Poll:
    """``at_ns`` is this machine's monotonic clock in the middle of the exchange."""

    at_ns: int
    tree: Tree


class Sampler:
    """Polls every ``interval_s`` while used with ``with``, and whenever :meth:`poll` is called.

    With an interval of 0 it polls only when :meth:`poll` is called.

    ``seen`` is the result of :func:`read_sensors`. ``pid`` is the process whose memory belongs in
    the trace. A lost connection ends the polls; the caller, whose work runs on it too, reports
    that.
    """

    def __init__(
        self,
        device: Device,
        seen: Tree,
        clusters: Sequence[Cluster],
        pid: int | None = None,
        interval_s: float = 1.0,
    ) -> None:
        self.source = power.find_source(seen)
        self._clusters, self._interval_s = clusters, interval_s
        self._names = {
            path: seen[path] for path in seen if path.endswith(("type", "name", "label"))
        }
        files = [*cpufreq.polled_files(seen, clusters), *thermal.polled_files(seen)]
        commands = ["vcgencmd measure_temp"] if "$ vcgencmd measure_temp" in seen else []
        if self.source:
            files += self.source.files
            commands += self.source.commands
        self._statm = f"/proc/{pid}/statm" if pid else ""
        if pid:
            files.append(self._statm)
        self._page = whole(device.shell("getconf PAGESIZE 2>/dev/null || echo 4096")) or 4096
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        poll = script(files, commands)
        self._shell = device.stream(
            f"while read -r go; do {poll}; echo '{_END}'; done", self._stderr
        )
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.polls: list[Poll] = []
        self.lost = False

    def __enter__(self) -> Self:
        self.poll()
        if self._interval_s:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._shell.kill()
        if self._interval_s:
            self._thread.join()
        self._shell.communicate()
        self._stderr.close()

    def poll(self) -> None:
        """Read the sensors now."""
        with self._lock:
            if self.lost:
                return
            lines: list[str] = []
            asked = time.monotonic_ns()
            assert self._shell.stdin is not None
            assert self._shell.stdout is not None
            try:
                with watchdog(POLL_TIMEOUT_S, self._shell.kill):
                    self._shell.stdin.write("go\n")
                    self._shell.stdin.flush()
                    while (line := self._shell.stdout.readline()).rstrip() != _END:
                        if not line:
                            self.lost = True
                            return
                        lines.append(line)
            except (BrokenPipeError, ValueError):
                self.lost = True
                return
            at_ns = (asked + time.monotonic_ns()) // 2
            self.polls.append(Poll(at_ns, parse("".join(lines))))

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s) and not self.lost:
            self.poll()

    def trace(self, start_ns: int) -> tuple[TracePoint, ...]:
        """The polls. The last one before ``start_ns`` counts as the beginning."""
        points = []
        before: Poll | None = None
        watts = self._watts()
        for poll, power_now in zip(self.polls, watts, strict=True):
            points.append(
                TracePoint(
                    at_ns=max(poll.at_ns - start_ns, 0),
                    celsius=thermal.celsius(self._names | poll.tree),
                    khz=cpufreq.khz(poll.tree, before.tree if before else None, self._clusters),
                    rss_bytes=self._rss(poll.tree),
                    watts=power_now,
                )
            )
            before = poll
        first = max((i for i, p in enumerate(self.polls) if p.at_ns <= start_ns), default=0)
        return tuple(points[first:])

    def joules(self, windows_ns: Sequence[tuple[int, int]]) -> float | None:
        """The energy within all windows of time together, or None if the polls do not tell."""
        if self.source is None:
            return None
        points = power.cumulative(
            self.source, [(poll.at_ns / 1e9, poll.tree) for poll in self.polls]
        )
        each = [power.between(points, start / 1e9, end / 1e9) for start, end in windows_ns]
        known = [one for one in each if one is not None]
        return sum(known) if known and len(known) == len(each) else None

    def _watts(self) -> list[float | None]:
        """Watts: a meter's at each poll, a counter's since the poll before."""
        if self.source is None:
            return [None] * len(self.polls)
        if not self.source.is_counter:
            return [self.source.read(poll.tree) for poll in self.polls]
        found: list[float | None] = [None]
        for before, after in zip(self.polls, self.polls[1:], strict=False):
            pair = [(poll.at_ns / 1e9, poll.tree) for poll in (before, after)]
            points = power.cumulative(self.source, pair)
            seconds = (after.at_ns - before.at_ns) / 1e9
            found.append(points[-1][1] / seconds if len(points) == 2 and seconds > 0 else None)
        return found[: len(self.polls)]

    def _rss(self, tree: Tree) -> int | None:
        words = tree.get(self._statm, "").split()
        return int(words[1]) * self._page if len(words) > 1 and words[1].isdecimal() else None


def idle_watts(device: Device, seen: Tree, seconds: float) -> float | None:
    """The mean power of the device while it does nothing for so many seconds."""
    with Sampler(device, seen, (), interval_s=min(1.0, seconds / 4)) as sampler:
        time.sleep(seconds)
        sampler.poll()
        polls = sampler.polls
        joules = sampler.joules([(polls[0].at_ns, polls[-1].at_ns)])
    if sampler.lost:
        raise DeviceError(f"{device.name}: the connection was lost")
    return None if joules is None else joules * 1e9 / (polls[-1].at_ns - polls[0].at_ns)
