"""The generation loop: token ids in, token ids out. Text lives one level up, in ``model``."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pocketslm.errors import ContextOverflowError, UsageError
from pocketslm.runtime.backends import ForgettingSession, Logits, Session, TopSession
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.sampling import (
    highest_needed,
    log_sum_exp,
    processors_for,
    sampler_for,
)

# Why a generation ended: the model said so, a stop string came, max_new_tokens or the context.
Finish = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token.

    logprob: natural log of its probability under the model, before any processor. time_ns: since
    generation was asked for; the first step's is the time to first token (TTFT).
    """

    token: int
    logprob: float
    time_ns: int
    finish: Finish | None = None


@runtime_checkable
class SelfDriven(Protocol):
    """A session that can also pick tokens by itself, with no logits crossing its border."""

    def can_generate(self, config: GenerationConfig) -> bool: ...

    def generate(
        self, ids: Sequence[int], config: GenerationConfig, eos: Collection[int], limit: int
    ) -> Iterator[Step]:
        """What :meth:`Engine.generate` yields, for at most ``limit`` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Logits of the tokens that may come next.

    tokens: their ids, in ascending order; None where there is a logit for each of the vocabulary.
    log_total: the logarithm of the sum of exp over all logits of the vocabulary.
    """

    logits: Logits
    tokens: npt.NDArray[np.int32] | None
    log_total: float


class Engine:
    """A session that remembers which tokens its cache holds, and reuses them.

    A prompt that begins as the last sequence did is only prefilled from where it differs: the
    second question about a document does not read the document again.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.cached: list[int] = []
        # Of a session that forgets: how many tokens the last prompt had, and the state after them.
        self._snapshot: tuple[int, bytes] | None = None

    def generate(
        self, tokens: Sequence[int], config: GenerationConfig, eos_token_ids: Collection[int]
    ) -> Iterator[Step]:
        """Yield a step for each new token after the prompt ``tokens``, until a finish.

        The last step has ``finish`` set. Raises UsageError for an empty prompt and
        ContextOverflowError, before anything runs, where prompt and max_new_tokens do not fit.
        """
        limit = self._limit(len(tokens), config)
        if isinstance(self.session, SelfDriven) and self.session.can_generate(config):
            self.cached = []
            return self.session.generate(tokens, config, eos_token_ids, limit)
        return self._steps(list(tokens), config, eos_token_ids, limit)

    def logits(self, ids: Sequence[int]) -> Logits:
        """Bring the cache to exactly ``ids``; the logits [V] of what may come next."""
        return self._scorer(None)(self._rewind(ids)).logits

    def _steps(
        self, ids: list[int], config: GenerationConfig, eos: Collection[int], limit: int
    ) -> Iterator[Step]:
        start = time.perf_counter_ns()
        processors, sample = processors_for(config, len(ids)), sampler_for(config)
        score = self._scorer(highest_needed(config))
        scores = score(self._rewind(ids))
        for count in range(1, limit + 1):
            processed = scores.logits.copy() if processors else scores.logits
            for process in processors:
                processed = process(ids, processed)
            choice = sample(processed)
            token = choice if scores.tokens is None else int(scores.tokens[choice])
            finish: Finish | None = None
            if token in eos and not config.ignore_eos:
                finish = "eos"
            elif count == limit:
                finish = "length" if config.max_new_tokens else "context"
            logprob = float(scores.logits[choice]) - scores.log_total
            yield Step(token, logprob, time.perf_counter_ns() - start, finish)
            if finish:
                return
            if count == 1:
                self._remember()
            ids.append(token)
            scores = score([token])

    def _rewind(self, ids: Sequence[int]) -> Sequence[int]:
        """Cut the cache to what it shares with ``ids``; the rest of them, at least one."""
        shared = 0
        for ours, theirs in zip(self.cached, ids, strict=False):
            if ours != theirs:
                break
            shared += 1
        # The last token must run, for its logits.
        keep = self._cut(min(shared, len(ids) - 1))
        del self.cached[keep:]
        return ids[keep:]

    def _cut(self, length: int) -> int:
        """Cut the session back to its first ``length`` tokens, or to fewer of them where it has
        forgotten what it knew then; how many there are."""
        session = self.session
        if self._snapshot is not None and self._snapshot[0] > length:
            self._snapshot = None  # of other tokens, or other weights
        if isinstance(session, ForgettingSession) and length < session.rewind_limit:
            if self._snapshot is not None:
                session.restore(*self._snapshot)
                return self._snapshot[0]
            length = 0
        session.truncate(length)
        return length

    def _remember(self) -> None:
        """Keep the state after a prompt, if the session will not find its way back."""
        session = self.session
        if isinstance(session, ForgettingSession) and session.rewind_limit > 1:
            self._snapshot = session.length, session.save()

    def _scorer(self, highest: int | None) -> Callable[[Sequence[int]], Scores]:
        """A function that appends tokens and scores the next one, by the ``highest`` logits only
        where that is enough and the session's head picks them out by itself."""
        session = self.session

        def all_of_them(ids: Sequence[int]) -> Scores:
            logits = session.forward(np.asarray(ids, np.int64))[0]
            self.cached.extend(ids)
            return Scores(logits, None, log_sum_exp(logits))

        def top(ids: Sequence[int]) -> Scores:
            assert isinstance(session, TopSession)
            assert highest is not None
            tokens, logits, log_total = session.forward_top(np.asarray(ids, np.int64), highest)
            self.cached.extend(ids)
            order = np.argsort(tokens)  # as in the vocabulary, so that a seed draws the same
            return Scores(logits[order], tokens[order], log_total)

        fused = isinstance(session, TopSession) and highest is not None
        return top if fused else all_of_them

    def _limit(self, prompt: int, config: GenerationConfig) -> int:
        """How many tokens may be generated."""
        context = self.session.context
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
