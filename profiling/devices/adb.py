"""A phone over adb: the real program, found on the PATH."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from pocketslm.errors import DeviceError
from pocketslm.profiling.devices.device import Device, last_words

FOLDER = "/data/local/tmp/pocketslm"
# adb's own push cannot resume (the phone removes half a file), so only small files go that way.
PUSH_WHOLE_BYTES = 16 << 20
TRANSFER_TIMEOUT_S = 600.0

# Messages of adb itself, as opposed to the phone's programs.
_FROM_ADB = re.compile("error:|adb:|\\* ")
_HINTS = {
    "no devices": "no device is attached: plug it in, allow USB debugging in its developer "
    "options, or `adb connect HOST:PORT`",
    "more than one device": "several devices are attached: say which, as adb:SERIAL "
    "(`pocketslm device list`)",
    "unauthorized": "the device has not allowed this computer: unlock it and accept the question "
    "on its screen",
    "offline": "the device is offline: plug it in again, or `adb reconnect`",
    "not found": "the device is not attached, or its cable was pulled: look at "
    "`pocketslm device list`",
    "closed": "the connection was lost: is the cable still in?",
    "cannot connect to daemon": "adb's server does not start: try `adb start-server`",
}


class AdbDevice(Device):
    """``adb`` or ``adb:SERIAL``. Needs USB debugging, or adb over Wi-Fi; no root."""

    kind, pause_s, folder = "adb", 60.0, FOLDER

    def __init__(self, serial: str = "") -> None:
        self.name = f"adb:{serial}" if serial else "adb"
        self._adb = [_program(), *(("-s", serial) if serial else ())]
        self.shell("true")

    def command(self, script: str) -> list[str]:
        # Phones with Android 6 and older lack the shell protocol with exit codes, and adb says so.
        # Their output might not be the program's.
        return [*self._adb, "shell", "-T", script]

    def lost(self, status: int, text: str) -> str | None:
        message = "\n".join(line for line in text.splitlines() if _FROM_ADB.match(line))
        for words, hint in _HINTS.items():
            if words in message:
                return hint
        return f"adb failed: {last_words(message)}" if message.startswith("error:") else None

    def _send(self, local: Path, offset: int, part: str, progress: Callable[[int], None]) -> None:
        size = local.stat().st_size
        if offset or size > PUSH_WHOLE_BYTES:
            super()._send(local, offset, part, progress)
            return
        self._adb_transfer("push", str(local), part)
        progress(size)

    def _receive(self, remote: str, local: Path) -> None:
        self._adb_transfer("pull", remote, str(local))

    def _adb_transfer(self, *arguments: str) -> None:
        try:
            done = subprocess.run(
                [*self._adb, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TRANSFER_TIMEOUT_S,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.name}: adb {arguments[0]} hangs; is it connected?") from None
        if done.returncode != 0:
            raise self.failure(done.returncode, done.stdout)


def attached() -> list[tuple[str, str, str]]:
    """(serial, state, model) of each device that `adb devices -l` lists."""
    done = subprocess.run(
        [_program(), "devices", "-l"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if done.returncode != 0:
        raise DeviceError(f"adb devices failed: {done.stderr.strip()[-200:]}")
    return parse_devices(done.stdout)


def parse_devices(text: str) -> list[tuple[str, str, str]]:
    """The output of `adb devices -l`."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and not line.startswith(("*", "List of")):
            facts = dict(word.split(":", 1) for word in words[2:] if ":" in word)
            found.append((words[0], words[1], facts.get("model", "").replace("_", " ")))
    return found


def _program() -> str:
    path = shutil.which("adb")
    if path is None:
        raise DeviceError(
            "adb is not installed; `apt-get install adb`, or Google's platform-tools on the PATH"
        )
    return path
