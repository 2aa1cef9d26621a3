"""Several generations at once: the tokens of all of them go through the model together.

Weights are read once for all, so that four answers take little more time than one. Nobody runs in
the background: of those who wait for a token, one makes the next step for all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager

from pocketslm.errors import PocketSlmError, UsageError
from pocketslm.runtime import forks
from pocketslm.runtime.answer import Answer, Cache, Limiting, Made, Step
from pocketslm.runtime.backends import SlotSession
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.generation import Generating, new_limit, stale, whole

# Steps that an answer may be ahead of whoever reads it.
AHEAD = 4


class _Seat:
    """A generation that has a slot.

    ready: what is made and not yet read; None: a part of the prompt was read. over: nothing more is
    to be made; error: why, where that is one.
    """

    def __init__(self, slot: int, answer: Answer) -> None:
        self.slot, self.answer = slot, answer
        self.ready: deque[Step | None] = deque()
        self.over = False
        self.error: BaseException | None = None
        self.thread = threading.get_ident()  # where it was last read

    def fail(self, error: BaseException) -> None:
        self.over, self.error = True, error

    def add(self, made: list[Made] | PocketSlmError) -> None:
        """Take what came of a step."""
        if isinstance(made, PocketSlmError):
            self.fail(made)
            return
        steps = self.answer.take(made)
        self.over |= any(step.finish for step in steps)
        self.ready.extend(steps)
        if not self.ready:
            self.ready.append(None)


class Batch(Generating):
    """What :class:`pocketslm.runtime.generation.Engine` is, for several generations at once.

    Each gives the tokens that it would give alone. As many run as the session has slots; others
    wait until one ends. A prompt goes to the slot that holds most of its beginning. A generation
    that its thread left unfinished ends, with UsageError when it is resumed, where the same thread
    would wait for it.
    """

    session: SlotSession
    follows_by_itself = False

    def __init__(self, session: SlotSession) -> None:
        self.session = session
        self._slots = [Cache(slot) for slot in session.slots]
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """Nobody is at work here yet."""
        self._changed = threading.Condition()
        self._seats: list[_Seat] = []
        self._free = list(range(len(self._slots)))  # the one that was used last comes last
        self._joining = 0  # who waits for a slot goes before the next step
        self._busy = False  # somebody uses the session

    @property
    def parallel(self) -> int:
        """How many generations run at once."""
        return len(self._slots)

    def generate(
        self,
        tokens: Sequence[int],
        config: GenerationConfig,
        eos_token_ids: Collection[int],
        limiting: Callable[[], Limiting] | None = None,
        adapter: int | None = None,
    ) -> Generator[Step | None, None, None]:
        """What :meth:`pocketslm.runtime.generation.Engine.generate` yields, and None where what
        comes next is still to be made, by a step for all."""
        self._open()
        ids = whole(tokens)
        limit = new_limit(self.session, len(ids), config)
        return self._steps(ids, config, eos_token_ids, limit, limiting, adapter)

    @property
    def caches(self) -> Sequence[Cache]:
        return self._slots

    def keep_prefix(self, tokens: Sequence[int], name: str) -> bool:
        """Raises UsageError: whose slot would it be?"""
        raise UsageError("a model of several answers at once keeps no prefix by name; load another")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Change the session so that what its slots hold counts no more."""
        self._open()
        with self._changed:
            self._end([seat for seat in self._seats if seat.thread == threading.get_ident()])
            while self._busy or self._seats:
                self._changed.wait()
            self._busy = True
        try:
            for cache in self._slots:
                cache.tokens.clear()
            yield
        finally:
            self._release()

    def cancel(self) -> None:
        """End all generations that run now, after the tokens that are being made; from any thread.

        They have no last step with a finish.
        """
        with self._changed:
            for seat in self._seats:
                seat.over = True
            self._changed.notify_all()

    def _steps(
        self,
        ids: list[int],
        config: GenerationConfig,
        eos: Collection[int],
        limit: int,
        limiting: Callable[[], Limiting] | None,
        adapter: int | None,
    ) -> Generator[Step | None, None, None]:
        number = self.adapter if adapter is None else adapter

        def begin(cache: Cache) -> Answer:
            return Answer(cache, ids, config, eos, limit, limiting, number)

        seat = self._join(ids, number, begin)
        last = None
        try:
            while self._wait(seat):
                step = seat.ready.popleft()
                if step and step.finish:
                    last = step
                    break
                yield step
                if step and not seat.ready:
                    yield None
        finally:
            self._leave(seat)
        if last:
            yield last

    def _join(self, ids: Sequence[int], adapter: int, begin: Callable[[Cache], Answer]) -> _Seat:
        """Wait for a slot, and take the best for these tokens."""
        with self._changed:
            self._joining += 1
            try:
                while self._busy or not self._free:
                    mine = [seat for seat in self._seats if seat.thread == threading.get_ident()]
                    if mine and not self._free:
                        self._end(mine[:1])
                    else:
                        self._changed.wait()
                self._busy = True
            finally:
                self._joining -= 1
                self._changed.notify_all()
        try:
            self._open()

            def serves(slot: int) -> tuple[bool, int]:
                cache = self._slots[slot]
                same = cache.adapter == adapter
                return same, cache.shared(ids) if same else 0

            slot = max(self._free, key=serves)
            cache = self._slots[slot]
            seat = _Seat(slot, begin(cache))
            with self._changed:
                self._free.remove(slot)
                self._seats.append(seat)
            return seat
        finally:
            self._release()

    def _leave(self, seat: _Seat) -> None:
        with self._changed:
            if seat in self._seats:  # else it was taken away
                self._seats.remove(seat)
                self._free.append(seat.slot)
                self._changed.notify_all()

    def _end(self, seats: Sequence[_Seat]) -> None:
        """Take their slots from generations of this thread, which would be waited for in vain."""
        for seat in seats:
            seat.fail(stale())
            self._leave(seat)

    def _release(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _wait(self, seat: _Seat) -> bool:
        """Wait until something is ready, made for all if need be; False where it was cancelled."""
        seat.thread = threading.get_ident()
        while True:
            with self._changed:
                while self._busy or (self._joining and self._free):
                    if seat.ready or seat.over:
                        break
                    self._changed.wait()
                if seat.ready:
                    return True
                if seat.error:
                    raise seat.error
                if seat.over:
                    return False
                self._busy = True
                going = [s for s in self._seats if not s.over and len(s.ready) < AHEAD]
            try:
                self._advance(going)
            except BaseException as error:  # what was being made is in no known state
                for one in going:
                    one.fail(error)
                raise
            finally:
                self._release()

    def _advance(self, seats: Sequence[_Seat]) -> None:
        """One step of these: tokens for each of the answers, and a part of the prompts."""
        for seat in seats:
            seat.answer.remember()
        found = self.session.make([seat.answer.maker for seat in seats])
        for seat, made in zip(seats, found, strict=True):
            seat.add(made)
