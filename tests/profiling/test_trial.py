"""The trial of ``compare``: real runs, verdicts counted right, a throttle that slows down."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import BackendError, UsageError
from pocketslm.profiling import trial
from pocketslm.profiling.records import read_records

QUICK = ["--backend", "onnx", "-p", "0", "-d", "0", "-n", "2", "-r", "1", "-t", "1"]


def test_runs_are_those_of_bench(tiny_bundle: Path, tmp_path: Path) -> None:
    record = tmp_path / "trial.jsonl"
    trial.measure(tiny_bundle, record, 1, QUICK)
    (turn,) = trial.turns(read_records(record))
    assert [row.test for row in turn] == ["tg2"] * 3
    with pytest.raises(BackendError, match="pocketslm bench failed: .*nothing is not a bundle"):
        trial.measure(tmp_path / "nothing", record, 1, QUICK)


def turn(make_row: Any, index: int, costs: tuple[float, float, float]) -> trial.Turn:
    started = f"2030-01-02T03:{index:02d}:00+00:00"
    run = {"run": str(index), "started": started}
    return [make_row(**run, samples_ns=(round(1e9 * cost),)) for cost in costs]


def test_verdicts_are_counted(make_row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third process that is a tenth slower, and in the second set also the second one."""
    monkeypatch.setattr(trial, "_DRAWS", 5)
    costs = [(1 + i / 999, 1 + (3 * i) % 8 / 999, 1.1 + (5 * i) % 8 / 999) for i in range(8)]
    wrong = [(a, c, c) for a, _, c in costs]
    found = [turn(make_row, i, one) for i, one in enumerate([*costs, *wrong])]
    rates = {rate.what: (rate.right, rate.count) for rate in trial.judge(found, 8)}
    assert rates == {
        "in turns, no difference": (1, 2),
        "in turns, slower": (2, 2),
        "one after the other, no difference": (0, 1),
        "one after the other, slower": (1, 1),
    }
    assert "slowed down: 0.90" in trial.format_trial(found, 8)
    assert trial.drawn(found[:8], 7) == [1, 1]
    assert trial.drawn(found[8:], 7) == [0, 1]
    with pytest.raises(UsageError, match="16 runs, in sets of 9; expected at least two sets"):
        trial.judge(found, 9)
    with pytest.raises(UsageError, match="not of a trial"):
        trial.turns([make_row()])


def test_wilson_s_interval() -> None:
    """As in Brown, Cai and DasGupta 2001: 20 of 20 leave 83.9 % and more."""
    assert str(trial.Rate("x", 20, 20)) == "x: 20 of 20 right (100.0%; 95 %: 84% .. 100%)"
    assert str(trial.Rate("x", 0, 10)) == "x: 0 of 10 right (0.0%; 95 %: 0% .. 28%)"


def test_the_last_of_three_is_stopped_for_a_tenth_of_its_time() -> None:
    """By the kernel's word: what it is found doing, often."""
    sleep = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys\n"
        f"all = [subprocess.Popen([sys.executable, '-c', {sleep!r}]) for _ in range(3)]\n"
        "print(*(one.pid for one in all), flush=True); sys.stdin.read()\n"
        "[one.kill() for one in all]; [one.wait() for one in all]"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as bench:
        assert bench.stdout is not None
        workers = [int(word) for word in bench.stdout.readline().split()]
        with trial.throttle(bench.pid):
            seen = [state(pid) for _ in range(600) for pid in workers]
        bench.communicate("")
    first, second, last = (seen[at::3].count("T") for at in range(3))
    assert first == second == 0
    assert 0 < last < 300


def state(pid: int) -> str:
    time.sleep(0.0005)
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
