"""``pocketslm-run`` as a child process: the native engine where no library can be loaded.

An app on a phone may start a program that lies beside its native libraries. That needs no ctypes,
no compiler and no wheel, and a model that is too large ends the child and not the app. The child
speaks JSON lines (``runtime/ops/runner/protocol.cpp``).
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pocketslm import schema
from pocketslm.errors import BackendError, ContextOverflowError, PocketSlmError, UsageError
from pocketslm.runtime import forks
from pocketslm.runtime.answer import Step
from pocketslm.runtime.backends import Logits, check_tokens
from pocketslm.runtime.bundle import Bundle, Graph
from pocketslm.runtime.config import CONSTRAINTS, MOST_TOKENS, GenerationConfig
from pocketslm.runtime.pipes import has_input

PROGRAM = "POCKETSLM_RUN"
"""The environment variable that names the program; without it, it is built once and cached."""
GRACE_S = 30.0
"""How long a child may take to end, or a generation that is cancelled."""


def open_session(
    bundle: Bundle, graph: Graph, threads: int | None, context: int | None
) -> RunnerSession:
    """A session in a child process; see :mod:`pocketslm.runtime.backends`."""
    return RunnerSession(
        bundle.path / graph.file, context or graph.context, threads, graph.kv_cache
    )


def program() -> Path:
    """The runner for this machine: the one named, or compiled now and cached."""
    if named := os.environ.get(PROGRAM):
        return Path(named)
    from pocketslm.runtime.ops import build

    try:
        return build.runner()
    except build.BuildError as error:
        raise BackendError(f"pocketslm-run could not be built: {error}") from error


class RunnerSession:
    """A model and its KV cache in a child process.

    The tokens of the sequence are kept here too, and every request carries them; the child reads
    only those that it does not hold. If a child died, the next request starts another, which reads
    the prompt anew. Requests have numbers, which their answers repeat. A child that answers with
    another number is ended, so that no answer is taken for another's.
    """

    def __init__(
        self, model: Path, context: int | None = None, threads: int | None = None, kv: str = "fp16"
    ) -> None:
        self._load: dict[str, Any] = {"op": "load", "path": str(model), "kv": kv}
        self._load |= {"context": context} if context else {}
        self._load |= {"threads": threads} if threads else {}
        self._ids: list[int] = []
        self._numbers = itertools.count(1)
        self._read = bytearray()  # output of the child that nobody has taken yet
        self._process: subprocess.Popen[bytes] | None = None
        self.after_fork()
        forks.watch(self)
        with self._asking:
            loaded = self._start()
        self.backend = f"runner {loaded['isa']}"
        self.context: int = loaded["context"]
        self.vocab_size: int = loaded["vocab_size"]
        self.threads: int = loaded["threads"]
        self.load_ms: float = loaded["load_ms"]

    def after_fork(self) -> None:
        """The child process stays with the parent; the next request starts another."""
        self._asking = threading.Lock()  # held from a request to its answers
        self._write = threading.Lock()  # guards the pipe, into which a cancel may write at any time
        self._running: str | None = None  # the generation whose answers are not read to the end
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
            self._process = None

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return len(self._ids)

    @property
    def pid(self) -> int | None:
        """The child's process id, for those who measure or watch it."""
        process = self._process
        return process.pid if process else None

    def forward(self, tokens: npt.NDArray[np.integer[Any]], *, all_logits: bool = False) -> Logits:
        """See :class:`pocketslm.runtime.backends.Session`."""
        ids = np.asarray(tokens)
        with self._asking:
            check_tokens(self, ids)
            whole = [*self._ids, *ids.tolist()]
            first = len(self._ids) if all_logits else len(whole) - 1
            event = self._ask(op="logits", tokens=whole, first=first, base64=True)
            self._ids = whole
        flat = np.frombuffer(base64.b64decode(event["base64"]), np.float32)
        return flat.reshape(-1, self.vocab_size).copy()

    def truncate(self, length: int) -> None:
        """See :class:`pocketslm.runtime.backends.Session`."""
        with self._asking:
            if not 0 <= length <= len(self._ids):
                raise UsageError(f"cannot truncate {len(self._ids)} cached tokens to {length}")
            del self._ids[length:]

    def generate(
        self, ids: Sequence[int], config: GenerationConfig, eos: Collection[int], limit: int
    ) -> Generator[Step, None, None]:
        """Let the child generate; no logits cross the pipe (see Engine.generate).

        Closing the iterator, another request or :meth:`cancel` ends the generation. After a cancel
        there is no last step with a finish. Raises UsageError if it is resumed after another
        request.
        """
        start = time.perf_counter_ns()
        request: dict[str, Any] = {
            "tokens": list(ids),
            "max_tokens": limit,
            "ignore_eos": config.ignore_eos,
            "eos": sorted(eos),
            "repetition_penalty": config.repetition_penalty,
            "spare_prompt": not config.penalize_prompt,
            "logprobs": config.logprobs,
        }
        if config.prompt_lookup_num_tokens is not None:
            request["prompt_lookup"] = min(config.prompt_lookup_num_tokens, MOST_TOKENS)
        if config.constraint is not None:
            kind, text = config.constraint
            try:
                request[kind] = schema.loads(text) if kind == "json_schema" else text
            except (ValueError, RecursionError) as error:
                raise UsageError(f"json_schema: the schema is not JSON: {error}") from None
        if config.samples:
            top_k = min(config.top_k, MOST_TOKENS)
            request |= {"temperature": config.temperature, "top_k": top_k}
            seed = time.time_ns() % 10**15 if config.seed is None else config.seed
            request |= {"top_p": config.top_p, "min_p": config.min_p}
            request |= {"typical_p": config.typical_p, "seed": seed}
        with self._asking:
            self._ready()
            self._ids = list(ids)
            name = self._send({"op": "generate", **request})
            self._running = name
        last: Step | None = None
        try:
            # The last step is held until the child is ready for the next request
            for count in itertools.count(1):
                event = self._next_of(name)
                now = time.perf_counter_ns() - start
                if event["event"] == "done":
                    if event["reason"] == "eos":
                        last = Step(event["token"], event.get("logprob"), now, "eos")
                    break
                step = Step(event["token"], event.get("logprob"), now)
                if event.get("whole"):
                    last = step._replace(finish="stop")
                elif count == limit:
                    last = step._replace(finish="length" if config.max_new_tokens else "context")
                else:
                    yield step
        finally:
            with self._asking:
                if self._running == name:
                    self._end_running()
        if last:
            yield last

    def cancel(self) -> None:
        """End the present generation, even while it reads its prompt. Any thread may call this."""
        if (name := self._running) is not None:
            self._cancel(name)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request that one event answers."""
        with self._asking:
            return self._ask(**request)

    def stats(self) -> dict[str, Any]:
        """``rss_bytes``, ``peak_rss_bytes`` and ``length`` of the child."""
        return self.ask(op="stats")

    def bench(self, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
        """Measure: ``prefill_ns`` and ``decode_ns`` have one value for each repeat."""
        with self._asking:
            self._ids = []
            return self._ask(
                op="bench", prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats
            )

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        self._running = None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe:
                    pipe.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None):
            self.close()

    # Callers of the methods below hold _asking, except for _cancel.

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._ready()
        return self._event(self._send(request))

    def _ready(self) -> None:
        """A child that waits for a request."""
        if self._running is not None:
            self._end_running()
        if self._process is None:
            self._start()

    def _start(self) -> dict[str, Any]:
        command = [str(program()), "--json"]
        self._read.clear()
        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C ends an answer, not the engine
            )
        except OSError as error:
            raise BackendError(f"cannot start {command[0]}: {error.strerror}") from None
        try:
            return self._event(self._send(self._load))
        except PocketSlmError:
            self.close()
            raise

    def _send(self, request: dict[str, Any]) -> str:
        """Send a request. Returns the number that its answers will have."""
        name = str(next(self._numbers))
        try:
            self._put({**request, "id": name})
        except (OSError, ValueError):
            self._died()
        except BaseException:  # Ctrl-C, perhaps within the line
            self.close()
            raise
        return name

    def _put(self, request: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise BrokenPipeError
        line = json.dumps(request, separators=(",", ":"), default=_plain) + "\n"
        with self._write:
            left = memoryview(line.encode())
            while left:
                left = left[process.stdin.write(left) :]

    def _next_of(self, name: str) -> dict[str, Any]:
        """The next event of the generation ``name``, as long as that is the present one."""
        with self._asking:
            if self._running != name:
                raise UsageError(
                    "this generation is stale: the model was asked for something else before it "
                    "ended; end or close a generation first"
                )
            try:
                event = self._event(name)
            except PocketSlmError:
                self._running = None  # it ended with an error
                raise
            if event["event"] == "done":
                self._running = None
            return event

    def _event(self, name: str, timeout_s: float | None = None) -> dict[str, Any]:
        """The next event, which must belong to the request ``name``."""
        process = self._process
        if process is None or process.stdout is None:
            raise BackendError("pocketslm-run was closed")
        event = _parse(self._line(process.stdout.fileno(), timeout_s))
        if event is None or event["id"] != name:
            self.close()
            raise BackendError(
                "pocketslm-run gave another answer than one to the request; it starts again with "
                "the next request"
            )
        if event["event"] == "error":
            message = event["message"]
            if message.startswith(CONSTRAINTS):
                raise UsageError(message)
            overflow = "do not fit the context" in message
            raise (ContextOverflowError if overflow else BackendError)(f"pocketslm-run: {message}")
        return event

    def _line(self, pipe: int, timeout_s: float | None) -> bytes:
        """The next line. If Ctrl-C ends the waiting, the part that has come is kept."""
        searched = 0
        while not (end := self._read.find(b"\n", searched) + 1):
            searched = len(self._read)
            try:
                more = os.read(pipe, 1 << 16) if has_input(pipe, timeout_s) else b""
            except OSError:  # closed meanwhile
                more = b""
            if not more:
                self._died()
            self._read += more
        line = bytes(self._read[:end])
        del self._read[:end]
        return line

    def _end_running(self) -> None:
        """Bring a generation that nobody reads any more to its end."""
        name, self._running = self._running, None
        if name is None:
            return
        self._cancel(name)
        with suppress(PocketSlmError):
            while self._event(name, GRACE_S)["event"] != "done":
                pass

    def _cancel(self, name: str) -> None:
        with suppress(OSError, ValueError):  # it is dead, or closed: there is nothing to end
            self._put({"op": "cancel", "id": name})

    def _died(self) -> NoReturn:
        process = self._process
        if process is None:
            raise BackendError("pocketslm-run was closed")
        try:
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self.close()
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        memory = " (out of memory?)" if how == "SIGKILL" else ""
        raise BackendError(
            f"pocketslm-run ended with {how}{memory}; it starts again with the next request"
        )


def _plain(value: object) -> int | float:
    """A number of numpy's, or a fraction, as one of JSON."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is no number")


def _parse(line: bytes) -> dict[str, Any] | None:
    """An event; None for anything else."""
    try:
        event = schema.loads(line)
    except (ValueError, RecursionError):
        return None
    named = isinstance(event, dict) and isinstance(event.get("event"), str)
    return event if named and isinstance(event.get("id"), str) else None
