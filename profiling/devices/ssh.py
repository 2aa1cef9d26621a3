"""A board over ssh, through the system's own client, so that its keys, hosts and settings apply."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from pocketslm.errors import DeviceError, UsageError
from pocketslm.profiling.devices.device import Device, last_words

FOLDER = "$HOME/.cache/pocketslm-device"
_MARK = "pocketslm:"
_UNREACHABLE = 255  # ssh's own status, as opposed to the script's


class SshDevice(Device):
    """``ssh:[user@]host[:port]`` or ``ssh:NAME`` of ~/.ssh/config.

    Needs a key without a password prompt and a known host; a shell and the usual small programs
    (cat, sha256sum, uname, mkdir) on the board, no sftp. One connection carries everything.
    """

    kind, pause_s = "ssh", 10.0

    def __init__(self, address: str) -> None:
        host, colon, port = address.rpartition(":")
        host = host if colon else address
        if not host or host.startswith("-") or (colon and not port.isdecimal()):
            raise UsageError(f"ssh address is {address!r}, expected [user@]host[:port]")
        if shutil.which("ssh") is None:
            raise DeviceError("ssh is not installed; `apt-get install openssh-client`")
        self.name = f"ssh:{address}"
        # A short path: a socket's name may have about 100 characters.
        self._scratch = tempfile.TemporaryDirectory(prefix="pslm", dir="/tmp")
        self._ssh = [
            *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
            *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
            *("-o", "ControlMaster=auto", "-o", "ControlPersist=60"),
            *("-o", f"ControlPath={Path(self._scratch.name) / 'c'}"),
            *(("-p", port) if colon else ()),
        ]
        self._host = host
        try:
            self.folder = self._find_folder()
        except DeviceError:
            self.close()
            raise

    def _find_folder(self) -> str:
        """Find FOLDER on the board. The board's shell must print nothing else, since that would mix
        with the output of programs.
        """
        said = self.shell(f'echo "{_MARK}{FOLDER}"').removesuffix("\n")
        before, _, folder = said.partition(_MARK)
        if before:
            raise DeviceError(
                f"{self.name}: its shell prints {before.strip()!r:.60} before every "
                "command; let ~/.bashrc or its like print only where the shell is interactive"
            )
        if not folder.startswith("/") or "\n" in folder:
            raise DeviceError(f"{self.name}: its home folder is {folder!r:.60}")
        return folder

    def command(self, script: str) -> list[str]:
        # The user's own shell only starts sh, so any shell will do.
        return [*self._ssh, "--", self._host, f"exec sh -c {shlex.quote(script)}"]

    def lost(self, status: int, text: str) -> str | None:
        if status != _UNREACHABLE:
            return None
        message = last_words(text)
        if "Permission denied" in message:
            return f"{message}; install your key with `ssh-copy-id {self._host}`"
        if "Host key verification failed" in message:
            return f"{message}; connect once with `ssh {self._host}` and check the host's key"
        return f"the connection failed or was lost: {message}"

    def close(self) -> None:
        subprocess.run(
            [*self._ssh, "-O", "exit", "--", self._host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        self._scratch.cleanup()
