"""Debian's real adb and a phone of the test tree: files there and back, and ways to fail."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from devices.adb_daemon import Daemon

from pocketslm.cli import main
from pocketslm.errors import DeviceError
from pocketslm.profiling.devices import adb, open_device

PhoneDaemon = Callable[..., Daemon]
FOLDER = "data/local/tmp/pocketslm"
NO_RUNNER = "true"  # these tests run shell scripts only


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.slm"
    path.write_bytes(os.urandom(3_000_001))
    return path


def failing(action: Callable[[], object]) -> str:
    with pytest.raises(DeviceError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("whole", [True, False], ids=["sync", "shell"])
def test_files_go_there_and_back_once(
    phone: PhoneDaemon, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(adb, "PUSH_WHOLE_BYTES", file.stat().st_size if whole else 0)
    daemon = phone(runs=NO_RUNNER)
    with open_device(f"adb:{daemon.serial}") as device:
        remote = device.push(file, "model.slm")
        assert remote == f"/{FOLDER}/model.slm"
        assert (daemon.phone.root / FOLDER / "model.slm").read_bytes() == file.read_bytes()
        assert ("sync:" in daemon.services) == whole
        before = len(daemon.services)
        assert device.push(file, "model.slm") == remote
        assert len(daemon.services) == before + 1  # it asked for the hash, and left it at that
        device.pull(remote, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == file.read_bytes()
        assert "sync:" in daemon.services
        device.clean()
    assert not (daemon.phone.root / FOLDER).exists()


@pytest.mark.parametrize(
    ("begun", "resumes"), [(1_234_567, True), (3_000_001, True), (0, False), (-1, False)]
)
def test_an_interrupted_push_goes_on_where_it_stopped(
    phone: PhoneDaemon, file: Path, begun: int, resumes: bool
) -> None:
    daemon = phone(runs=NO_RUNNER)
    part = daemon.phone.root / FOLDER / "model.slm.part"
    part.parent.mkdir()
    part.write_bytes(b"of another file" if begun < 0 else file.read_bytes()[:begun])
    with open_device(f"adb:{daemon.serial}") as device:
        device.push(file, "model.slm")
    assert any("cat >>" in service for service in daemon.services) == resumes
    assert (part.parent / "model.slm").read_bytes() == file.read_bytes()
    assert not part.exists()


def test_a_cable_pulled_while_pushing_leaves_what_arrived(
    phone: PhoneDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "PUSH_WHOLE_BYTES", 0)
    file = tmp_path / "large"
    file.write_bytes(os.urandom(1 << 20) * 48)
    daemon = phone(runs=NO_RUNNER)

    def cut(step: str, part: float) -> None:
        if part > 0.3:
            daemon.pull_the_cable()

    device = open_device(f"adb:{daemon.serial}")
    message = failing(lambda: device.push(file, "large", cut))
    assert any(words in message for words in ("lost", "pulled", "offline")), message
    held = (daemon.phone.root / FOLDER / "large.part").read_bytes()
    assert 0 < len(held) < file.stat().st_size
    assert held == file.read_bytes()[: len(held)]


@pytest.mark.parametrize("whole", [True, False], ids=["sync", "shell"])
def test_a_full_phone(
    phone: PhoneDaemon, file: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(adb, "PUSH_WHOLE_BYTES", file.stat().st_size if whole else 0)
    daemon = phone(runs=NO_RUNNER)
    device = open_device(f"adb:{daemon.serial}")
    daemon.phone.is_full = True
    message = failing(lambda: device.push(file, "model.slm"))
    assert "is full" in message
    assert f"pocketslm device clean adb:{daemon.serial}" in message
    assert list((daemon.phone.root / FOLDER).iterdir()) == []


def test_the_shell_s_status_and_last_words(phone: PhoneDaemon) -> None:
    device = open_device(f"adb:{phone(runs=NO_RUNNER).serial}")
    assert device.shell("echo out; echo err >&2") == "out\n"
    assert failing(lambda: device.shell("echo first; echo why >&2; exit 3")).endswith(
        "a command failed with status 3: why"
    )
    assert "no answer within 0.5 s" in failing(lambda: device.shell("sleep 60", 0.5))


def test_the_phone_checks_our_key(phone: PhoneDaemon) -> None:
    daemon = phone(runs=NO_RUNNER)
    deadline = time.monotonic() + 20
    while not daemon.keys and time.monotonic() < deadline:  # adb may still be making its key
        time.sleep(0.05)
    assert daemon.keys  # accepted once, by a person
    subprocess.run(["adb", "disconnect", daemon.serial], check=True, capture_output=True)
    subprocess.run(["adb", "connect", daemon.serial], check=True, capture_output=True)
    open_device(f"adb:{daemon.serial}")
    assert daemon.signatures_checked == 1
    assert len(daemon.keys) == 1


def test_an_unauthorized_phone(phone: PhoneDaemon) -> None:
    daemon = phone(runs=NO_RUNNER, authorize="refuse")
    message = failing(lambda: open_device(f"adb:{daemon.serial}"))
    assert "has not allowed this computer" in message


def test_an_offline_phone(phone: PhoneDaemon) -> None:
    daemon = phone(runs=NO_RUNNER, answer=False)
    assert "is offline" in failing(lambda: open_device(f"adb:{daemon.serial}"))


def test_which_phone(phone: PhoneDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no device is attached" in failing(lambda: open_device("adb"))
    assert "is not attached" in failing(lambda: open_device("adb:1.2.3.4:5"))
    first = phone(runs=NO_RUNNER)
    assert open_device("adb").shell("echo hello") == "hello\n"
    second = phone(runs=NO_RUNNER)
    assert "several devices are attached" in failing(lambda: open_device("adb"))
    assert main(["device", "list"]) == 0
    listed = capsys.readouterr().out
    assert f"adb:{first.serial}" in listed
    assert f"adb:{second.serial}" in listed
    assert "Sim Phone" in listed


def test_no_adb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "adb is not installed" in failing(lambda: open_device("adb"))


def test_info_and_clean(phone: PhoneDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = phone(runs=NO_RUNNER)
    (daemon.phone.root / FOLDER).mkdir()
    spec = f"adb:{daemon.serial}"
    assert main(["device", "info", spec]) == 0
    text = capsys.readouterr().out
    assert "samsung SM-A526B" in text
    assert "CPU 6,7 capacity 1024 2.21 GHz" in text
    assert "AP 25.6" in text
    assert main(["device", "info", spec, "--raw"]) == 0
    assert "/cpu6/cpu_capacity\t1024" in capsys.readouterr().out
    assert main(["device", "clean", spec]) == 0
    assert not (daemon.phone.root / FOLDER).exists()


def test_parallel_commands_do_not_mix(phone: PhoneDaemon) -> None:
    device = open_device(f"adb:{phone(runs=NO_RUNNER).serial}")
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = device.shell(f"yes {number} | head -n 20000 | sha256sum")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answer in answers.items():
        expected = hashlib.sha256(f"{number}\n".encode() * 20000).hexdigest()
        assert answer.startswith(expected)
    assert len(answers) == 6
