"""Tell whether two sets of records differ, as far as the noise allows it.

Repetitions within a process are not independent: they share its memory layout, the state of the
machine, the neighbours' work. So the unit is the run (``bench --runs``): one process, one value,
the mean of the logarithms of its repetitions' tokens a second (the median of so few values would
waste a third of the information).

Runs that were taken in turns (``bench A B``, or two commands of one run each, again and again) are
compared pair by pair: both share any drift, so it cancels. For sets that were measured one after
the other we compare means, and widen the interval by each set's own drift: the second half of its
runs against the first, by Student's t of these two observations. That is right for noise of the
same power at every time scale (1/f), and errs on the safe side for noise without memory.

Intervals are a studentized bootstrap over runs (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, 12.5), which keeps its promise for a handful of runs where the plain percentile one
is too narrow. With several tests they are widened (Bonferroni), so that all hold together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketslm.errors import UsageError
from pocketslm.profiling.records import OURS, Measurement
from pocketslm.profiling.tables import md_table

CONFIDENCE = 0.95
LEAST_RUNS = 4
_RESAMPLES = 9999
_SEED = 0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """The difference in one test: B's tokens a second as a multiple of A's, with its interval.

    - ``verdict``: "faster" or "slower" (B than A), "no difference", or "cannot tell" (too few runs,
      and then there is no interval).
    - ``runs``: the number of runs of A and of B.
    - ``in_turns``: whether the runs alternated.
    """

    test: str
    engine: str
    threads: int
    runs: tuple[int, int]
    in_turns: bool
    ratio: float
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class _Run:
    """``started`` and ``name`` are as in Measurement. ``speed`` is the mean logarithm of tokens a
    second.
    """

    started: str
    name: str
    speed: float


_Test = tuple[str, str, int]


def compare(a: Sequence[Measurement], b: Sequence[Measurement]) -> list[Difference]:
    """Compare every test that both did, in A's order. Raises UsageError if there is none."""
    ours, theirs = _by_test(a), _by_test(b)
    keys = [key for key in ours if key in theirs]
    if not keys:
        raise UsageError(
            "the two records share no test of the same runtime, threads and lengths; they have "
            f"{_names(a)} and {_names(b)}"
        )
    enough = [k for k in keys if min(len(ours[k]), len(theirs[k])) >= LEAST_RUNS]
    confidence = 1 - (1 - CONFIDENCE) / max(len(enough), 1)
    differences = []
    for key in keys:
        before, after = (np.array([run.speed for run in side[key]]) for side in (ours, theirs))
        in_turns = _in_turns(ours[key], theirs[key])
        middle = float(after.mean() - before.mean())
        low = high = None
        verdict = "cannot tell"
        if key in enough:
            half = half_width(before, after, confidence, in_turns=in_turns)
            low, high = math.exp(middle - half), math.exp(middle + half)
            verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
        runs = len(before), len(after)
        ratio = math.exp(middle)
        differences.append(Difference(*key, runs, in_turns, ratio, low, high, verdict))
    return differences


def compare_two(rows: Sequence[Measurement]) -> list[Difference]:
    """Compare the two bundles in one file. Raises UsageError unless there are two."""
    sides: dict[tuple[str, str | None], list[Measurement]] = {}
    for row in rows:
        if row.runtime == OURS:
            sides.setdefault((row.artefact, row.artefact_sha256), []).append(row)
    if len(sides) != 2:
        raise UsageError(
            f"the records hold {len(sides)} bundles, expected two (`bench A B --runs 10 --record "
            "FILE`), or a second file of records"
        )
    return compare(*sides.values())


def half_width(a: Floats, b: Floats, confidence: float, *, in_turns: bool) -> float:
    """Half the width of the confidence interval around mean(b) - mean(a).

    ``a`` and ``b`` are the values of runs in the order of time.
    """
    if in_turns:
        return _bootstrapped([b - a], confidence)
    halves = [side.size // 2 for side in (a, b)]
    drifts = [side[:n].mean() - side[-n:].mean() for side, n in zip((a, b), halves, strict=True)]
    # Student's t of two observations whose mean is known to be 0, in closed form.
    t = confidence * math.sqrt(2 / (1 - confidence**2))
    drift = t * math.sqrt(statistics.fmean(one**2 for one in drifts))
    return max(drift, _bootstrapped([a, b], confidence))


def _bootstrapped(sets: Sequence[Floats], confidence: float) -> float:
    """Half the interval of a mean of independent values, or of the difference of two means.

    The quantile of |t| over resampled values, t studentized by its own resample's error (Welch).
    """
    error = math.hypot(*map(_standard_error, sets))
    if error == 0:
        return 0.0
    rng = np.random.default_rng(_SEED)
    drawn = [one[rng.integers(0, one.size, (_RESAMPLES, one.size))] for one in sets]
    errors = np.sqrt(sum(_standard_error(one) ** 2 for one in drawn))
    first, *second = (many.mean(-1) - one.mean() for many, one in zip(drawn, sets, strict=True))
    shift = np.abs(first - second[0] if second else first)
    # A resample of one run alone has no error of its own: it counts as infinitely far.
    t = np.divide(shift, errors, out=np.full(_RESAMPLES, np.inf), where=errors > 0)
    return error * float(np.quantile(t, confidence, method="higher"))


def _standard_error(values: Floats) -> Any:
    return values.std(-1, ddof=1) / math.sqrt(values.shape[-1])


def _in_turns(a: Sequence[_Run], b: Sequence[_Run]) -> bool:
    """Whether the runs alternated: the first runs of both began before the second run of either,
    and so on, or both sets come from the same runs.
    """
    if len(a) != len(b):
        return False
    rounds = list(zip(a, b, strict=True))
    return all(one.name == other.name for one, other in rounds) or all(
        max(run.started for run in one) < min(run.started for run in two)
        for one, two in pairwise(rounds)
    )


def _by_test(rows: Sequence[Measurement]) -> dict[_Test, list[_Run]]:
    """The runs of each test, runtime and number of threads, in the order of time.

    If there are several artefacts, the artefact is part of the runtime's name. Otherwise it may
    differ between A and B, which is the purpose of a comparison.
    """
    artefacts = {(row.runtime, row.artefact) for row in rows}
    several = len(artefacts) > len({runtime for runtime, _ in artefacts})
    found: dict[_Test, list[_Run]] = {}
    for row in rows:
        engine = f"{row.runtime} {row.backend.partition(' ')[0]}".strip()
        engine = f"{row.artefact} on {engine}" if several else engine
        speed = statistics.fmean(map(math.log, row.tokens_per_second))
        found.setdefault((row.title, engine, row.threads), []).append(
            _Run(row.started, row.run, speed)
        )
    return {key: sorted(runs, key=_when) for key, runs in found.items()}


def _when(run: _Run) -> tuple[str, str]:
    return run.started, run.name


def _names(rows: Sequence[Measurement]) -> str:
    return ", ".join(f"{test} ({engine}, {n} threads)" for test, engine, n in _by_test(rows))


def compare_table(differences: Sequence[Difference]) -> str:
    """As a Markdown table."""
    return md_table(
        ["test", "runtime", "threads", "runs", "taken", "B / A, tok/s", "95 % interval", "B is"],
        ["r", "l", "r", "r", "l", "r", "r", "l"],
        [
            [
                one.test,
                one.engine,
                str(one.threads),
                f"{one.runs[0]}, {one.runs[1]}",
                "in turns" if one.in_turns else "one after the other",
                f"{one.ratio:.3f}",
                "" if one.low is None else f"{one.low:.3f} .. {one.high:.3f}",
                one.verdict,
            ]
            for one in differences
        ],
    )
