"""A model and who waits for it: one thread makes the answers of all that have a seat."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model, Record, Reply, TextModel
from pocketslm.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Limits:
    """Of one server.

    body: bytes of a request. waiting: requests that a model answers and that wait for it. seconds:
    of one answer, its waiting included. tokens: of one answer.
    """

    body: int = 4 << 20
    waiting: int = 16
    seconds: float = 600.0
    tokens: int = 4096


class _Stopping:
    """A TextModel whose generations fail once it is over."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.name, self.backend, self.context = model.name, model.backend, model.context
        self.tokenizer: Tokenizer = model.tokenizer
        self.over = threading.Event()

    def generate(
        self, prompt: str | Sequence[int], config: GenerationConfig | None = None
    ) -> Iterator[Record]:
        with closing(self._model.generate(prompt, config)) as records:  # type: ignore[type-var]
            for record in records:
                if self.over.is_set():
                    raise TimeoutError
                yield record


class _End:
    """Nothing more comes of an answer."""


# What comes of an answer next: a token, why there is none, or nothing more.
_Outcome = Record | Exception | _End


class _Making:
    """An answer in the making. The line's thread makes it, one task of the event loop reads it."""

    def __init__(self, start: Callable[[], Iterator[Record | None]]) -> None:
        self._start = start
        self.over = False  # nobody reads it any more
        self.records: list[Record] = []  # what came and was not read
        self.error: Exception | None = None
        self.came = asyncio.Event()
        self.ended = asyncio.Event()

    def steps(self) -> Iterator[_Outcome | None]:
        """In the line's thread: what comes of it, None where that is still to be made."""
        try:
            with closing(self._start()) as records:  # type: ignore[type-var]
                for record in records:
                    yield record
                    if self.over:
                        break
        except Exception as error:
            yield error
        yield _End()

    def give(self, outcome: _Outcome) -> None:
        """In the event loop: what came of it."""
        if isinstance(outcome, Record):
            self.records.append(outcome)
        elif isinstance(outcome, _End):
            self.ended.set()
        else:
            self.error = outcome
        self.came.set()


def _give(outcomes: Sequence[tuple[_Making, _Outcome]]) -> None:
    for making, outcome in outcomes:
        making.give(outcome)


class Line:
    """A model and who waits for it: as many answers at once as it makes."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.waiting = 0
        self._seats = asyncio.Semaphore(model.parallel)
        # One makes the answers, the others those with tools.
        self._threads = ThreadPoolExecutor(model.parallel + 1, "pocketslm-answer")
        self._lock = threading.Lock()
        self._fresh: list[_Making] = []  # that the thread does not know yet
        self._works = False

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Have a seat at the model, until the time that is given.

        Raises HTTPException where too many wait, and TimeoutError.
        """
        if self.waiting >= self.limits.waiting:
            raise HTTPException(503, "the server is busy; try again later")
        until = time.monotonic() + self.limits.seconds
        self.waiting += 1
        try:
            await asyncio.wait_for(self._seats.acquire(), self.limits.seconds)
            try:
                yield until
            finally:
                self._seats.release()
        finally:
            self.waiting -= 1

    async def records(
        self, start: Callable[[], Iterator[Record | None]], until: float
    ) -> AsyncGenerator[list[Record], None]:
        """Records made in the line's thread, at each time all that came since the last.

        Leaving the iterator early ends them. Raises TimeoutError.
        """
        loop = asyncio.get_running_loop()
        making = _Making(start)
        self._make(making, loop)
        # One timer for all: to wait for each record with one of its own costs more than to send it.
        late = loop.call_later(until - time.monotonic(), making.give, TimeoutError())
        try:
            while True:
                await making.came.wait()
                making.came.clear()
                if making.records:
                    records, making.records = making.records, []
                    yield records
                if making.error is not None:
                    raise making.error
                if making.ended.is_set():
                    return
        finally:
            late.cancel()
            making.over = True
            await making.ended.wait()  # the seat is free only then

    async def reply(self, make: Callable[[TextModel], Reply], until: float) -> Reply:
        """A reply made in a thread, which a cancel ends. Raises TimeoutError."""
        model = _Stopping(self.model)
        working = asyncio.get_running_loop().run_in_executor(self._threads, make, model)
        try:
            return await asyncio.wait_for(asyncio.shield(working), until - time.monotonic())
        finally:
            model.over.set()
            await asyncio.wait([working])  # as above

    def _make(self, making: _Making, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._fresh.append(making)
            if self._works:
                return
            self._works = True
        self._threads.submit(self._work, loop)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make a step of each answer in turn, as long as there are any.

        The event loop hears of a round at once, and tells the clients while the next is made: to
        wake it for each token would take longer than to make one.
        """
        going: dict[_Making, Iterator[_Outcome | None]] = {}
        while True:
            with self._lock:
                going |= {making: making.steps() for making in self._fresh}
                self._fresh.clear()
                if not going:
                    self._works = False
                    return
            outcomes: list[tuple[_Making, _Outcome]] = []
            for making, steps in list(going.items()):
                for outcome in steps:
                    if outcome is None:
                        break
                    outcomes.append((making, outcome))
                    if self.model.parallel == 1:
                        break
                else:
                    del going[making]
            if outcomes:
                loop.call_soon_threadsafe(_give, outcomes)
