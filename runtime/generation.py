"""The generation loop: token ids in, token ids out. Text lives one level up, in ``model``."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from operator import index
from typing import Protocol, runtime_checkable

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.runtime import forks
from pocketslm.runtime.answer import Answer, Cache, Keeps, Limiting, Step
from pocketslm.runtime.arrays import np
from pocketslm.runtime.backends import (
    Logits,
    Session,
)
from pocketslm.runtime.config import GenerationConfig


@runtime_checkable
class SelfDriven(Protocol):
    """A session that can also pick tokens by itself, with no logits crossing its border."""

    def generate(
        self, ids: Sequence[int], config: GenerationConfig, eos: Collection[int], limit: int
    ) -> Generator[Step, None, None]:
        """What :meth:`Engine.generate` yields, for at most ``limit`` tokens."""
        ...


def stale() -> UsageError:
    """What a generation is told that was taken from its holder."""
    return UsageError(
        "this generation is stale: the model was used for something else before it ended; end or "
        "close a generation first, or load the model twice"
    )


class Turns:
    """Who may use a session: one generation after the other.

    A turn that another thread has is waited for. One that the same thread left unfinished is taken
    away from its holder, who would be waited for in vain; it is told when it goes on.
    """

    def __init__(self) -> None:
        self.after_fork()
        forks.watch(self)

    def after_fork(self) -> None:
        """Nobody is at work here yet."""
        self._changed = threading.Condition()
        self._holder: object = None
        self._cancelled: object = None  # a holder that is to end
        self._thread = 0  # where the holder was last at work

    @contextmanager
    def turn(self) -> Iterator[object]:
        """Have the session, until the end of the block or until it is taken away."""
        me = threading.get_ident()
        mine = object()
        try:
            with self._changed:
                while self._holder is not None and self._thread != me:
                    self._changed.wait()
                self._holder, self._thread = mine, me
            yield mine
        finally:
            with self._changed:
                if self._holder is mine:
                    self._holder = None
                    self._changed.notify()

    def cancel(self) -> None:
        """Let the turn that somebody has now end."""
        with self._changed:
            self._cancelled = self._holder

    def go_on(self, turn: object) -> bool:
        """False where the turn is to end. Raises UsageError where it was taken away."""
        me = threading.get_ident()
        # Without the lock: only this thread can take the turn from itself, and each token passes.
        if self._holder is turn and self._thread == me:
            return self._cancelled is not turn
        with self._changed:
            if self._holder is not turn:
                raise stale()
            self._thread = me
            return self._cancelled is not turn


@runtime_checkable
class Cancelling(Protocol):
    """A session that ends what it does now, from any thread."""

    def cancel(self) -> None: ...


@runtime_checkable
class Closing(Protocol):
    """A session that gives its memory and threads back before it is collected."""

    def close(self) -> None: ...


class Generating(ABC):
    """A session that texts are generated with, by one caller or several.

    adapter: the number of the one that what is made takes unless it asks for another; 0: none.
    """

    session: Session
    adapter = 0
    _closed = False

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Change the session so that what it holds counts no more."""

    @property
    @abstractmethod
    def caches(self) -> Sequence[Cache]:
        """What the session holds, one for each generation at once."""

    def use_adapter(self, adapter: int) -> None:
        """Take another adapter unless a generation asks for one."""
        with self.exclusive():
            self.adapter = adapter
            for cache in self.caches:
                cache.use_adapter(adapter)

    def keep_with(self, keeps: Keeps | None) -> None:
        """Take states of prompts from a store and put them there, or no more."""
        for cache in self.caches:
            cache.keep_with(keeps)

    @abstractmethod
    def cancel(self) -> None:
        """End what is generated now, after the tokens that are being made; from any thread.

        It has no last step with a finish.
        """

    def close(self) -> None:
        """End the generations that run now and give the session's memory and threads back.

        Later calls raise UsageError; a second close does nothing.
        """
        if self._closed:
            return
        self.cancel()
        with self.exclusive():
            self._closed = True
            if isinstance(self.session, Closing):
                self.session.close()

    def _open(self) -> None:
        if self._closed:
            raise UsageError("this model was closed; load it again")


class Engine(Generating):
    """A session that remembers which tokens its cache holds, and reuses them.

    A prompt that begins as the last sequence did is only prefilled from where it differs: the
    second question about a document does not read the document again. `keep_with` holds more than
    the last sequence, see :mod:`pocketslm.runtime.prefixes`.

    Any thread may generate at any time: generations come after each other, and each gives what it
    would give alone. One that its thread left unfinished ends, with UsageError when it is resumed,
    as soon as the same thread uses the engine otherwise; threads that wait for it go on when it is
    closed.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.cache = Cache(session)
        self._turns = Turns()

    parallel = 1  # generations at once; see :class:`pocketslm.runtime.batching.Batch`

    @property
    def follows_by_itself(self) -> bool:
        """Whether the session generates without this loop, and without a ``limiting``."""
        return isinstance(self.session, SelfDriven)

    def generate(
        self,
        tokens: Sequence[int],
        config: GenerationConfig,
        eos_token_ids: Collection[int],
        limiting: Callable[[], Limiting] | None = None,
        adapter: int | None = None,
    ) -> Generator[Step, None, None]:
        """Yield a step for each new token after the prompt ``tokens``, until a finish.

        limiting: makes what holds the answer to the configuration's constraint. adapter: the number
        of the one that it takes, None: the one that is used otherwise. The last step has
        ``finish`` set. Raises UsageError for an empty or odd prompt and ContextOverflowError,
        before anything runs, where prompt and max_new_tokens do not fit; BackendError where the
        model computes NaN or infinity.
        """
        self._open()
        ids = whole(tokens)
        limit = new_limit(self.session, len(ids), config)
        return self._in_turn(self._steps(ids, config, eos_token_ids, limit, limiting, adapter))

    def logits(self, ids: Sequence[int]) -> Logits:
        """Bring the cache to exactly ``ids``; the logits [V] of what may come next."""
        with self._turns.turn():
            return self._read(whole(ids))

    def logprobs(self, ids: Sequence[int], following: Sequence[int]) -> Logits:
        """Read ``ids``; how probable each of the tokens is that follow them, as natural logarithms.

        What a text shares with the one before it is not read again. Raises UsageError where either
        is empty, and ContextOverflowError.
        """
        from pocketslm.runtime.sampling import log_sum_exp  # with numpy

        self._open()
        known, wanted = whole(ids), whole(following)
        if not known or not wanted:
            raise UsageError("a text and what follows it need at least one token each")
        with self._turns.turn():
            self.cache.use_adapter(self.adapter)
            new = self.cache.rewind(known)
            if len(new) > 1:
                self.session.forward(np.asarray(new[:-1], np.int64))
                self.cache.tokens = known[:-1]
            last = np.asarray([new[-1], *wanted[:-1]], np.int64)
            logits = self.session.forward(last, all_logits=True)
            self.cache.tokens = known + wanted[:-1]
            given = logits[np.arange(len(wanted)), wanted]
            return given - np.asarray([log_sum_exp(row) for row in logits], np.float32)

    @property
    def caches(self) -> Sequence[Cache]:
        return (self.cache,)

    def keep_prefix(self, tokens: Sequence[int], name: str) -> bool:
        """Read the beginning of prompts and keep its state; whether there was place for it."""
        self._open()
        if not (ids := whole(tokens)):
            raise UsageError("the prefix is empty, expected at least one token")
        with self._turns.turn():
            self.cache.use_adapter(self.adapter)
            keeping = self.cache.keeping
            if keeping is None:
                raise UsageError("there is no place for prefixes; load the model with prefixes=")
            if keeping.keeps(ids, name):
                return True
            self._read(ids)
            return keeping.keep(ids, name)

    def _read(self, ids: Sequence[int]) -> Logits:
        self.cache.use_adapter(self.adapter)
        new = self.cache.rewind(ids)
        logits: Logits = self.session.forward(np.asarray(new, np.int64))[0]
        self.cache.tokens = list(ids)
        return logits

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Change the session so that what its cache holds counts no more."""
        self._open()
        with self._turns.turn():
            self.cache.tokens.clear()
            yield

    def cancel(self) -> None:
        """End the generation that runs now, after the token that is being made; from any thread.

        It has no last step with a finish.
        """
        self._turns.cancel()
        if isinstance(self.session, Cancelling):
            self.session.cancel()

    def _in_turn(self, steps: Generator[Step | None, None, None]) -> Generator[Step, None, None]:
        """The same steps, the last of them when the turn is over; None only asks to go on."""
        last = None
        with self._turns.turn() as turn, closing(steps):
            for step in steps:
                if step and step.finish:
                    last = step
                    break
                if step:
                    yield step
                if not self._turns.go_on(turn):
                    break
        if last:
            yield last

    def _steps(
        self,
        ids: list[int],
        config: GenerationConfig,
        eos: Collection[int],
        limit: int,
        limiting: Callable[[], Limiting] | None,
        adapter: int | None,
    ) -> Generator[Step | None, None, None]:
        if isinstance(self.session, SelfDriven):
            self.cache.tokens.clear()
            yield from self.session.generate(ids, config, eos, limit)
            return
        number = self.adapter if adapter is None else adapter
        answer = Answer(self.cache, ids, config, eos, limit, limiting, number)
        while True:
            yield from answer.make() or (None,)


def whole(ids: Sequence[int]) -> list[int]:
    """The ids, as plain integers; an array of floats would be cut to them without a word."""
    try:
        return [index(id_) for id_ in ids]
    except TypeError as error:
        raise UsageError(f"token ids must be whole numbers: {error}") from None


def new_limit(session: Session, prompt: int, config: GenerationConfig) -> int:
    """How many tokens may be generated after ``prompt`` of them.

    Raises UsageError and ContextOverflowError.
    """
    context = session.context
    if prompt == 0:
        raise UsageError("the prompt is empty, expected at least one token")
    room = context - prompt
    asked = config.max_new_tokens
    if room < 1 or (asked is not None and asked > room):
        wanted = f" and {asked} new ones" if asked is not None else ""
        raise ContextOverflowError(
            f"{prompt} prompt tokens{wanted} do not fit the context of {context}; shorten the "
            "prompt, lower --max-new-tokens or export with a longer --context"
        )
    return asked or room
