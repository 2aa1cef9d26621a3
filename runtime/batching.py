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
from pocketslm.runtime.backends import Part, Session, SlotSession, Wanted
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.generation import Generating, new_limit, stale, whole
from pocketslm.runtime.prefixes import Keeping

# Tokens of a step while answers are made: what is not theirs is for prompts, but some always are.
# Eight take two to three times as long as one.
STEP, LEAST_PROMPT = 8, 4
# Of a prompt that nobody's answer waits for.
PROMPT = 256
# Steps that an answer may be ahead of whoever reads it.
AHEAD = 4


class _Seat:
    """A generation that has a slot.

    new: tokens that are to be appended, at first those of the prompt. ready: what is made and not
    yet read. over: nothing more is to be made; error: why, where that is one.
    """

    def __init__(self, slot: int, answer: Answer, new: Sequence[int]) -> None:
        self.slot, self.answer, self.new = slot, answer, list(new)
        self.ready: deque[Step] = deque()
        self.over = False
        self.error: BaseException | None = None
        self.thread = threading.get_ident()  # where it was last read

    def fail(self, error: BaseException) -> None:
        self.over, self.error = True, error

    def add(self, made: Made) -> None:
        """Take a token that was made."""
        step = self.answer.add(made)
        self.ready.append(step)
        self.new = [made.token]
        self.over |= step.finish is not None
        if self.answer.made == 1 and not self.over:
            self.answer.cache.remember()

    def part(self, most: int) -> Part:
        """Its next tokens, at most so many of them."""
        tokens, answer = self.new[:most], self.answer
        last = len(tokens) == len(self.new)
        return Part(
            self.slot,
            tokens,
            answer.wanted if last else Wanted.NOTHING,
            answer.highest if last else 0,
            answer.penalty() if last else None,
        )


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
    ) -> Generator[Step, None, None]:
        """See :meth:`pocketslm.runtime.generation.Engine.generate`."""
        self._open()
        ids = whole(tokens)
        limit = new_limit(self.session, len(ids), config)
        return self._steps(ids, config, eos_token_ids, limit, limiting)

    def keep_with(self, keeping: Callable[[Session], Keeping] | None) -> None:
        """See :meth:`pocketslm.runtime.generation.Engine.keep_with`."""
        for cache in self._slots:
            cache.keeping = keeping(cache.session) if keeping else None

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
    ) -> Generator[Step, None, None]:
        seat = self._join(ids, lambda cache: Answer(cache, ids, config, eos, limit, limiting))
        try:
            while (step := self._next(seat)) and not step.finish:
                yield step
        finally:
            self._leave(seat)
        if step:
            yield step

    def _join(self, ids: Sequence[int], begin: Callable[[Cache], Answer]) -> _Seat:
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
            slot = max(self._free, key=lambda slot: self._slots[slot].shared(ids))
            cache = self._slots[slot]
            seat = _Seat(slot, begin(cache), cache.rewind(ids))
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

    def _next(self, seat: _Seat) -> Step | None:
        """The next step of a generation, None where it was cancelled; made for all, if need be."""
        seat.thread = threading.get_ident()
        while True:
            with self._changed:
                while self._busy or (self._joining and self._free):
                    if seat.ready or seat.over:
                        break
                    self._changed.wait()
                if seat.ready:
                    return seat.ready.popleft()
                if seat.error:
                    raise seat.error
                if seat.over:
                    return None
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
        """One step of these: a token for each of the answers, and a part of the prompts."""
        answers = [seat for seat in seats if len(seat.new) == 1]
        room = max(LEAST_PROMPT, STEP - len(answers)) if answers else PROMPT
        if len(seats) == 1 and len(seats[0].new) <= PROMPT:
            self._pick(seats[0])
            return
        parts = [(seat, seat.part(1)) for seat in answers]
        for seat in seats:
            if len(seat.new) > 1 and room:
                part = seat.part(room)
                room -= len(part.tokens)
                parts.append((seat, part))
        self._run(parts)

    def _pick(self, seat: _Seat) -> None:
        """The next tokens of the only answer that is made, perhaps several by guesses."""
        try:
            for made in seat.answer.pick(seat.new):
                seat.add(made)
                if seat.over:
                    return
        except PocketSlmError as error:
            seat.fail(error)

    def _run(self, parts: Sequence[tuple[_Seat, Part]]) -> None:
        """Run tokens of several; what is wrong with one of them is not the others' error."""
        try:
            found = self.session.forward_slots([part for _, part in parts])
        except PocketSlmError as error:
            for seat, part in parts:
                cache = seat.answer.cache
                if len(parts) == 1 or cache.session.length < len(cache.tokens):  # it was emptied
                    seat.fail(error)
                else:
                    self._run([(seat, part)])
            return
        for (seat, part), following in zip(parts, found, strict=True):
            seat.answer.cache.tokens.extend(part.tokens)
            if part.wanted == Wanted.NOTHING:
                seat.new = seat.new[len(part.tokens) :]
                continue
            try:
                seat.add(seat.answer.chosen(following))
            except PocketSlmError as error:
                seat.fail(error)
