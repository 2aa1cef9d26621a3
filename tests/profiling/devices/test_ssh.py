"""A board behind a real sshd on loopback: files there and back, and ways to fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from devices.ssh_server import SshServer

from pocketslm.cli import main
from pocketslm.errors import DeviceError, UsageError
from pocketslm.profiling.devices import open_device


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is pushed to this machine by ssh lies in the test's folder."""
    from pocketslm.profiling.devices import ssh

    folder = tmp_path / "home" / "of ours"
    monkeypatch.setattr(ssh, "FOLDER", str(folder))
    return folder


def failing(action: Callable[[], object]) -> str:
    with pytest.raises(DeviceError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_go_there_and_back(board: SshServer, folder_of_its_own: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.slm"
    file.write_bytes(os.urandom(3_000_001))
    with open_device(f"ssh:{board.address}") as device:
        remote = device.push(file, "model.slm")
        assert Path(remote).read_bytes() == file.read_bytes()
        stamp = Path(remote).stat()
        device.push(file, "model.slm")
        assert Path(remote).stat() == stamp
        Path(remote).rename(f"{remote}.part")
        os.truncate(f"{remote}.part", 1_000_000)
        parts: list[float] = []
        device.push(file, "model.slm", lambda step, part: parts.append(part))
        assert parts[0] > 1 / 3  # it went on where it had stopped
        assert Path(remote).read_bytes() == file.read_bytes()
        device.pull(remote, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == file.read_bytes()
        assert "No such file" in failing(lambda: device.pull("/nowhere", tmp_path / "b"))
        assert not (tmp_path / "b").exists()
        device.clean()
    assert not folder_of_its_own.exists()


def test_status_and_last_words(board: SshServer) -> None:
    with open_device(f"ssh:{board.address}") as device:
        assert device.shell('echo "a\'b"; echo err >&2') == "a'b\n"
        assert failing(lambda: device.shell("echo why >&2; exit 3")).endswith("status 3: why")


@pytest.mark.parametrize(
    ("home", "message"),
    [
        (r"printf 'Welcome\033[2J\nto the board\n'; exec ", "its shell prints 'Welcome"),
        ("HOME=nowhere exec ", "its home folder is 'nowhere"),
    ],
)
def test_a_board_that_prints_a_banner_is_refused(
    home: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for ssh whose remote shell runs this first."""
    from pocketslm.profiling.devices import ssh

    monkeypatch.setattr(ssh, "FOLDER", "$HOME/of ours")
    client = tmp_path / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(f'#!/bin/sh\nfor script; do :; done\n{home}sh -c "$script"\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    said = failing(lambda: open_device("ssh:board"))
    assert message in said
    assert "\x1b" not in said


def test_an_unknown_host_is_not_trusted(board: SshServer) -> None:
    board.forget_host()
    message = failing(lambda: open_device(f"ssh:{board.address}"))
    assert "Host key verification failed" in message
    assert "check the host's key" in message


def test_a_key_that_is_not_accepted(board: SshServer) -> None:
    board.revoke_key()
    assert "ssh-copy-id" in failing(lambda: open_device(f"ssh:{board.address}"))


def test_nobody_listens() -> None:
    assert "Connection refused" in failing(lambda: open_device("ssh:user@127.0.0.1:1"))


def test_a_lost_connection(board: SshServer) -> None:
    with open_device(f"ssh:{board.address}") as device:
        board.cut()
        board.revoke_key()
        assert "ssh-copy-id" in failing(lambda: device.shell("true"))


def test_no_connection_is_left(board: SshServer, tmp_path: Path) -> None:
    with open_device(f"ssh:{board.address}") as device:
        sockets = [arg for arg in device.command("true") if "ControlPath=" in arg]
        path = Path(sockets[0].partition("=")[2])
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("address", ["-oProxyCommand=x", "host:", "host:port", ":22"])
def test_addresses_that_make_no_sense(address: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        open_device(f"ssh:{address}")


def test_info(board: SshServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "info", f"ssh:{board.address}"]) == 0
    assert "cluster 1" in capsys.readouterr().out
