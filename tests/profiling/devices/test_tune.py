"""``pocketslm tune-threads``: what is tried and chosen, on a board, on a phone, and in the app."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from devices.adb_daemon import Daemon
from devices.ssh_server import SshServer

import support
from pocketslm.android.engine import open_model
from pocketslm.android.engine.models import Models
from pocketslm.cli import main
from pocketslm.errors import BundleError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling.devices.tune import Candidate, candidates, choose
from pocketslm.runtime import cores
from pocketslm.runtime.cores import Choice, Cluster
from pocketslm.runtime.model import Model

QUICK = ["-p", "8", "-n", "3", "-r", "1"]
ABSENT = 700  # no CPU of the machine that runs the tests
PHONE = (Cluster((7,), 1024, 3_000_000), Cluster((4, 5, 6), 900), Cluster((0, 1, 2, 3), 300))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    source = open_checkpoint(support.write_hf(tmp_path / "hf"))
    export_bundle(source, tmp_path / "bundle", Recipe(targets=("native",)))
    return tmp_path / "bundle"


def choices(bundle: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((bundle / cores.CHOICES).read_text())
    return found["machines"]  # type: ignore[return-value]


def test_counts_go_to_the_fewest_of_the_fastest_clusters() -> None:
    tried = [(one.threads, one.cpus) for one in candidates(PHONE, 8)]
    big = (4, 5, 6, 7)
    assert tried[:4] == [(1, ()), (1, (7,)), (2, ()), (2, big)]
    assert tried[4:] == [(3, ()), (3, big), (4, ()), (4, big), (5, ()), (6, ()), (7, ()), (8, ())]
    alike = [one.threads for one in candidates((Cluster(tuple(range(20))),), 20)]
    assert alike == [*range(1, 9), 12, 16, 20]


def test_fewer_threads_are_chosen_where_they_are_nearly_as_fast() -> None:
    fast, near, slow = Candidate(4, (), [100, 90]), Candidate(2, (6, 7), [99]), Candidate(1)
    slow.samples_ns = [120]
    assert choose([fast, near, slow]) is near
    near.samples_ns = [101]
    assert choose([slow, near, fast]) is fast
    assert choose([Candidate(4, (6, 7), [95]), fast]) is fast  # free, where it is as fast


def test_a_board_is_tuned(
    board: SshServer,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The choice is what the app on that machine takes, unless it is told another."""
    from pocketslm.profiling.devices import ssh

    monkeypatch.setattr(ssh, "FOLDER", str(tmp_path / "board"))
    command = ["tune-threads", str(bundle), "--device", f"ssh:{board.address}", *QUICK]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert cores.choice_here(bundle) == Choice(said["threads"], tuple(said["cpus"]))
    (entry,) = choices(bundle).values()
    assert entry["test"] == "pp8+tg3"
    assert entry["milliseconds"] == said["milliseconds"]


def test_a_phone_is_tuned(
    phone: Callable[..., Daemon], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With three kinds of cores, of which the system refuses the fastest, as cpusets may."""
    daemon = phone()
    system = daemon.phone.root / "sys/devices/system/cpu"
    (system / "possible").write_text(f"0-1,{ABSENT}\n")
    (system / "cpu1/cpu_capacity").write_text("900\n")
    (system / f"cpu{ABSENT}").mkdir()
    (system / f"cpu{ABSENT}/cpu_capacity").write_text("1024\n")
    (daemon.phone.root / "bin/nproc").write_text("#!/bin/sh\necho 2\n")
    command = ["tune-threads", str(bundle), "--device", f"adb:{daemon.serial}", *QUICK]
    assert main(command) == 0
    output = capsys.readouterr()
    assert [row.split()[0] for row in output.out.splitlines()] == ["1", "2"]
    assert output.out.count("chosen") == 1
    assert all(f"CPU {cpus} is left out" in output.err for cpus in (ABSENT, f"1,{ABSENT}"))
    (machine,) = choices(bundle)
    assert machine == f"aarch64 {ABSENT}:1024 1:1804800 0:1804800"


def test_the_app_takes_the_choice_of_its_machine(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cpu, *_) = given = os.sched_getaffinity(0)
    cores.keep_choice(bundle, cores.this_machine(), {"threads": 3, "cpus": [cpu]})
    models = Models(tmp_path / "models")
    *_, name = models.import_bundle(bundle)
    loaded = []

    def load(path: Path, engine: str, threads: int | None, *, verify: bool) -> None:
        loaded.append((engine, threads, os.sched_getaffinity(0)))

    monkeypatch.setattr(Model, "load", load)
    for threads in (0, 2):
        open_model(models.path(name), "runner", threads, phone=True)
    assert loaded == [("runner", 3, {cpu}), ("runner", 2, given)]


def test_a_damaged_file_of_choices(bundle: Path) -> None:
    for text in ("", "{}", '{"machines": []}', '{"machines": {"a": {"threads": 0, "cpus": []}}}'):
        (bundle / cores.CHOICES).write_text(text)
        assert cores.choice_here(bundle) is None
        with pytest.raises(BundleError, match="tune again"):
            cores.read_choices(bundle)
