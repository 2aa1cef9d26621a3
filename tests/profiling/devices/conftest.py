"""Devices to measure on: a phone behind the real adb, a board behind a real sshd."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from devices.adb_daemon import Daemon
from devices.phone import Phone
from devices.ssh_server import SSHD, SshServer

from pocketslm.runtime.ops import build

PhoneDaemon = Callable[..., Daemon]


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of an adb server of our own: its port, its home with its key."""
    if shutil.which("adb") is None:
        pytest.skip("needs adb: apt-get install adb")
    home = tmp_path_factory.mktemp("adb-home")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours = {
        "HOME": str(home),
        "ANDROID_USER_HOME": str(home / ".android"),
        "ANDROID_ADB_SERVER_PORT": str(port),
        "ADB_MDNS": "0",
    }
    environment = os.environ | ours
    subprocess.run(["adb", "start-server"], env=environment, check=True, capture_output=True)
    yield ours
    subprocess.run(["adb", "kill-server"], env=environment, check=False, capture_output=True)


@pytest.fixture
def phone(
    adb_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PhoneDaemon]:
    """Makes a phone that ``adb connect`` has found; what it runs, it runs under qemu."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)  # HOME is another one now
    for name, value in adb_server.items():
        monkeypatch.setenv(name, value)
    daemons: list[Daemon] = []

    def make(
        recording: str = "galaxy-a52-5g.txt", runs: str | None = None, **options: object
    ) -> Daemon:
        if runs is None:
            if shutil.which("qemu-aarch64-static") is None:
                pytest.skip("needs qemu-user-static")
            runs = "qemu-aarch64-static"
        sim = Phone(tmp_path / f"phone{len(daemons)}", recording, runs)
        daemons.append(Daemon(sim, **options))  # type: ignore[arg-type]
        connect = ["adb", "connect", daemons[-1].serial]
        with suppress(subprocess.TimeoutExpired):  # it waits for a phone that is offline
            subprocess.run(connect, check=False, capture_output=True, timeout=2)
        if not options:  # the others stay as they are; this one is known only after a while
            ready = ["adb", "-s", daemons[-1].serial, "wait-for-device"]
            subprocess.run(ready, check=True, capture_output=True, timeout=60)
        return daemons[-1]

    yield make
    for daemon in daemons:
        daemon.close()
        subprocess.run(["adb", "disconnect", daemon.serial], check=False, capture_output=True)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    """A board that is this machine, behind ssh; its home is a folder of the test.

    Its program is that of this machine's compiler, which is there: zig's takes minutes.
    """
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("needs sshd: apt-get install openssh-server")
    folder = tmp_path / "sshd"
    folder.mkdir()
    server = SshServer(folder)
    ours, here = build.runner, f"{build.host_machine()}-linux"
    monkeypatch.setattr(build, "runner", lambda target: ours(None if target == here else target))
    monkeypatch.setenv("PATH", f"{server.wrapper}{os.pathsep}{os.environ['PATH']}")
    yield server
    server.close()
