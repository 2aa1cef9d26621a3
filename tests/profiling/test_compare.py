"""The comparison holds what it promises: shown on simulated machines whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pocketslm.errors import UsageError
from pocketslm.profiling.compare import compare, half_width

RUNS, TRIALS = 8, 400
# A share of TRIALS has a standard error of 1.1 % where the truth is 95 %; two of them.
SLACK = 0.022


def runs(rng: np.random.Generator, noise: str) -> Any:
    """Log tokens/s of TRIALS x RUNS runs: each the median of 5 autocorrelated repetitions."""
    between = rng.normal(0, 0.02, (TRIALS, RUNS, 1))
    if noise == "spikes":  # a neighbour takes a tenth of the machine during one run in eight
        between = between + np.log(np.where(rng.random((TRIALS, RUNS, 1)) < 1 / 8, 0.93, 1.0))
    within = np.empty((TRIALS, RUNS, 5))
    state = rng.normal(0, 0.02, (TRIALS, RUNS))
    for i in range(5):
        state = 0.7 * state + rng.normal(0, 0.02 * np.sqrt(1 - 0.49), (TRIALS, RUNS))
        within[..., i] = state
    return np.median(between + within, -1)


@pytest.mark.parametrize("noise", ["calm", "spikes"])
def test_equal_ones_are_equal_and_a_tenth_is_found(noise: str) -> None:
    rng = np.random.default_rng(0)
    before, after = runs(rng, noise), runs(rng, noise)
    halves = [half_width(a, b, 0.95) for a, b in zip(before, after, strict=True)]
    apart = np.abs(after.mean(-1) - before.mean(-1))
    assert np.mean(apart <= halves) >= 0.95 - SLACK
    slower = after + np.log(0.9)
    apart = before.mean(-1) - slower.mean(-1)
    assert np.mean(apart > halves) >= 0.95


def test_the_plain_bootstrap_would_not_hold() -> None:
    """The harness sees an interval that is too narrow: half of ours."""
    rng = np.random.default_rng(0)
    before, after = runs(rng, "calm"), runs(rng, "calm")
    halves = np.array([half_width(a, b, 0.95) / 2 for a, b in zip(before, after, strict=True)])
    apart = np.abs(after.mean(-1) - before.mean(-1))
    assert np.mean(apart <= halves) < 0.95 - SLACK


def test_verdicts(make_row: Any) -> None:
    noise = (1.0, 1.01, 0.99, 1.02, 0.98)
    base = [make_row(run=str(i), samples_ns=(round(1e9 * x),)) for i, x in enumerate(noise)]
    slow = [make_row(run=str(i), samples_ns=(round(1.2e9 * x),)) for i, x in enumerate(noise)]
    (same,) = compare(base, base[::-1])
    assert (same.verdict, same.ratio, same.runs) == ("no difference", pytest.approx(1), (5, 5))
    (slower,) = compare(base, slow)
    assert slower.verdict == "slower"
    assert slower.low is not None
    assert slower.high is not None
    assert slower.low < slower.ratio < slower.high < 1
    assert slower.ratio == pytest.approx(1 / 1.2)
    (faster,) = compare(slow, base)
    assert faster.verdict == "faster"
    (few,) = compare(base[:1], slow[:1])
    assert (few.verdict, few.low) == ("cannot tell", None)


def test_many_tests_hold_together(make_row: Any) -> None:
    noise = (1.0, 1.01, 0.99, 1.02, 0.98)
    rows = [
        make_row(run=str(i), n_prompt=n, samples_ns=(round(n * 1e7 * x),))
        for i, x in enumerate(noise)
        for n in (8, 16, 32)
    ]
    one, *_ = compare([r for r in rows if r.n_prompt == 8], [r for r in rows if r.n_prompt == 8])
    three, *_ = compare(rows, rows)
    assert one.high is not None
    assert three.high is not None
    assert three.high > one.high


def test_nothing_in_common(make_row: Any) -> None:
    with pytest.raises(UsageError, match=r"share no test .* pp512 \(pocketslm onnxruntime"):
        compare([make_row()], [make_row(threads=1)])
