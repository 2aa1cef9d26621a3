"""The abilities of every device, given a way to run a shell script on it."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import IO, Self

from pocketslm.errors import DeviceError

Progress = Callable[[str, float], None]

SCRIPT_TIMEOUT_S = 60.0
STALL_TIMEOUT_S = 60.0  # a transfer that moves nothing for so long is given up
PART = ".part"
_CHUNK = 1 << 20
_STDERR_CHARACTERS = 300


class Device(ABC):
    """A machine that runs our programs: this one, a board over ssh, a phone over adb.

    - ``name``: as the user wrote it. ``kind`` is its first part.
    - ``folder``: the place of our files on it.
    - ``pause_s``: the default pause between two tests, so that the second does not begin hot.

    Every failure is a DeviceError of one line. Use it in a ``with`` block, which closes it.
    """

    name: str
    kind: str
    folder: str
    pause_s: float

    @abstractmethod
    def command(self, script: str) -> list[str]:
        """A command for this machine that runs ``script`` in the device's sh. Input, output and
        exit status pass through.
        """

    def lost(self, status: int, text: str) -> str | None:
        """The message for the user if the connection failed and not the script; otherwise None.

        ``text`` is everything that the command of :meth:`command` wrote to stderr.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most keep nothing open
        """Close what was kept open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def shell(self, script: str, timeout_s: float = SCRIPT_TIMEOUT_S) -> str:
        """Run a script to its end. Returns its output."""
        try:
            done = subprocess.run(
                self.command(script),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                start_new_session=True,  # Ctrl-C is for us: the device may need cleaning up
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(
                f"{self.name} gave no answer within {timeout_s:g} s; is it still connected?"
            ) from None
        if done.returncode != 0:
            raise self.failure(done.returncode, done.stderr or done.stdout)
        return done.stdout.decode(errors="replace")

    def stream(self, script: str, stderr: IO[bytes]) -> subprocess.Popen[str]:
        """Start a script that reads and writes lines. The caller ends it."""
        return subprocess.Popen(
            self.command(script),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

    def failure(self, status: int, output: bytes) -> DeviceError:
        """The error for a command of :meth:`command` that ended with a status."""
        text = output.decode(errors="replace").strip()
        if reason := self.lost(status, text):
            return DeviceError(f"{self.name}: {reason}")
        last = last_words(text)
        if "No space left" in last:
            return DeviceError(
                f"{self.name} is full ({last}); free some space, or remove what earlier runs left "
                f"with `pocketslm device clean {self.name}`"
            )
        return DeviceError(f"{self.name}: a command failed with status {status}: {last}")

    def push(self, local: Path, name: str, progress: Progress = lambda step, part: None) -> str:
        """Copy a file to the device. Returns its path there.

        A file of that name with the same SHA-256 is left alone. An interrupted transfer resumes if
        its part is the beginning of this file. Only a whole file gets the name.
        """
        target, part = f"{self.folder}/{name}", f"{self.folder}/{name}{PART}"
        size, digest = local.stat().st_size, file_sha256(local)
        (held, _), (begun, offset) = self._state(target, part)
        if held == digest:
            return target
        if not 0 < offset <= size or file_sha256(local, offset) != begun:
            offset = 0
        try:
            self._send(local, offset, part, lambda sent: progress(f"send {name}", sent / size))
        except DeviceError as error:
            if "is full" in str(error):
                self.shell(f"rm -f {shlex.quote(part)}")
            raise
        (arrived, _), _ = self._state(part, target)
        if arrived != digest:
            self.shell(f"rm -f {shlex.quote(part)}")
            raise DeviceError(f"{self.name}: {name} arrived altered; check the cable and try again")
        self.shell(f"mv -f {shlex.quote(part)} {shlex.quote(target)}")
        return target

    def pull(self, remote: str, local: Path) -> None:
        """Fetch a file."""
        with tempfile.TemporaryDirectory(dir=local.parent) as scratch:
            aside = Path(scratch) / "file"
            self._receive(remote, aside)
            aside.replace(local)

    def clean(self) -> None:
        """Remove everything that we put there."""
        self.shell(f"rm -rf {shlex.quote(self.folder)}")

    def _state(self, *paths: str) -> list[tuple[str, int]]:
        """(SHA-256, bytes) of files in our folder, which is made; ("", 0) for missing files."""
        names = " ".join(shlex.quote(path) for path in paths)
        output = self.shell(
            f"mkdir -p {shlex.quote(self.folder)} && for f in {names}; do "
            'if [ -f "$f" ]; then sha256sum < "$f" && wc -c < "$f"; else echo -; echo 0; fi; done',
            timeout_s=600,
        ).split("\n")
        try:
            digests = [output[2 * i].split()[0].strip("-") for i in range(len(paths))]
            return [(digest, int(output[2 * i + 1])) for i, digest in enumerate(digests)]
        except (ValueError, IndexError):
            raise DeviceError(
                f"{self.name}: sha256sum answered {' '.join(output)!r:.200}, expected digests and "
                "sizes; does its shell print more than it is asked for?"
            ) from None

    def _send(self, local: Path, offset: int, part: str, progress: Callable[[int], None]) -> None:
        """Append the file's bytes from ``offset`` on to ``part``; 0 starts ``part`` anew."""
        arrow = ">>" if offset else ">"
        with tempfile.TemporaryFile() as stderr, local.open("rb") as source:
            source.seek(offset)
            process = subprocess.Popen(
                self.command(f"cat {arrow} {shlex.quote(part)}"),
                stdin=subprocess.PIPE,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
            assert process.stdin is not None
            try:
                while chunk := source.read(_CHUNK):
                    with watchdog(STALL_TIMEOUT_S, process.kill):
                        process.stdin.write(chunk)
                        process.stdin.flush()
                    offset += len(chunk)
                    progress(offset)
                process.stdin.close()
                process.wait(STALL_TIMEOUT_S)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                pass  # its status and its last words say more
            finally:
                process.kill()
                status = process.wait()
                with suppress(BrokenPipeError):
                    process.stdin.close()
            if status != 0:
                stderr.seek(0)
                raise self.failure(status, stderr.read())

    def _receive(self, remote: str, local: Path) -> None:
        with tempfile.TemporaryFile() as stderr, local.open("wb") as target:
            done = subprocess.run(
                self.command(f"cat {shlex.quote(remote)}"),
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=stderr,
                check=False,
                start_new_session=True,
            )
            if done.returncode != 0:
                stderr.seek(0)
                raise self.failure(done.returncode, stderr.read())


@contextmanager
def watchdog(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` if the guarded block takes longer. It never keeps the process alive."""
    timer = Timer(seconds, act)
    timer.daemon = True
    try:
        timer.start()
        yield
    finally:
        timer.cancel()


def last_words(text: str) -> str:
    """The line of a failed command's output that gives the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:_STDERR_CHARACTERS]


def file_sha256(path: Path, size: int | None = None) -> str:
    """The digest of a file, or of its first ``size`` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
