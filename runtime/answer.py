"""An answer in the making: what it needs of a session, token by token, and what comes of that."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pocketslm.errors import UsageError
from pocketslm.runtime.backends import (
    DrawingSession,
    Following,
    ForgettingSession,
    GuessingSession,
    Logits,
    Lookup,
    Penalty,
    SavingSession,
    Session,
    TopSession,
    Wanted,
)
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.prefixes import Keeping, shared
from pocketslm.runtime.sampling import (
    chooser_for,
    highest_needed,
    log_sum_exp,
)

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
    """A token that was picked; ``whole``: nothing may follow it."""

    token: int
    logprob: float | None = None
    whole: bool = False


def greedy_step(session: Session) -> Callable[[Sequence[int]], int]:
    """A function that appends tokens and gives the most probable next one.

    It takes the cheapest way that the session has: what ``Model.generate`` runs, and ``bench``
    times.
    """
    if not isinstance(session, TopSession):
        return lambda tokens: int(session.forward(np.asarray(tokens, np.int64))[0].argmax())
    fused = session

    def step(tokens: Sequence[int]) -> int:
        if len(tokens) == 1:
            return fused.step_greedy(tokens[0])
        return int(fused.forward_greedy(np.asarray(tokens, np.int64))[0])

    return step


class _Guesses:
    """What may follow the ids of a generation, from where the last of them stood before.

    ids: grow up to ``end`` of them. most: how many are guessed at a time; None: as many as pay.
    """

    def __init__(
        self, session: GuessingSession, ids: Sequence[int], end: int, most: int | None
    ) -> None:
        self._session, self._ids, self._end = session, ids, end
        self._most = end if most is None else most
        self._prompt = len(ids)
        self._lookup: Lookup | None = None
        self._told = 0  # how many of the ids the lookup knows

    def next(self) -> list[int]:
        """The guesses; none behind the prompt."""
        count = len(self._ids)
        if count == self._prompt or self._most == 0:
            return []
        if not self._told:
            self._lookup = self._session.lookup()
        if self._lookup is None:
            self._most = 0
            return []
        self._lookup.push(self._ids[self._told :])
        self._told = count
        return self._lookup.guess(min(self._most, self._end - count - 1))

    def judge(self, right: int) -> None:
        """Tell how many of the last guesses, also of none, were right."""
        if self._lookup is not None:
            self._lookup.judge(right)


class _Repeated:
    """The penalty of a generation, for sessions that pick the most probable token themselves.

    ids: grow up to ``end`` of them; those from ``start`` on count.
    """

    def __init__(self, factor: float, ids: Sequence[int], start: int, end: int) -> None:
        self._factor, self._ids, self._start = factor, ids, start
        self._seen = np.empty(end - start, np.int32)
        self._told = 0  # how many of the ids stand there

    def with_guesses(self, guessed: Sequence[int]) -> Penalty:
        """The penalty at a call for the last of the ids and these guesses behind them."""
        new = self._ids[self._start + self._told :]
        self._seen[self._told : self._told + len(new)] = new
        self._told += len(new)
        self._seen[self._told : self._told + len(guessed)] = guessed
        return Penalty(self._factor, self._seen[: self._told + len(guessed)])


class Cache:
    """A session that remembers which tokens its context holds, and reuses them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokens: list[int] = []
        self.keeping: Keeping | None = None
        # Of a session that forgets: how many tokens the last prompt had, and the state after them.
        self._snapshot: tuple[int, bytes] | None = None

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
            self.keeping.keep_prompt(self.tokens)


class Answer:
    """A generation in the making: what it needs of the session, and what it makes of that.

    ids: the tokens so far, which grow. wanted, highest: what must be known of the tokens that may
    come next, the most probable one where that is enough. made: how many tokens were.
    """

    def __init__(
        self,
        cache: Cache,
        ids: list[int],
        config: GenerationConfig,
        eos: Collection[int],
        limit: int,
        limiting: Callable[[], Limiting] | None,
    ) -> None:
        self._start = time.perf_counter_ns()
        self.cache, self.ids, self.made = cache, ids, 0
        self._config, self._eos = config, eos
        self._end = len(ids) + limit
        self._limits = limiting() if limiting and config.constraint else None
        if config.constraint and self._limits is None:
            raise UsageError("an answer that is held to something needs Model.generate")
        highest = highest_needed(config) if self._limits is None else None
        self._repeated = None
        fused = isinstance(cache.session, TopSession)
        if config.repetition_penalty > 1 and fused and not config.samples:
            start = 0 if config.penalize_prompt else len(ids)
            self._repeated = _Repeated(config.repetition_penalty, ids, start, self._end)
        picks = highest == 1 or (self._repeated and self._limits is None)
        self.wanted = Wanted.LOGITS
        if picks and not config.logprobs:
            self.wanted = Wanted.NEXT
        elif highest is not None and fused:
            self.wanted = Wanted.TOP
        self.highest = highest or 0
        self._greedy = greedy_step(cache.session)
        if isinstance(cache.session, DrawingSession):
            self._choose_token = cache.session.sampler(config, len(ids))
        else:
            self._choose_token = chooser_for(config, len(ids))
        self._guesses = None
        # What is drawn is seldom what was guessed; a fused head scores one token at a time.
        plain = not config.samples and not config.logprobs
        if plain and isinstance(cache.session, GuessingSession):
            most = config.prompt_lookup_num_tokens
            self._guesses = _Guesses(cache.session, ids, self._end, most)

    def penalty(self, guessed: Sequence[int] = ()) -> Penalty | None:
        """That of the most probable token behind ``ids`` and guesses, where that is wanted."""
        if self.wanted != Wanted.NEXT or self._repeated is None:
            return None
        return self._repeated.with_guesses(guessed)

    def add(self, made: Made) -> Step:
        """The step of a token that was picked."""
        finish: Finish | None = None
        if made.token in self._eos and not self._config.ignore_eos:
            finish = "eos"
        elif made.whole:
            finish = "stop"
        elif len(self.ids) + 1 == self._end:
            finish = "length" if self._config.max_new_tokens else "context"
        self.ids.append(made.token)
        self.made += 1
        return Step(made.token, made.logprob, time.perf_counter_ns() - self._start, finish)

    def pick(self, new: Sequence[int]) -> list[Made]:
        """Append tokens; those that come next, of which the cache holds all but the last."""
        guesses, session = self._guesses, self.cache.session
        guessed = guesses.next() if guesses else []
        made = self._follow(new, guessed)
        right = len(made) - 1
        if guesses:
            if guessed:
                session.truncate(session.length - len(guessed) + right)
            guesses.judge(right)
        self.cache.tokens.extend([*new, *guessed[:right]])
        return made

    def chosen(self, following: Following) -> Made:
        """The token that comes next, by what the session gave for ``wanted``."""
        if self.wanted == Wanted.NEXT:
            assert following.tokens is not None
            return Made(int(following.tokens[0]))
        return self._choose(following)

    def _choose(self, following: Following, guessed: Sequence[int] = ()) -> Made:
        """The token that comes next by its logits; ``guessed``: those behind ``ids`` that were
        right."""
        limits = self._limits
        tokens, logits, total = self._in_order(following)
        # The raw ones say how probable the token was.
        processed = logits.copy() if self._config.logprobs else logits
        if limits:
            limits.apply(processed)
        choice = self._choose_token([*self.ids, *guessed] if guessed else self.ids, processed)
        token = choice if tokens is None else int(tokens[choice])
        if limits:
            limits.advance(token)
        logprob = None if total is None else float(logits[choice]) - total
        return Made(token, logprob, limits is not None and limits.must_end)

    def _in_order(
        self, following: Following
    ) -> tuple[npt.NDArray[np.int32] | None, Logits, float | None]:
        """The same in the order of the vocabulary, and its last part where probabilities are asked
        for."""
        tokens, logits, total = following
        assert logits is not None
        asked = self._config.logprobs
        if tokens is None:
            return None, logits, log_sum_exp(logits) if asked else None
        order = np.argsort(tokens)  # as in the vocabulary, so that a seed draws the same
        return tokens[order], logits[order], total if asked else None

    def _follow(self, new: Sequence[int], guessed: Sequence[int]) -> list[Made]:
        """Append tokens and guesses at the ones behind them; the tokens that follow, up to the
        first that was not guessed."""
        session = self.cache.session
        penalty = self.penalty(guessed)
        if self.wanted == Wanted.NEXT and not guessed and penalty is None:
            return [Made(self._greedy(new))]
        tokens = np.asarray([*new, *guessed], np.int64)
        if self.wanted == Wanted.NEXT:
            assert isinstance(session, TopSession)
            found = session.forward_greedy(tokens, len(guessed) + 1, penalty).tolist()
            right = 0
            while right < len(guessed) and guessed[right] == found[right]:
                right += 1
            return [Made(token) for token in found[: right + 1]]
        if self.wanted == Wanted.TOP:
            assert isinstance(session, TopSession)
            return [self.chosen(Following(*session.forward_top(tokens, self.highest)))]
        rows = session.forward(tokens, all_logits=bool(guessed))[-1 - len(guessed) :]
        made: list[Made] = []
        for at, row in enumerate(rows):
            made.append(self._choose(Following(None, row, None), guessed[:at]))
            if at == len(guessed) or made[-1].token != guessed[at] or made[-1].whole:
                break
        return made
