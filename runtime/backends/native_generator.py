"""Texts that the native engine makes by itself: ``pslm_generator`` of its C border."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pocketslm.errors import PocketSlmError, UsageError
from pocketslm.runtime.answer import Finish, Made
from pocketslm.runtime.backends import check_vocabulary
from pocketslm.runtime.backends.native_library import ErrorText, Generation, Turn
from pocketslm.runtime.config import MOST_TOKENS, GenerationConfig

if TYPE_CHECKING:
    from pocketslm.runtime.backends.native import NativeSession
    from pocketslm.runtime.constraint import Constraint

MOST_GUESSES = 7
_FINISHES: tuple[Finish | None, ...] = (None, "eos", "stop", "length", "context")


def options_of(config: GenerationConfig) -> Generation:
    """What the engine reads of a configuration; a seed is drawn where there is none."""
    options = Generation(top_p=1.0, repetition_penalty=config.repetition_penalty)
    options.spare_prompt, options.logprobs = not config.penalize_prompt, config.logprobs
    guesses = config.prompt_lookup_num_tokens
    options.guesses = MOST_GUESSES if guesses is None else min(guesses, MOST_GUESSES)
    if config.samples:
        options.temperature, options.top_k = config.temperature, min(config.top_k, MOST_TOKENS)
        options.top_p, options.min_p = config.top_p, config.min_p
        options.typical_p = config.typical_p
        options.seed = (
            int.from_bytes(os.urandom(8), "little") if config.seed is None else config.seed
        )
    return options


class NativeGenerator:
    """See :class:`pocketslm.runtime.backends.Maker`: a text in a slot of a session.

    What else is done with the slot ends it. Raises UsageError for token ids that are none.
    """

    def __init__(
        self,
        session: NativeSession,
        ids: Sequence[int],
        config: GenerationConfig,
        eos: Collection[int],
        limit: int,
        constraint: Constraint | None,
    ) -> None:
        self._session, self._constraint = session, constraint  # which must outlive it
        self.error = ErrorText()
        self.handle = ctypes.c_void_p()
        check_vocabulary(session, ids)
        ends = array("i", [] if config.ignore_eos else sorted(eos))
        options = options_of(config)
        options.max_tokens = limit
        options.ends, options.end_count = ends.buffer_info()
        options.constraint = constraint.handle if constraint else None
        self._scored = config.logprobs
        self._limited: Finish = "length" if config.max_new_tokens else "context"
        session.begin(self, array("i", ids), options)
        # For steps of this text alone, so that little is done for each.
        self._turn = Turn(generator=self.handle, error=self.error.argument)
        self._turn_argument, self._first = ctypes.byref(self._turn), self._turn.made[0]

    def make(self) -> list[Made]:
        """See :class:`pocketslm.runtime.backends.Maker`."""
        turn, first = self._turn, self._first
        self._session.make_one(self, self._turn_argument)
        if turn.count == 1 and not (turn.status or first.finish or self._scored):
            return [Made(first.token)]
        made = self.made(turn)
        if isinstance(made, PocketSlmError):
            raise made
        return made

    def made(self, turn: Turn) -> list[Made] | PocketSlmError:
        """What a step made of it."""
        if turn.status:
            return self.error.exception(turn.status)
        return [
            Made(
                one.token,
                one.logprob if self._scored else None,
                self._limited if one.finish == 3 else _FINISHES[one.finish],
            )
            for one in turn.made[: turn.count]
        ]

    def open(self) -> ctypes.c_void_p:
        """The handle. Raises UsageError where the slot was used for something else."""
        if not self.handle:
            raise UsageError("the session was used for something else before this text ended")
        return self.handle

    def close(self) -> None:
        """End it: the slot keeps what was made."""
        self._session.end(self)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.close()
