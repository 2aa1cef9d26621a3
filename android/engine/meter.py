"""How fast and how large: tokens as they come, memory of this process and of its engine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.embedding import Vector
from pocketslm.runtime.model import Record, ScoringModel
from pocketslm.runtime.tokenizer import Tokenizer


class Metered:
    """A model that counts its tokens; otherwise the model it is given."""

    def __init__(self, model: ScoringModel) -> None:
        self.model = model
        self.tokens = 0
        self._first = self._last = 0.0

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def backend(self) -> str:
        return self.model.backend

    @property
    def context(self) -> int:
        return self.model.context

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def tps(self) -> float:
        """Tokens per second of the generation that runs or ran last."""
        seconds = self._last - self._first
        return (self.tokens - 1) / seconds if seconds > 0 else 0.0

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        self.tokens = 0
        for record in self.model.generate(prompt, config):
            now = time.perf_counter()
            self.tokens += 1
            self._first = now if self.tokens == 1 else self._first
            self._last = now
            yield record

    def logprobs(self, ids: Sequence[int], following: Sequence[int]) -> Vector:
        return self.model.logprobs(ids, following)

    def cancel(self) -> None:
        """Stop a prompt from being read any further, where the engine can; from any thread."""
        session = getattr(getattr(self.model, "engine", None), "session", self.model)
        if hasattr(session, "cancel"):
            session.cancel()

    def close(self) -> None:
        """Give its memory back."""
        session = getattr(getattr(self.model, "engine", None), "session", self.model)
        if hasattr(session, "close"):
            session.close()

    @property
    def pid(self) -> int | None:
        """The engine's own process, if it has one."""
        session = getattr(getattr(self.model, "engine", None), "session", None)
        return getattr(session, "pid", None)


def resident_bytes(pid: int | None = None) -> int:
    """Memory in use by a process (default: this one); 0 where it cannot be read."""
    with suppress(OSError, ValueError, IndexError):
        pages = Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_bytes() -> int:
    """Memory that programs could still take; 0 where it cannot be read."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def read_bandwidth(megabytes: int = 24) -> float:
    """Bytes per second that one thread reads from memory, the best of five."""
    data = np.ones(megabytes << 17, np.float64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best
