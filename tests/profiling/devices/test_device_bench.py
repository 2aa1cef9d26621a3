"""Benchmarks on devices: the runner really runs, for phones under qemu, and is cut short.

The figures mean nothing here; that every part of a row is there, and adds up, does.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from devices.adb_daemon import Daemon
from devices.ssh_server import SshServer

import support
from pocketslm.cli import main
from pocketslm.errors import DeviceError, DocumentError, UsageError
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.profiling import workload
from pocketslm.profiling.devices import local, open_device, overhead
from pocketslm.profiling.devices.bench import Conditions, bench_on_device
from pocketslm.profiling.devices.device import Device
from pocketslm.profiling.plan import Test as Job  # pytest would take "Test" for a test
from pocketslm.profiling.plan import plan
from pocketslm.profiling.records import Measurement, read_records
from pocketslm.profiling.workload import document_tests
from pocketslm.runtime.assistant.assistant import Assistant
from pocketslm.runtime.model import Model

PhoneDaemon = Callable[..., Daemon]
Captured = pytest.CaptureFixture[str]
END_TIMEOUT_S = 30.0
STORY = "Rain fell. The ship Aurora left Oslo in 1912 with nine men on board."
QUICK = ["-p", "12", "-n", "4", "-r", "2", "-t", "2", "--pause", "0", "--idle", "0"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough for qemu, large enough to be interrupted."""
    folder = tmp_path_factory.mktemp("device")
    out = folder / "bundle"
    source = open_checkpoint(support.write_hf(folder / "hf"))
    export_bundle(source, out, Recipe(targets=("native",)))
    return out


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that takes a prompt of a document: its tokens are letters."""
    folder = tmp_path_factory.mktemp("reader")
    config = dataclasses.replace(support.TINY, max_position_embeddings=1024)
    source = open_checkpoint(support.write_hf(folder / "hf", config))
    export_bundle(source, folder / "bundle", Recipe(targets=("native",)))
    return folder / "bundle"


@pytest.fixture(autouse=True)
def local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ``local`` and ``ssh`` keep on this machine lies in the test's folder."""
    from pocketslm.profiling.devices import ssh

    monkeypatch.setattr(ssh, "FOLDER", str(tmp_path / "board"))
    monkeypatch.setattr(local, "cache_directory", lambda: tmp_path / "local")
    return tmp_path / "local" / "device"


def jobs(**options: object) -> list[Job]:
    return plan(support.TINY.vocab_size, **options)  # type: ignore[arg-type]


def measure(
    device: Device, bundle: Path, tests: list[Job], threads: int = 2, **conditions: object
) -> list[Measurement]:
    rows: list[Measurement] = []
    asked = Conditions(**{"repetitions": 2, "pause_s": 0.0, "idle_s": 0.0, **conditions})  # type: ignore[arg-type]
    bench_on_device(
        device, [bundle], tests=tests, threads=[threads], conditions=asked, keep=rows.append
    )
    return rows


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + END_TIMEOUT_S
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_rows_of_this_machine_add_up(bundle: Path) -> None:
    with open_device("local") as device:
        tests = jobs(n_prompt=[20], n_gen=[6], n_both=[(8, 3)])
        prompt, decode, both = measure(device, bundle, tests, interval_s=0.02)
    assert (prompt.test, decode.test, both.test) == ("pp20", "tg6 @ d20", "pp8+tg3")
    assert (len(prompt.samples_ns), len(prompt.step_ns)) == (2, 0)
    steps = decode.step_ns
    assert list(decode.samples_ns) == [sum(steps[:6]), sum(steps[6:])]
    for sample, prefill, start in zip(both.samples_ns, both.prefill_ns, (0, 3), strict=True):
        assert sample == prefill + sum(both.step_ns[start : start + 3])
    for row in (prompt, decode, both):
        assert row.machine.kind == "local"
        assert row.backend.startswith("native ")
        assert row.threads == 2
        assert row.peak_rss_bytes >= row.steady_rss_bytes > row.base_rss_bytes > 0  # type: ignore[operator]
        assert 0 < row.pss_file_bytes < row.pss_bytes  # type: ignore[operator]
        assert row.limits is not None
        assert row.trace[0].at_ns == 0
        assert row.trace[-1].at_ns >= sum(row.samples_ns)
        assert all(point.rss_bytes for point in row.trace)


def test_operators_are_of_the_timed_part(bundle: Path) -> None:
    """Of six tokens after 200 the prompt is left out; of a prompt before them it is not."""
    tests = jobs(n_gen=[6], n_depth=[200], n_both=[(200, 6)])
    with open_device("local") as device:
        decode, both = measure(device, bundle, tests, threads=1, operators=True)
        (without,) = measure(device, bundle, tests[:1], threads=1)
    assert without.operator_ns is None
    names = {"embedding", "qkv", "attention", "output", "gate_up", "down", "head"}
    for row in (decode, both):
        assert row.operator_ns is not None
        assert row.operator_ns.keys() == names
        assert len(row.samples_ns) == 2  # one more was not counted
    # 34 times the tokens go through the layers.
    assert both.operator_ns["gate_up"] > 3 * decode.operator_ns["gate_up"] > 0  # type: ignore[index]


def test_cold_starts_are_labelled(bundle: Path) -> None:
    with open_device("local") as device:
        tests = jobs(n_prompt=[8])
        (warm,) = measure(device, bundle, tests, repetitions=1)
        (cold,) = measure(device, bundle, tests, repetitions=1, cold=True)
    assert (warm.cold, cold.cold) == (False, True)
    assert warm.major_faults == 0


def test_sustained_runs_and_pinning(bundle: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    with open_device("local") as device:
        begin = time.monotonic()
        tests = jobs(n_gen=[4], n_depth=[0])
        (row,) = measure(device, bundle, tests, threads=1, sustained_s=0.5, pin=str(cpu))
        assert time.monotonic() - begin > 0.5
    assert row.pinning == (cpu,)
    assert len(row.samples_ns) > 5
    assert row.throttled is not None


def test_a_phone_runs_the_aarch64_program(
    phone: PhoneDaemon, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = phone()
    record = tmp_path / "rows.jsonl"
    command = ["bench", str(bundle), "--device", f"adb:{daemon.serial}", "--record", str(record)]
    assert main([*command, *QUICK, "--pin", "0,1"]) == 0
    assert "tg4 @ d12" in capsys.readouterr().out
    prompt, decode = read_records(record)
    for row in (prompt, decode):
        assert row.machine.product == "samsung SM-A526B"
        assert row.machine.arch == "aarch64"
        assert row.backend in ("native neon_i8mm", "native neon_dotprod")
        assert row.pinning == (0, 1)
        assert row.trace[0].khz == (2208000, 1516800)
        assert row.step_ns or row.n_prompt
    sent = sum("cat >" in service or service == "sync:" for service in daemon.services)
    assert sent == 2  # the program and the model
    assert main([*command, *QUICK]) == 0
    assert len(read_records(record)) == 4
    assert sum("cat >" in s or s == "sync:" for s in daemon.services) == sent  # nothing new
    wait_until(lambda: not daemon.phone.running(), "a runner is left on the phone")


def test_a_board_over_ssh(
    board: SshServer, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", f"ssh:{board.address}", "-o", "jsonl"]
    assert main(["bench", str(bundle), *options, *QUICK]) == 0
    rows = [Measurement.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.test for row in rows] == ["pp12", "tg4 @ d12"]
    assert {row.machine.kind for row in rows} == {"ssh"}


def test_a_shelf_is_measured_into_one_report(
    board: SshServer, bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    """A device that cannot be reached is one error, and the others' rows are kept."""
    record = tmp_path / "shelf.jsonl"
    devices = [f"ssh:{board.address}", "local", "ssh:nobody@127.0.0.1:1"]
    named = [part for device in devices for part in ("--device", device)]
    command = ["bench", str(bundle), *QUICK, "--record", str(record)]
    assert main([*command, *named]) == 2
    told = capsys.readouterr()
    assert "ssh:nobody@127.0.0.1:1" in told.err.splitlines()[-1]
    assert f"{devices[0]}: " in told.err
    headings = [line for line in told.out.splitlines() if line and not line.startswith("|")]
    assert headings == devices[:2]
    assert told.out.count("tg4 @ d12") == 2
    rows = read_records(record)
    assert sorted((row.machine.kind, row.test) for row in rows) == [
        *(("local", test) for test in ("pp12", "tg4 @ d12")),
        *(("ssh", test) for test in ("pp12", "tg4 @ d12")),
    ]
    assert main([*command, "--device", "local", "--device", "local"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_the_document_task_on_a_phone_and_on_a_board(
    phone: PhoneDaemon,
    board: SshServer,
    reader: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    document = tmp_path / "ship.txt"
    document.write_text(STORY)
    first_of_each = {test.workload: test for test in reversed(document_tests(reader, [document]))}
    short = [dataclasses.replace(one, n_gen=4) for one in reversed(first_of_each.values())]
    assert [test.workload for test in short] == ["summarize", "suggest", "ask"]
    monkeypatch.setattr(workload, "document_tests", lambda *asked: short)
    for device in (f"adb:{phone().serial}", f"ssh:{board.address}"):
        record = tmp_path / f"{device[:3]}.jsonl"
        options = ["--device", device, "-r", "1", "-t", "1", "--pause", "0", "--idle", "0"]
        options += ["--record", str(record), "--documents", str(document)]
        assert main(["bench", str(reader), *options]) == 0
        for row, test in zip(read_records(record), short, strict=True):
            assert (row.workload, row.n_prompt, row.n_gen) == (test.workload, len(test.ids), 4)
            assert len(row.ttft_ns) == len(row.samples_ns) == 1
        _, answered = capsys.readouterr().out.split("\n\n")
        tasks = [line.split("|")[4].strip() for line in answered.splitlines()[2:]]
        assert tasks == ["summarize", "suggest", "ask"]


def test_the_document_task_is_what_the_assistant_does(reader: Path, tmp_path: Path) -> None:
    document = tmp_path / "ship.txt"
    document.write_text(STORY)
    found = document_tests(reader, [document])
    first, last = found[0], found[-1]
    assert (first.workload, last.workload) == ("summarize", "ask")
    model = Model.load(reader)
    said = list(model.generate(first.ids, Assistant.DEFAULTS.but(max_new_tokens=first.n_gen)))
    assert len(said) == first.n_gen
    asked = model.tokenizer.decode(first.ids)
    assert "The ship Aurora left Oslo" in asked
    assert all("Aurora" in model.tokenizer.decode(one.ids) for one in found)
    with pytest.raises(UsageError, match="context is 20, expected at least"):
        document_tests(reader, [document], context=20)
    with pytest.raises(DocumentError, match="nowhere"):
        document_tests(reader, [tmp_path / "nowhere.txt"])


def test_energy_of_a_board_and_of_a_battery(phone: PhoneDaemon, bundle: Path) -> None:
    """Constant readings of recordings: joules are watts times the counted seconds."""
    board = phone("jetson-orin-nano.txt")
    with open_device(f"adb:{board.serial}") as device:
        (row,) = measure(device, bundle, jobs(n_gen=[4], n_depth=[0]))
    assert row.energy is not None
    assert row.energy.label == "rail VDD_IN (whole board)"
    seconds = sum(row.samples_ns) / 1e9
    assert abs(row.energy.joules / (seconds * 5.024 * 0.992) - 1) < 1e-6
    assert all(abs((point.watts or 0) - 5.024 * 0.992) < 1e-9 for point in row.trace)
    charging = phone("mi-6.txt")
    with open_device(f"adb:{charging.serial}") as device:
        (blind,) = measure(device, bundle, jobs(n_gen=[4], n_depth=[0]))
        (known,) = measure(device, bundle, jobs(n_gen=[4], n_depth=[0]), idle_s=0.5)
    assert blind.energy is None  # on the cable, and nobody knows what it draws at rest
    assert known.energy is not None
    assert abs(known.energy.joules) < 1e-6  # the recording does not change
    assert "on the cable" in known.energy.label
    assert "idle -4.97 W subtracted" in known.energy.label


def cut_short(
    device: Device, bundle: Path, when: Callable[[], None]
) -> tuple[str, list[Measurement]]:
    """A long run that ``when`` ends; the error, and the rows kept."""
    rows: list[Measurement] = []
    started = threading.Event()

    def progress(step: str, _: float) -> None:
        if step.endswith(" 3"):
            started.set()

    killer = threading.Thread(target=lambda: (started.wait(END_TIMEOUT_S), when()))
    killer.start()
    conditions = Conditions(sustained_s=300, pause_s=0, idle_s=0, interval_s=0.1)
    tests = jobs(n_gen=[50], n_depth=[0])
    with pytest.raises(DeviceError) as caught:
        bench_on_device(
            device,
            [bundle],
            tests=tests,
            threads=[1],
            conditions=conditions,
            keep=rows.append,
            progress=progress,
        )
    killer.join()
    assert "\n" not in str(caught.value)
    return str(caught.value), rows


def test_a_cable_pulled_keeps_what_was_counted(phone: PhoneDaemon, bundle: Path) -> None:
    daemon = phone()
    with open_device(f"adb:{daemon.serial}") as device:
        message, rows = cut_short(device, bundle, daemon.pull_the_cable)
    assert daemon.serial in message
    assert len(rows[0].samples_ns) >= 2
    wait_until(lambda: not daemon.phone.running(), "a runner is left on the phone")


def test_a_connection_lost_keeps_what_was_counted(
    board: SshServer, bundle: Path, tmp_path: Path
) -> None:
    with open_device(f"ssh:{board.address}") as device:
        message, rows = cut_short(device, bundle, board.cut)
    assert "lost" in message
    assert len(rows[0].samples_ns) >= 2
    wait_until(lambda: not _runners(tmp_path / "board"), "a runner is left on the board")


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_runner_that_crashes(phone: PhoneDaemon, bundle: Path, name: str) -> None:
    daemon = phone()
    number = getattr(signal, name)

    def crash() -> None:
        for pid in daemon.phone.running():
            os.kill(pid, number)

    with open_device(f"adb:{daemon.serial}") as device:
        message, rows = cut_short(device, bundle, crash)
    assert f"ended by signal {number}" in message
    assert ("want of memory" in message) == (name == "SIGKILL")
    assert len(rows[0].samples_ns) >= 2


def test_the_wrong_processor(phone: PhoneDaemon, bundle: Path, tmp_path: Path) -> None:
    if os.uname().machine != "x86_64" or shutil.which("qemu-aarch64-static") is None:
        pytest.skip("needs a machine that cannot execute aarch64 programs")
    daemon = phone(runs="env")  # the kernel is left alone with an aarch64 program
    device = open_device(f"adb:{daemon.serial}")
    with pytest.raises(DeviceError, match="cannot execute the runner"):
        measure(device, bundle, jobs(n_prompt=[4]))
    (daemon.phone.root / "bin/uname").write_text("#!/bin/sh\necho armv7l\n")
    with pytest.raises(DeviceError, match="the device's processor is armv7l"):
        measure(device, bundle, jobs(n_prompt=[4]))


def test_ctrl_c_leaves_nothing_on_the_phone(
    phone: PhoneDaemon, bundle: Path, tmp_path: Path
) -> None:
    daemon = phone()
    record = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "pocketslm", "bench", str(bundle)]
    command += ["--device", f"adb:{daemon.serial}", "-p", "0", "-n", "50", "-d", "0", "-t", "1"]
    command += ["--sustained", "300", "--idle", "0", "--record", str(record)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs start with the signal ignored, and CI may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("tg50, 1 threads, 3"):
            break
    process.send_signal(signal.SIGINT)
    table, errors = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "pocketslm: interrupted"
    assert "Traceback" not in errors
    assert "tg50" in table
    assert len(read_records(record)[0].samples_ns) >= 2
    wait_until(lambda: not daemon.phone.running(), "a runner is left on the phone")


def test_the_cost_of_measuring_is_a_ratio_with_its_interval(bundle: Path) -> None:
    with open_device("local") as device:
        pairs = overhead.measure(device, bundle, 4, rounds=2, interval_s=0.01, threads=1)
    assert len(pairs) == 2
    assert all(ns > 0 for pair in pairs for ns in pair)
    rng = random.Random(1)
    slower = [
        (round(1e9 * rng.gauss(1, 0.01)), round(1.1e9 * rng.gauss(1, 0.01))) for _ in range(40)
    ]
    median, low, high = overhead.interval(slower)
    assert low <= median <= high
    assert low < 1 / 1.1 < high < 1


def _runners(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cwd").readlink() == folder:
                    found.append((entry / "cmdline").read_text())
            except OSError:
                continue
    return found
