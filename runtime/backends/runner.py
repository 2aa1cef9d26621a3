"""``pocketslm-run`` as a child process: the native engine where no library can be loaded.

An app on a phone may start a program that lies beside its native libraries, and needs no ctypes, no
compiler and no wheel for it; a model that is too large then ends the child and not the app. The
child speaks JSON lines (``runtime/ops/runner/protocol.cpp``).
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
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketslm.errors import BackendError, ContextOverflowError, UsageError
from pocketslm.runtime.backends import Logits, check_tokens
from pocketslm.runtime.bundle import Bundle, Graph
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.generation import Finish, Step

PROGRAM = "POCKETSLM_RUN"
"""The environment variable that names the program; without it, it is built once and cached."""


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

    The tokens of the sequence are kept here too, and every request carries them: the child reads
    only what it does not hold. So a child that died is started again by the next request, which
    reads its prompt anew.
    """

    def __init__(
        self, model: Path, context: int | None = None, threads: int | None = None, kv: str = "fp16"
    ) -> None:
        self._load: dict[str, Any] = {"op": "load", "path": str(model), "kv": kv}
        self._load |= {"context": context} if context else {}
        self._load |= {"threads": threads} if threads else {}
        self._ids: list[int] = []
        self._numbers = itertools.count(1)
        self._write = threading.Lock()
        self._running: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        loaded = self._start()
        self.backend = f"runner {loaded['isa']}"
        self.context: int = loaded["context"]
        self.vocab_size: int = loaded["vocab_size"]
        self.threads: int = loaded["threads"]
        self.load_ms: float = loaded["load_ms"]

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return len(self._ids)

    @property
    def pid(self) -> int | None:
        """The child, for who measures or watches it."""
        return self._process.pid if self._process else None

    def forward(self, tokens: npt.NDArray[np.integer[Any]], *, all_logits: bool = False) -> Logits:
        """See :class:`pocketslm.runtime.backends.Session`."""
        ids = np.asarray(tokens)
        check_tokens(self, ids)
        whole = [*self._ids, *ids.tolist()]
        first = len(self._ids) if all_logits else len(whole) - 1
        event = self.ask(op="logits", tokens=whole, first=first, base64=True)
        self._ids = whole
        flat = np.frombuffer(base64.b64decode(event["base64"]), np.float32)
        return flat.reshape(-1, self.vocab_size).copy()

    def truncate(self, length: int) -> None:
        """See :class:`pocketslm.runtime.backends.Session`."""
        if not 0 <= length <= len(self._ids):
            raise UsageError(f"cannot truncate {len(self._ids)} cached tokens to {length}")
        del self._ids[length:]

    def can_generate(self, config: GenerationConfig) -> bool:
        """Whether the child can follow this configuration by itself."""
        return config.min_p == 0

    def generate(
        self, ids: Sequence[int], config: GenerationConfig, eos: Collection[int], limit: int
    ) -> Iterator[Step]:
        """Steps made by the child, with no logits on the way (see Engine.generate).

        Closing the iterator or :meth:`cancel` ends the generation; after a cancel there is no
        last step with a finish.
        """
        start = time.perf_counter_ns()
        request: dict[str, Any] = {
            "tokens": list(ids),
            "max_tokens": limit,
            "ignore_eos": config.ignore_eos,
            "eos": sorted(eos),
            "repetition_penalty": config.repetition_penalty,
            "spare_prompt": not config.penalize_prompt,
            "logprobs": True,
        }
        if config.do_sample:
            request |= {"temperature": config.temperature, "top_k": config.top_k}
            seed = time.time_ns() % 10**15 if config.seed is None else config.seed
            request |= {"top_p": config.top_p, "seed": seed}
        self._running = name = str(next(self._numbers))
        self._ids = list(ids)
        last: Step | None = None
        try:
            self._ensure()
            self._send({"op": "generate", "id": name, **request})
            # The last step is held until the child is ready for the next request
            for count in itertools.count(1):
                event = self._event()
                if event["event"] != "token":
                    break
                token = event["token"]
                finish: Finish | None = None
                if token in eos and not config.ignore_eos:
                    finish = "eos"
                elif count == limit:
                    finish = "length" if config.max_new_tokens else "context"
                step = Step(token, event["logprob"], time.perf_counter_ns() - start, finish)
                if finish:
                    last = step
                else:
                    yield step
            if last:
                yield last
        except (GeneratorExit, KeyboardInterrupt):
            if last is None:
                self._drain(name)
            raise
        finally:
            self._running = None

    def cancel(self) -> None:
        """End the generation that runs now, also while it reads its prompt; from any thread."""
        if (name := self._running) is not None and self._process is not None:
            with suppress(BackendError):
                self._send({"op": "cancel", "id": name})

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request that one event answers."""
        self._ensure()
        self._send(request)
        return self._event()

    def stats(self) -> dict[str, Any]:
        """``rss_bytes``, ``peak_rss_bytes`` and ``length`` of the child."""
        return self.ask(op="stats")

    def bench(self, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
        """``prefill_ns`` and ``decode_ns``, one each per repeat."""
        self._ids = []
        return self.ask(
            op="bench", prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats
        )

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
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

    def _ensure(self) -> None:
        if self._process is None:
            self._start()

    def _start(self) -> dict[str, Any]:
        command = [str(program()), "--json"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C ends an answer, not the engine
            )
        except OSError as error:
            raise BackendError(f"cannot start {command[0]}: {error.strerror}") from None
        self._send(self._load)
        return self._event()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        line = json.dumps(request, separators=(",", ":")) + "\n"
        try:
            with self._write:
                self._process.stdin.write(line.encode())
                self._process.stdin.flush()
        except OSError:
            self._died()

    def _event(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._died()
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "error":
            message = event["message"]
            overflow = "do not fit the context" in message
            raise (ContextOverflowError if overflow else BackendError)(f"pocketslm-run: {message}")
        return event

    def _drain(self, name: str) -> None:
        """Let a generation that nobody reads any more come to its end."""
        with suppress(BackendError, ContextOverflowError):
            self._send({"op": "cancel", "id": name})
            while self._event()["event"] == "token":
                pass

    def _died(self) -> None:
        process = self._process
        code = process.wait() if process else 0
        self.close()
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        raise BackendError(
            f"pocketslm-run ended with {how}{memory}; it starts again with the next request"
        )
