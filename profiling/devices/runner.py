"""``pocketslm-run --json`` on a device: install, start, ask and end it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pocketslm.errors import BackendError, DeviceError
from pocketslm.profiling.devices.device import Device, Progress, file_sha256, last_words, watchdog
from pocketslm.profiling.machine import Machine
from pocketslm.runtime.ops import build

PROGRAM = "pocketslm-run"
_EXIT_TIMEOUT_S = 10.0
_NOT_EXECUTABLE = 126  # sh's status if the kernel refuses the program
# Messages of shells about a program for another processor. Some try it as a script.
_NOT_A_PROGRAM = re.compile(rf"[Ee]xec format|not executable|{PROGRAM}:.*([Ss]yntax|not found)")


def install(device: Device, machine: Machine, model: Path, progress: Progress) -> str:
    """Put the runner and a ``model.slm`` on the device unless they are there already.

    Returns the model's path there. The file is named by its hash, so that models do not replace
    each other. Raises DeviceError, also if no runner exists for the device's processor.
    """
    program = device.push(runner_for(machine), PROGRAM, progress)
    device.shell(f"chmod 755 {shlex.quote(program)}")
    return device.push(model, _name_there(model), progress)


def uninstall(device: Device, model: Path) -> None:
    """Remove a model from the device. The runner stays for the next one."""
    device.shell(f"rm -f {shlex.quote(f'{device.folder}/{_name_there(model)}')}")


def _name_there(model: Path) -> str:
    return f"model-{file_sha256(model)[:16]}.slm"


def runner_for(machine: Machine) -> Path:
    """The static runner for a machine, from the cache or built now."""
    arch = build.MACHINES.get(machine.arch)
    if arch is None:
        raise DeviceError(
            f"the device's processor is {machine.arch}, the runner exists for aarch64 and x86_64; "
            "install a 64-bit system on it"
        )
    try:
        # This machine's own compiler made the program that the runner backend starts.
        return build.runner(None if machine.kind == "local" else f"{arch}-linux")
    except build.BuildError as error:
        last = str(error).splitlines()[-1]
        raise DeviceError(f"cannot build the runner for {arch}: {last}") from None


class RunnerProcess:
    """A running runner. Use it in a ``with`` block, which leaves no process on the device.

    An error that the runner reports is a BackendError. If the process or the connection ends, or no
    answer comes within ``timeout_s``, that is a DeviceError.
    """

    def __init__(self, device: Device, timeout_s: float) -> None:
        self._device, self._timeout_s, self._timed_out = device, timeout_s, False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        folder = shlex.quote(device.folder)
        # A separate shell waits for the program, and its status tells what ended the program.
        start = f"echo $$; exec ./{PROGRAM} --json"
        self._process = device.stream(f"cd {folder} && sh -c '{start}'; exit $?", self._stderr)
        self.pid = 0
        try:
            answer = self._read_line(timeout_s)
            if not answer.strip().isdecimal():
                raise self._why_it_ended()
            self.pid = int(answer)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the runner, by force if it must be, on the device as well as here."""
        try:
            with suppress(OSError, ValueError):
                assert self._process.stdin is not None
                self._process.stdin.write('{"op": "cancel"}\n{"op": "quit"}\n')
                self._process.stdin.close()
            try:
                self._process.wait(1)
            except subprocess.TimeoutExpired:
                if self.pid:
                    with suppress(DeviceError):
                        self._device.shell(f"kill -9 {self.pid}", _EXIT_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._stderr.close()

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"op": op} | request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._why_it_ended() from None
        line = self._read_line(self._timeout_s)
        try:
            answer = json.loads(line)
            failed = str(answer["message"]) if answer["event"] == "error" else None
        except (ValueError, RecursionError, TypeError, KeyError):
            raise (
                self._why_it_ended()
                if not line.endswith("\n")
                else DeviceError(
                    f"the runner on {self._device.name} answered {line[:80]!r}, expected JSON"
                )
            ) from None
        if failed is not None:
            raise BackendError(f"the runner on {self._device.name}: {failed}")
        assert isinstance(answer, dict)
        return answer

    def _read_line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        with watchdog(timeout_s, self._give_up):
            return self._process.stdout.readline()

    def _give_up(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _why_it_ended(self) -> DeviceError:
        name = self._device.name
        if self._timed_out:
            return DeviceError(
                f"the runner on {name} gave no answer within {self._timeout_s:g} s and was "
                "stopped; ask for fewer tokens or a longer --timeout"
            )
        try:
            status = self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return DeviceError(f"the runner on {name} closed its output and runs on")
        self._stderr.seek(0)
        output = self._stderr.read()
        text = output.decode(errors="replace").strip()
        last = last_words(text)
        if reason := self._device.lost(status, text):
            return DeviceError(f"{name}: {reason}")
        if status == _NOT_EXECUTABLE or _NOT_A_PROGRAM.search(text):
            return DeviceError(f"{name} cannot execute the runner ({last}): wrong processor?")
        if status > 128:
            hint = ", often for want of memory" if status == 128 + 9 else ""
            return DeviceError(f"the runner on {name} was ended by signal {status - 128}{hint}")
        return DeviceError(f"the runner on {name} ended with status {status}: {last}")
