"""The parent's side of a worker process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from threading import Timer
from types import TracebackType
from typing import Any, Self, TypeVar

from pocketslm import errors
from pocketslm.errors import BackendError, PocketSlmError
from pocketslm.profiling.engine import Job

_COMMAND = (sys.executable, "-P", "-m", "pocketslm.profiling.worker")
_STDERR_CHARACTERS = 300


@dataclass(frozen=True)
class Loaded:
    """A worker's first answer. Fields are as in Measurement."""

    backend: str
    load_ns: int
    base_rss_bytes: int


@dataclass(frozen=True)
class Sample:
    """One repetition. Fields are as in Measurement."""

    sample_ns: int
    step_ns: list[int]
    peak_rss_bytes: int
    prefill_ns: int | None = None
    rss_anon_bytes: int | None = None
    rss_file_bytes: int | None = None
    pss_bytes: int | None = None
    pss_file_bytes: int | None = None
    cpu_ns: int = 0
    major_faults: int = 0


@dataclass(frozen=True)
class Operators:
    """The time of each operator in one repetition. The field is as in Measurement."""

    operator_ns: dict[str, int] | None


_Answer = TypeVar("_Answer", Loaded, Sample, Operators)


class Worker:
    """A separate process that runs one job. Use it in a ``with`` block, which leaves no process
    behind.

    Errors in the worker are raised here, as pocketslm errors of one line. A worker that takes
    longer than ``timeout_s`` for one answer is killed.
    """

    def __init__(self, job: Job, timeout_s: float, command: tuple[str, ...] = _COMMAND) -> None:
        self._what = f"the {job.runtime} worker for {job.artefact}"
        self._timeout_s = timeout_s
        self._timed_out = False
        # A file, since a pipe that nobody reads would fill up and stop the worker.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
            errors="replace",
        )
        self._request = json.dumps(job.to_dict())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def load(self) -> Loaded:
        """Send the job and wait until the model is loaded and warm."""
        return self._parse(Loaded, self._ask(self._request))

    def run(self) -> Sample:
        """One repetition."""
        return self._parse(Sample, self._ask("run"))

    def operators(self) -> Operators:
        """One more repetition, operator by operator."""
        return self._parse(Operators, self._ask("operators"))

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = Timer(self._timeout_s, self._give_up)
        timer.start()
        try:
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer.endswith("\n"):
            raise BackendError(self._why_it_ended())
        return answer

    def _give_up(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _parse(self, kind: type[_Answer], line: str) -> _Answer:
        try:
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise _as_error(answer)
            return kind(**answer)
        except (ValueError, TypeError):
            raise BackendError(f"{self._what} answered {line[:80]!r}, expected JSON") from None

    def _why_it_ended(self) -> str:
        if self._timed_out:
            return (
                f"{self._what} gave no answer within {self._timeout_s:g} s and was stopped; "
                "ask for fewer tokens or a longer --timeout"
            )
        status = self._process.wait()
        if status >= 0:
            return f"{self._what} ended with status {status}: {self._last_stderr_line()}"
        name = signal.Signals(-status).name
        hint = ", often for want of memory" if name == "SIGKILL" else ""
        return f"{self._what} was ended by {name}{hint}: {self._last_stderr_line()}"

    def _last_stderr_line(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:_STDERR_CHARACTERS] if lines else "it wrote nothing to stderr"


def _as_error(answer: dict[str, Any]) -> PocketSlmError:
    """The worker's error as its own type."""
    kind = getattr(errors, str(answer["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, PocketSlmError)):
        kind = BackendError
    return kind(str(answer.get("message")))
