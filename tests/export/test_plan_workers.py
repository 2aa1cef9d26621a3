"""Several workers on one database: no trial is lost or made twice, though one worker dies."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pocketslm.errors import UsageError
from pocketslm.export import plan, study
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.plan import Budget
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling.devices import local
from pocketslm.profiling.devices.runner import PROGRAM

TRIALS, WORKERS = 6, 3
WORKER = """
import hashlib, sys, time
from pathlib import Path
from pocketslm.export import plan, study
from pocketslm.export.recipe import RECIPE_FILE, Recipe
from pocketslm.models.checkpoint import open_checkpoint

url, source, text, work, victim = sys.argv[1:]
study.HEARTBEAT_S, study.GRACE_S, study.POLL_S = 1, 3, 0.2

def measure(bundle, budget):
    size = (bundle / "model.slm").stat().st_size
    recipe = hashlib.sha256((bundle / RECIPE_FILE).read_bytes()).hexdigest()
    print("begun", recipe, flush=True)
    if victim == "yes":
        time.sleep(600)
    print("measured", recipe, size, flush=True)
    return {"ram": size / 1e3, "decode": 1e8 / size, "prefill": 1.0, "ttft": 1.0}

found = plan.search(
    open_checkpoint(Path(source)), Path(text), plan.parse_budget("kl=99"), Path(work),
    calibration=text, trials=%d, windows=1, storage=url, measure=measure,
    base=Recipe(targets=("native",), calibration_tokens=512, calibration_window=64),
)
print("found", *(round(one.metrics["size"] * 1e6) for one in found), flush=True)
"""


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The URL of a database of our own, behind a socket in a temporary folder."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'pocketslm[postgresql]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    programs = found[-1].parent
    user = "nobody" if os.getuid() == 0 else None  # it refuses to run as root
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="pocketslm-pg-"))  # that this user can reach
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if user:
            shutil.chown(folder, user)
        data = folder / "data"

        def run(program: str, *arguments: str) -> None:
            command = [programs / program, "-D", data, *arguments]
            done = subprocess.run(
                command, user=user, cwd=folder, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr

        run("initdb", "-U", "planner", "--auth=trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        stack.callback(run, "pg_ctl", "-w", "-m", "immediate", "stop")
        yield f"postgresql://planner@/postgres?host={folder}"


def test_three_workers_share_a_search_and_one_is_killed(
    postgresql: str, tiny_hf: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 900)

    def start(victim: str) -> subprocess.Popen[str]:
        paths = (str(tiny_hf), str(text), str(tmp_path / "work"))
        command = [sys.executable, "-c", WORKER % TRIALS, postgresql, *paths, victim]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    victim = start("yes")
    assert victim.stdout is not None
    held = victim.stdout.readline().split()
    assert held[0] == "begun"
    others = [start("no") for _ in range(WORKERS - 1)]
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    told = [other.communicate(timeout=300)[0].splitlines() for other in others]
    assert [other.returncode for other in others] == [0, 0]
    measured = [line.split() for lines in told for line in lines if line.startswith("measured")]
    recipes = [recipe for _, recipe, _ in measured]
    assert len(recipes) == len(set(recipes))  # none twice
    assert held[1] in recipes  # the victim's was taken again
    (found,) = {line.removeprefix("found ") for lines in told for line in lines[-1:]}
    assert len(found.split()) == TRIALS
    assert set(found.split()) == {size for *_, size in measured}
    assert not list((tmp_path / "work").glob(".trial-*"))  # the victim's bundle is gone, too


def test_a_database_that_cannot_be_used_is_one_line() -> None:
    for url in ("nothing", "sqlite:////nowhere/at/all.db"):
        with pytest.raises(UsageError, match="^storage .* cannot be used: [^\n]+$"):
            study.open_study(url, "name", ["minimize"], [], None)


@pytest.mark.parametrize("recipe", ["{}", '{"weights": 3}', "[", "7"])
def test_a_damaged_database_is_one_line(recipe: str, tmp_path: Path) -> None:
    path = tmp_path / "trials.db"
    known = f"sqlite:///{path}", "name", ["minimize"], [({"x": n}, recipe) for n in range(9)], 0

    def attempt(trial: Any) -> list[float]:
        study.claim(queue, trial, recipe, 5)
        trial.set_user_attr(study.METRICS, {"x": trial.suggest_int("x", 0, 9)})
        return [1.0]

    def read() -> None:
        with study.database_errors():
            plan._finished(study.open_study(*known), Budget({}))

    queue = study.open_study(*known)
    study.work(queue, 5, attempt)
    assert len(study.finished(queue)) == 5
    if recipe != "{}":
        with pytest.raises(UsageError, match="of the trials cannot be used: trial 0: "):
            read()
        return
    read()
    whole, rng = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(8):
        damaged = bytearray(whole)
        for _ in range(40):
            damaged[rng.randrange(100, len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read()
        except UsageError as error:
            refused += "\n" not in str(error)
    assert refused


def test_a_trial_that_loses_its_device_is_taken_again(tmp_path: Path) -> None:
    import optuna

    from pocketslm.errors import DeviceError

    url = f"sqlite:///{tmp_path / 'trials.db'}"
    queue = study.open_study(url, "name", ["minimize"], [({"x": 1}, "one")], 0)
    lost = [True]

    def attempt(trial: optuna.Trial) -> list[float]:
        value = trial.suggest_int("x", 0, 1000)
        study.claim(queue, trial, str(value), 2)
        if lost.pop() if lost else False:
            raise DeviceError("unplugged")
        trial.set_user_attr(study.METRICS, {"x": value})
        return [float(value)]

    with pytest.raises(DeviceError, match="unplugged"):
        study.work(queue, 2, attempt)
    assert study.finished(queue) == []
    study.work(queue, 2, attempt)
    first, second = study.finished(queue)
    assert first.params == {"x": 1}
    assert second.params != first.params


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # which asks for trials itself
def test_of_two_workers_with_one_recipe_the_earlier_goes_on(tmp_path: Path) -> None:
    import optuna

    queue = study.open_study(f"sqlite:///{tmp_path / 'trials.db'}", "name", ["minimize"], [], 0)
    earlier, later, third = (queue.ask() for _ in range(3))
    study.claim(queue, earlier, "a", 2)
    for trial, recipe in ((later, "a"), (third, "b")):  # the same; more than were asked for
        with pytest.raises(optuna.TrialPruned):
            study.claim(queue, trial, recipe, 2)


def test_speeds_are_measured_on_a_device_that_keeps_no_model(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "cache_directory", lambda: tmp_path / "device")
    bundle = tmp_path / "bundle"
    export_bundle(open_checkpoint(tiny_hf), bundle, Recipe(targets=("native",)))
    metrics = plan.measure_on("local")(bundle, plan.parse_budget("ttft=9s@16"))
    assert set(metrics) == {"ttft", "prefill", "decode", "ram"}
    assert all(value > 0 for value in metrics.values())
    assert [path.name for path in (tmp_path / "device").rglob("*") if path.is_file()] == [PROGRAM]
