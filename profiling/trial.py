"""Test whether ``pocketslm compare`` is right on this machine, on real runs with a known truth.

``python -m pocketslm.profiling.trial BUNDLE RECORDS.jsonl`` lets ``pocketslm bench`` measure one
bundle three times in turns. The third time its process is stopped for a tenth of the time, so it is
a tenth slower. Then sets of such runs are compared: a difference between the first and the second
is an error, and so is no difference between the first and the third. New records are appended to
RECORDS.jsonl and all of them are judged, so that several short trials make a long one.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread

from pocketslm.errors import BackendError, PocketSlmError, UsageError
from pocketslm.profiling.compare import LEAST_RUNS, compare
from pocketslm.profiling.records import Measurement, read_records

SLOWDOWN = 0.1
_PERIOD_S = 0.01  # the period of the throttle; a repetition has many
_Z = 1.96  # of a 95 % interval

# The true verdicts for a turn's second and third row against its first.
_TRUTH = ((1, "no difference"), (2, "slower"))
_DRAWS = 400

Turn = list[Measurement]
"""One run's rows: as it is, as it is, slowed down."""


def measure(bundle: Path, record: Path, runs: int, options: Sequence[str]) -> None:
    """Append the rows of so many runs. Raises BackendError if the benchmark fails."""
    command = [sys.executable, "-m", "pocketslm", "bench", *[str(bundle)] * 3]
    command += ["--runs", str(runs), "--record", str(record), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        with throttle(process.pid):
            _, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise BackendError(f"pocketslm bench failed: {(errors.splitlines() or ['silently'])[-1]}")


@contextmanager
def throttle(bench: int) -> Iterator[None]:
    """Slow down the last of three workers of the process ``bench`` as a slower processor would."""
    end = Event()
    thread = Thread(target=_throttle, args=(bench, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _throttle(bench: int, end: Event) -> None:
    children = Path(f"/proc/{bench}/task/{bench}/children")
    worker, begun, stopped = 0, 0.0, 0.0
    while not end.wait(_PERIOD_S * (1 - SLOWDOWN)):
        with suppress(OSError):  # it has ended, or its worker has
            workers = [int(word) for word in children.read_text().split()]
            if len(workers) != 3:
                continue
            now = time.monotonic()
            if workers[2] != worker:
                worker, begun, stopped = workers[2], now, 0.0
            # A sleep lasts longer than asked for, so the share is kept over many of them.
            owed = SLOWDOWN * (now - begun) / (1 - SLOWDOWN) - stopped
            os.kill(worker, signal.SIGSTOP)
            try:
                time.sleep(max(0.0, owed))
            finally:
                os.kill(worker, signal.SIGCONT)
            stopped += time.monotonic() - now
            begun += time.monotonic() - now  # it counts running time


@dataclass(frozen=True)
class Rate:
    """How many verdicts were right."""

    what: str
    right: int
    count: int

    def __str__(self) -> str:
        """With Wilson's interval."""
        n, share = self.count, self.right / self.count
        middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z * math.sqrt(share * (1 - share) / n + (_Z / (2 * n)) ** 2) / (1 + _Z**2 / n)
        low, high = max(0.0, middle - half), min(1.0, middle + half)
        return (
            f"{self.what}: {self.right} of {n} right ({share:.1%}; 95 %: {low:.0%} .. {high:.0%})"
        )


def turns(rows: Sequence[Measurement]) -> list[Turn]:
    """The rows run by run. Raises UsageError if they do not come from a trial."""
    found: dict[str, Turn] = {}
    for row in rows:
        found.setdefault(row.run, []).append(row)
    # An interrupted run left fewer rows.
    whole = [turn for turn in found.values() if len(turn) == 3]
    if not whole or any(len({(row.test, row.artefact) for row in turn}) > 1 for turn in whole):
        raise UsageError("the records are not of a trial: three rows of one test and bundle a run")
    return whole


def judge(found: Sequence[Turn], runs: int) -> list[Rate]:
    """Compare sets of ``runs`` runs: in turns within the same runs, and each set with the next."""
    if runs < LEAST_RUNS or len(found) < 2 * runs:
        raise UsageError(
            f"{len(found)} runs, in sets of {runs}; expected at least two sets of {LEAST_RUNS}"
        )
    sets = [found[at : at + runs] for at in range(0, len(found) - runs + 1, runs)]
    same, after = list(zip(sets, sets, strict=True)), list(pairwise(sets))
    rates = []
    for how, pairs in (("in turns", same), ("one after the other", after)):
        for third, right in _TRUTH:
            verdicts = [_verdict(before, later, third) for before, later in pairs]
            rates.append(Rate(f"{how}, {right}", verdicts.count(right), len(verdicts)))
    return rates


def drawn(found: Sequence[Turn], runs: int) -> list[float]:
    """The shares of right verdicts, in turns, of many sets drawn at random from all runs.

    The sets share runs, so they have no interval, but they use everything that was measured.
    """
    rng = random.Random(0)
    sets = [rng.sample(list(found), runs) for _ in range(_DRAWS)]
    return [
        statistics.fmean(_verdict(one, one, third) == right for one in sets)
        for third, right in _TRUTH
    ]


def _verdict(before: Sequence[Turn], later: Sequence[Turn], other: int) -> str:
    (difference,) = compare([turn[0] for turn in before], [turn[other] for turn in later])
    return difference.verdict


def format_trial(found: Sequence[Turn], runs: int) -> str:
    speeds = [[statistics.geometric_mean(r.tokens_per_second) for r in turn] for turn in found]
    first, second, slow = zip(*speeds, strict=True)
    cost = statistics.median(c / a for a, c in zip(first, slow, strict=True))
    noise = statistics.stdev(map(math.log, first))
    same, slower = drawn(found, runs)
    apart = statistics.stdev(math.log(b / a) for a, b in zip(first, second, strict=True))
    return (
        f"{len(found)} runs of {found[0][0].test}, {found[0][0].threads} threads, "
        f"{statistics.median(first):.0f} tok/s, which vary by {noise:.1%}, those in turns by "
        f"{apart:.1%} from each other\nslowed down: {cost:.3f} of the speed (median of all runs)\n"
        f"sets of {runs} runs:\n"
        + "".join(f"  {rate}\n" for rate in judge(found, runs))
        + f"of {_DRAWS} sets drawn at random, in turns, right: {same:.1%} no difference, "
        f"{slower:.1%} slower\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--runs", type=int, default=10, help="of each kind in a set")
    parser.add_argument("--sets", type=int, default=20, help="to add to those in RECORDS")
    parser.add_argument("-n", "--tokens", type=int, default=24, help="decoded in a repetition")
    parser.add_argument("-r", "--repetitions", type=int, default=6)
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args()
    options = ["--backend", "native", "-p", "0", "-d", "0", "-n", str(args.tokens)]
    options += ["-r", str(args.repetitions), "-t", str(args.threads)]
    try:
        for _ in range(args.sets):
            measure(args.bundle, args.records, args.runs, options)
        print(format_trial(turns(read_records(args.records)), args.runs), end="")
    except PocketSlmError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
