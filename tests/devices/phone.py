"""A phone or board made of a recording: its files, its commands, and what runs on it.

A recording (see ``pocketslm.profiling.sensors.tree``) becomes a tree of files below a folder and
small programs for its commands. Scripts run in this machine's sh with the phone's absolute paths
led into that folder, and what they print led out again. The kernel here does not execute aarch64
programs, so the runner is given to qemu.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
from pathlib import Path

from pocketslm.profiling.sensors.tree import COMMAND, parse

RECORDINGS = Path(__file__).parent / "recordings"
_PLACES = re.compile(r"(?<![\w./])/(?=data/|sys/|etc/os|proc/(?:cpuinfo|meminfo|device-tree))")


class Phone:
    """is_full: whether nothing more can be written; runs: what executes the runner."""

    def __init__(self, root: Path, recording: str, runs: str = "qemu-aarch64-static") -> None:
        self.root, self.runs, self.is_full = root, runs, False
        (root / "data/local/tmp").mkdir(parents=True)
        (root / "bin").mkdir()
        commands: dict[str, dict[str, str]] = {}
        for path, text in parse((RECORDINGS / recording).read_text()).items():
            if path.startswith(COMMAND):
                program, _, arguments = path.removeprefix(COMMAND).partition(" ")
                commands.setdefault(program, {})[arguments] = text
            else:
                file = root / path.lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text + "\n")
        for program, answers in commands.items():
            cases = "".join(
                f"{shlex.quote(arguments)}) echo {shlex.quote(text)};;\n"
                for arguments, text in answers.items()
            )
            file = root / "bin" / program
            file.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}*) exit 1;;\nesac\n')
            file.chmod(0o755)

    def enter(self, text: str) -> str:
        """Text with the phone's paths, as this machine's."""
        return _PLACES.sub(f"{self.root}/", text)

    def leave(self, output: bytes) -> bytes:
        """What a script printed, with the phone's paths again."""
        return output.replace(bytes(self.root), b"")

    def start(self, script: str) -> subprocess.Popen[bytes]:
        """Run a script; its programs are the phone's where the recording has them."""
        script = self.enter(script)
        if self.runs:
            script = script.replace("exec ./", f"exec {self.runs} ./")
        if self.is_full:
            script = re.sub(r"cat >>? \S+", "cat > /dev/full", script)
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["sh", "-c", script],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=os.environ | {"PATH": path},
            start_new_session=True,
        )

    def running(self) -> list[int]:
        """Processes of the phone that are alive."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes()
                    place = (entry / "cwd").readlink()
                    if b"pocketslm-run" in command and place.is_relative_to(self.root):
                        found.append(int(entry.name))
        return found
