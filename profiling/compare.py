"""Whether two sets of records differ, said only where the noise allows it.

Repetitions within a process are not independent: they share its memory layout, the state of the
machine, the neighbours' work. So the unit is the run (``bench --runs``): one process, one value,
the logarithm of its median tokens a second. Two means of such values are compared by a studentized
bootstrap over runs (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 12.5), whose
intervals keep their promise for a handful of runs where the plain percentile ones are too narrow.
With several tests the intervals are widened (Bonferroni), so that all hold together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketslm.errors import UsageError
from pocketslm.profiling.records import Measurement
from pocketslm.profiling.tables import md_table

CONFIDENCE = 0.95
LEAST_RUNS = 4
_RESAMPLES = 9999
_SEED = 0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Of one test: B's tokens a second as a multiple of A's, with the interval that holds it.

    verdict: "faster", "slower" (B than A), "no difference" or "cannot tell" (too few runs, and
    then no interval). runs: of A and of B.
    """

    test: str
    engine: str
    threads: int
    runs: tuple[int, int]
    ratio: float
    low: float | None
    high: float | None
    verdict: str


def compare(a: Sequence[Measurement], b: Sequence[Measurement]) -> list[Difference]:
    """Every test that both did, in A's order; UsageError where there is none."""
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
        before, after = np.log(ours[key]), np.log(theirs[key])
        middle = float(after.mean() - before.mean())
        low = high = None
        verdict = "cannot tell"
        if key in enough:
            half = half_width(before, after, confidence)
            low, high = math.exp(middle - half), math.exp(middle + half)
            verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
        runs = len(before), len(after)
        differences.append(
            Difference(key[0], key[1], key[2], runs, math.exp(middle), low, high, verdict)
        )
    return differences


def half_width(a: Floats, b: Floats, confidence: float) -> float:
    """Of the interval around mean(b) - mean(a) that holds the true one so often.

    The quantile of |t| over resampled runs, t studentized by its own resample's error (Welch).
    """
    error = math.hypot(_standard_error(a), _standard_error(b))
    if error == 0:
        return 0.0
    rng = np.random.default_rng(_SEED)
    drawn_a = a[rng.integers(0, a.size, (_RESAMPLES, a.size))]
    drawn_b = b[rng.integers(0, b.size, (_RESAMPLES, b.size))]
    errors = np.hypot(_standard_error(drawn_a), _standard_error(drawn_b))
    shift = (drawn_b.mean(-1) - b.mean()) - (drawn_a.mean(-1) - a.mean())
    # A resample of one run alone has no error of its own: it counts as infinitely far.
    t = np.divide(np.abs(shift), errors, out=np.full(_RESAMPLES, np.inf), where=errors > 0)
    return error * float(np.quantile(t, confidence, method="higher"))


def _standard_error(values: Floats) -> Any:
    return values.std(-1, ddof=1) / math.sqrt(values.shape[-1])


def _by_test(rows: Sequence[Measurement]) -> dict[tuple[str, str, int], list[float]]:
    """The median tokens a second of each run, by test, runtime and threads.

    The artefact is part of the runtime's name where there are several: it may differ between A
    and B otherwise, which is what a comparison is for.
    """
    artefacts = {(row.runtime, row.artefact) for row in rows}
    several = len(artefacts) > len({runtime for runtime, _ in artefacts})
    found: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        name = row.test if row.workload == "random" else f"{row.workload} {row.test}"
        engine = f"{row.runtime} {row.backend.partition(' ')[0]}".strip()
        engine = f"{row.artefact} on {engine}" if several else engine
        found.setdefault((name, engine, row.threads), []).append(
            statistics.median(row.tokens_per_second)
        )
    return found


def _names(rows: Sequence[Measurement]) -> str:
    return ", ".join(f"{test} ({engine}, {n} threads)" for test, engine, n in _by_test(rows))


def compare_table(differences: Sequence[Difference]) -> str:
    """As a Markdown table."""
    return md_table(
        ["test", "runtime", "threads", "runs", "B / A, tok/s", "95 % interval", "B is"],
        ["r", "l", "r", "r", "r", "r", "l"],
        [
            [
                one.test,
                one.engine,
                str(one.threads),
                f"{one.runs[0]}, {one.runs[1]}",
                f"{one.ratio:.3f}",
                "" if one.low is None else f"{one.low:.3f} .. {one.high:.3f}",
                one.verdict,
            ]
            for one in differences
        ],
    )
