"""An answer in the making: what it needs of a session, token by token, and what comes of that."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, Protocol

from pocketslm.errors import UsageError
from pocketslm.runtime.backends import (
    AdapterSession,
    ForgettingSession,
    Logits,
    Maker,
    MakingSession,
    SavingSession,
    Session,
)
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.prefixes import Keeping, shared

# Why a generation ended: the model said so; a stop string came, or nothing may follow by what the
# answer is held to; max_new_tokens; or the context.
Finish = Literal["eos", "stop", "length", "context"]


class Step(NamedTuple):
    """One generated token.

    logprob: natural log of its probability under the model, before any processor; None where
    `GenerationConfig.logprobs` did not ask for it. time_ns: since the first step was asked for; the
    first one's is the time to first token (TTFT).
    """

    token: int
    logprob: float | None
    time_ns: int
    finish: Finish | None = None


class Limiting(Protocol):
    """What an answer is held to; see :class:`pocketslm.runtime.constraint.Constraint`."""

    def apply(self, logits: Logits) -> None:
        """Set the logits [V] of tokens that may not be next to minus infinity, in place."""
        ...

    def advance(self, token: int) -> None:
        """Go on behind a token."""
        ...

    @property
    def must_end(self) -> bool:
        """Whether nothing may follow."""
        ...


class Made(NamedTuple):
    """A token that a session made; see Step."""

    token: int
    logprob: float | None = None
    finish: Finish | None = None


# What a session keeps with which adapter.
Keeps = Callable[[Session, int], Keeping]


class Cache:
    """A session that remembers which tokens its context holds, and reuses them.

    adapter: the number of the one that it takes, 0: none.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokens: list[int] = []
        self.adapter = 0
        self.keeping: Keeping | None = None
        self._keeps: Keeps | None = None
        # Of a session that forgets: how many tokens the last prompt had, and the state after them.
        self._snapshot: tuple[int, bytes] | None = None

    def keep_with(self, keeps: Keeps | None) -> None:
        """Take states of prompts from a store and put them there, or no more."""
        self._keeps = keeps
        self.keeping = keeps(self.session, self.adapter) if keeps else None

    def use_adapter(self, adapter: int) -> None:
        """Take an adapter from now on; what the context holds came of other weights then."""
        if adapter == self.adapter:
            return
        assert isinstance(self.session, AdapterSession)
        self.session.use_adapter(adapter)
        self.adapter, self._snapshot = adapter, None
        self.tokens = []
        self.keep_with(self._keeps)

    def shared(self, ids: Sequence[int]) -> int:
        """How many tokens at its beginning are those of ``ids``."""
        del self.tokens[self.session.length :]  # a call that failed may have emptied the session
        return shared(self.tokens, ids)

    def rewind(self, ids: Sequence[int]) -> Sequence[int]:
        """Cut the context to what it shares with ``ids``; the rest of them, at least one."""
        # The last token must run, for its logits.
        keep = min(self.shared(ids), len(ids) - 1)
        if self.keeping is not None:
            recalled = self.keeping.recall(ids, self.tokens, self._reach(keep))
            if recalled is not None:
                self.tokens, self._snapshot = recalled, None
                keep = min(self.shared(ids), len(ids) - 1)
        keep = self._cut(keep)
        del self.tokens[keep:]
        return ids[keep:]

    def _reach(self, length: int) -> int:
        """How many of its first ``length`` tokens the session can go back to."""
        if not self._forgot(length):
            return length
        found = self._snapshot[0] if self._snapshot is not None else 0
        return found if found <= length else 0

    def _forgot(self, length: int) -> bool:
        """Whether the session knows no more what it knew after ``length`` tokens."""
        session = self.session
        return isinstance(session, ForgettingSession) and length < session.rewind_limit

    def _cut(self, length: int) -> int:
        """Cut the session back to its first ``length`` tokens, or to fewer of them where it has
        forgotten what it knew then; how many there are."""
        session, reach = self.session, self._reach(length)
        if self._snapshot is not None and self._snapshot[0] > length:
            self._snapshot = None  # of other tokens, or other weights
        if self._snapshot and self._forgot(length) and isinstance(session, SavingSession):
            session.restore(*self._snapshot)
        else:
            session.truncate(reach)
        return reach

    def remember(self) -> None:
        """Keep the state after a prompt, if the session will not find its way back, or a later
        process shall."""
        session = self.session
        forgets = isinstance(session, ForgettingSession) and session.rewind_limit > 1
        if forgets and isinstance(session, SavingSession):
            self._snapshot = session.length, session.save()
        if self.keeping is not None:
            self.keeping.keep_prompt(self.tokens[: session.length])


class Answer:
    """A generation in the making: in a session that makes texts by itself, or by
    :class:`pocketslm.runtime.loop.Loop`.

    ids: the tokens so far, which grow, as those of the cache.
    """

    def __init__(
        self,
        cache: Cache,
        ids: list[int],
        config: GenerationConfig,
        eos: Collection[int],
        limit: int,
        limiting: Callable[[], Limiting] | None,
        adapter: int = 0,
    ) -> None:
        self._start = time.perf_counter_ns()
        self.cache, self.ids = cache, ids
        self._prompt: int | None = len(ids)  # until its state is kept
        limits = limiting() if limiting and config.constraint else None
        if config.constraint and limits is None:
            raise UsageError("an answer that is held to something needs Model.generate")
        cache.use_adapter(adapter)
        new = cache.rewind(ids)
        session = cache.session
        self.maker: Maker
        if isinstance(session, MakingSession):
            self.maker = session.maker(ids, config, eos, limit, limits)
        else:
            from pocketslm.runtime.loop import Loop  # with numpy

            self.maker = Loop(session, ids, new, config, eos, limit, limits)
        cache.tokens = ids

    def remember(self) -> None:
        """Before more is made: keep the state after the prompt once, where that is wanted."""
        if self._prompt is not None and len(self.ids) > self._prompt:
            self._prompt = None
            self.cache.remember()

    def take(self, made: Sequence[Made]) -> list[Step]:
        """The steps of tokens that were made."""
        now = time.perf_counter_ns() - self._start
        steps = []
        for token, logprob, finish in made:
            self.ids.append(token)
            steps.append(Step(token, logprob, now, finish))
        return steps

    def make(self) -> list[Step]:
        """The next steps; none where a part of the prompt was read."""
        self.remember()
        return self.take(self.maker.make())
