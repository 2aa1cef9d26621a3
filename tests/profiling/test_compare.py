"""The comparison holds what it promises: shown on simulated machines whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pocketslm.cli import main
from pocketslm.errors import UsageError
from pocketslm.profiling.compare import compare, compare_two, half_width
from pocketslm.profiling.records import append_records

Floats = npt.NDArray[np.float64]
RUNS, TRIALS = 8, 400
# A share of TRIALS has a standard error of 1.1 % where the truth is 95 %; two of them.
SLACK = 0.022
TENTH = np.log(0.9)


def machine(rng: np.random.Generator, noise: str) -> Floats:
    """Of TRIALS machines, the log speed at the times of 2 x RUNS runs."""
    shape = (TRIALS, 2 * RUNS)
    if noise == "spikes":  # a neighbour takes a tenth of the machine during one run in eight
        return np.log(np.where(rng.random(shape) < 1 / 8, 0.93, 1.0))
    if noise == "drift":  # what was measured on a virtual machine: 6 % that last some ten runs
        state = rng.normal(0, 0.06, TRIALS)
        drift = np.empty(shape)
        for i in range(shape[1]):
            state = 0.9 * state + rng.normal(0, 0.06 * np.sqrt(1 - 0.81), TRIALS)
            drift[:, i] = state
        return drift
    if noise == "walk":  # it gets ever warmer, or cooler
        return np.cumsum(rng.normal(0, 0.02, shape), axis=1)
    return np.zeros(shape)


def runs(rng: np.random.Generator, count: int, spread: float) -> Floats:
    """TRIALS x count: the mean of 5 autocorrelated repetitions of a process of its own."""
    within = np.empty((TRIALS, count, 5))
    state = rng.normal(0, spread, (TRIALS, count))
    for i in range(5):
        state = 0.7 * state + rng.normal(0, spread * np.sqrt(1 - 0.49), (TRIALS, count))
        within[..., i] = state
    return np.asarray(rng.normal(0, spread, (TRIALS, count)) + within.mean(-1))


def shares(noise: str, spread: float, *, in_turns: bool, scale: float = 1.0) -> tuple[float, float]:
    """How often equal ones are called equal, and a tenth is found. scale: of the intervals."""
    rng = np.random.default_rng(0)
    at, own = machine(rng, noise), runs(rng, 2 * RUNS, spread)
    first, second = own[:, :RUNS], own[:, RUNS:]
    before = first + (at[:, ::2] if in_turns else at[:, :RUNS])
    after = second + (at[:, ::2] if in_turns else at[:, RUNS:])
    pairs = list(zip(before, after, strict=True))
    halves = np.array([half_width(a, b, 0.95, in_turns=in_turns) for a, b in pairs]) * scale
    apart = (after - before).mean(-1)
    return float(np.mean(abs(apart) <= halves)), float(np.mean(apart + TENTH < -halves))


@pytest.mark.parametrize("noise", ["calm", "spikes", "drift"])
def test_in_turns_equal_ones_are_equal_and_a_tenth_is_found(noise: str) -> None:
    equal, found = shares(noise, 0.02, in_turns=True)
    assert equal >= 0.95 - SLACK
    assert found >= 0.95


@pytest.mark.parametrize("noise", ["calm", "drift", "walk"])
def test_one_after_the_other_equal_ones_are_equal(noise: str) -> None:
    equal, found = shares(noise, 0.01, in_turns=False)
    assert equal >= 0.95 - SLACK
    if noise == "calm":
        assert found >= 0.95


def test_the_harness_sees_intervals_that_are_too_narrow() -> None:
    assert shares("calm", 0.02, in_turns=True, scale=0.5)[0] < 0.95 - SLACK
    assert shares("drift", 0.02, in_turns=False, scale=0.4)[0] < 0.95 - SLACK


def rows_of(make_row: Any, costs: tuple[float, ...], start: int, **changes: Any) -> Any:
    return [
        make_row(
            **changes,
            run=str(start + i),
            started=f"2030-01-02T03:04:{start + 2 * i:02d}+00:00",
            samples_ns=(round(1e9 * cost),),
        )
        for i, cost in enumerate(costs)
    ]


NOISE = (1.0, 1.01, 0.99, 1.02, 0.98, 1.0)


def test_verdicts(make_row: Any) -> None:
    base, again = rows_of(make_row, NOISE, 0), rows_of(make_row, NOISE[::-1], 20)
    slow = rows_of(make_row, tuple(1.2 * cost for cost in NOISE), 20)
    (same,) = compare(base, again)
    assert (same.verdict, same.ratio, same.runs) == ("no difference", pytest.approx(1), (6, 6))
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
    (itself,) = compare(base, base[::-1])
    assert (itself.in_turns, itself.low, itself.high) == (True, 1.0, 1.0)


def test_many_tests_hold_together(make_row: Any) -> None:
    def side(start: int) -> Any:
        return [r for n in (8, 16, 32) for r in rows_of(make_row, NOISE, start, n_prompt=n)]

    a, b = side(0), side(20)
    one, *_ = compare([r for r in a if r.n_prompt == 8], [r for r in b if r.n_prompt == 8])
    three, *_ = compare(a, b)
    assert one.high is not None
    assert three.high is not None
    assert three.high > one.high > 1


def test_nothing_in_common(make_row: Any) -> None:
    with pytest.raises(UsageError, match=r"share no test .* pp512 \(pocketslm onnxruntime"):
        compare([make_row()], [make_row(threads=1)])


def test_what_was_taken_in_turns_is_compared_pair_by_pair(make_row: Any) -> None:
    """A machine that slows down by half meanwhile, B always 3 % slower than A."""
    costs = (1.0, 1.1, 1.2, 1.4, 1.7, 2.0)
    slower = tuple(1.03 * cost + 0.002 * (-1) ** i for i, cost in enumerate(costs))
    a, b = rows_of(make_row, costs, 0), rows_of(make_row, slower, 1)
    (turns,) = compare(a, b[::-1])  # the order of time, not of lines
    assert (turns.in_turns, turns.verdict) == (True, "slower")
    (after,) = compare(a, rows_of(make_row, slower, 30))
    assert (after.in_turns, after.verdict) == (False, "no difference")
    assert after.ratio == pytest.approx(turns.ratio)
    (fewer,) = compare(a, b[1:])
    assert not fewer.in_turns


def test_two_bundles_of_one_file(
    make_row: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tuple(1.2 * cost + i / 1000 for i, cost in enumerate(NOISE))
    before = rows_of(make_row, NOISE, 0, artefact="before")
    after = rows_of(make_row, slow, 0, artefact="after")
    record = tmp_path / "both.jsonl"
    append_records(record, [*before, *after, make_row(runtime="llama.cpp", artefact="peer")])
    assert main(["compare", str(record)]) == 0
    output = capsys.readouterr()
    assert "in turns" in output.out
    assert output.out.splitlines()[2].endswith("| slower |")
    assert output.err == ""
    with pytest.raises(UsageError, match="hold 1 bundles, expected two"):
        compare_two(before)
