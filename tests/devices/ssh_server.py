"""A real sshd on this machine's loopback, with host keys and a user's key of its own."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import time
from pathlib import Path

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
START_TIMEOUT_S = 20.0


class SshServer:
    """address: as in ``ssh:ADDRESS``; wrapper: a folder whose ``ssh`` knows the keys made here."""

    def __init__(self, folder: Path) -> None:
        assert SSHD is not None
        self._folder = folder
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"{getpass.getuser()}@127.0.0.1:{self.port}"
        config = folder / "sshd_config"
        config.write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder / 'host'}\n"
            f"AuthorizedKeysFile {folder / 'authorized'}\nPidFile {folder / 'pid'}\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        )
        host_key = (folder / "host.pub").read_text()
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder / 'user'}\nIdentitiesOnly yes\nStrictHostKeyChecking yes\n"
            f"UserKnownHostsFile {folder / 'known'}\nGlobalKnownHostsFile none\n"
        )
        self.wrapper = folder / "bin"
        self.wrapper.mkdir()
        ssh = self.wrapper / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"\n')
        ssh.chmod(0o755)
        # Where it runs as root it wants this folder for unprivileged children.
        Path("/run/sshd").mkdir(exist_ok=True) if getpass.getuser() == "root" else None
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(config)], stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.05)

    def forget_host(self) -> None:
        """As if nobody had ever connected."""
        (self._folder / "known").write_text("")

    def revoke_key(self) -> None:
        (self._folder / "authorized").write_text("")

    def cut(self) -> None:
        """The network goes: the server's children with their connections are killed."""
        listing = subprocess.run(
            ["ps", "-o", "pid=,ppid=", "-e"], capture_output=True, text=True, check=True
        ).stdout
        parents = {int(pid): int(parent) for pid, parent in map(str.split, listing.splitlines())}

        def is_ours(pid: int) -> bool:
            parent = parents.get(pid, 0)
            return parent == self._process.pid or (parent > 1 and is_ours(parent))

        for pid in parents:
            name = Path(f"/proc/{pid}/comm")
            if is_ours(pid) and name.exists() and name.read_text().startswith("sshd"):
                subprocess.run(["kill", "-9", str(pid)], check=False)

    def close(self) -> None:
        self.cut()
        self._process.kill()
        self._process.wait()
