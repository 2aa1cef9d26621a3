"""The loop of a session that gives logits: one token after the other is chosen from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from pocketslm.runtime.answer import Finish, Limiting, Made
from pocketslm.runtime.backends import Session
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.sampling import chooser_for, log_sum_exp


class Loop:
    """See :class:`pocketslm.runtime.backends.Maker`: a text by the logits of any session.

    ids: the text so far, which grows; new: the end of it that the session does not hold.
    """

    def __init__(
        self,
        session: Session,
        ids: list[int],
        new: Sequence[int],
        config: GenerationConfig,
        eos: Collection[int],
        limit: int,
        limits: Limiting | None,
    ) -> None:
        self._session, self._ids, self._new = session, ids, new
        self._config, self._limits, self._eos = config, limits, eos
        self._end = len(ids) + limit
        self._choose = chooser_for(config, len(ids))

    def make(self) -> list[Made]:
        """Append what is new, and choose what follows."""
        config, limits = self._config, self._limits
        logits = self._session.forward(np.asarray(self._new, np.int64))[0]
        # The raw ones say how probable the token was.
        processed = logits.copy() if config.logprobs else logits
        if limits:
            limits.apply(processed)
        token = self._choose(self._ids, processed)
        if limits:
            limits.advance(token)
        finish: Finish | None = None
        if token in self._eos and not config.ignore_eos:
            finish = "eos"
        elif limits and limits.must_end:
            finish = "stop"
        elif len(self._ids) + 1 == self._end:
            finish = "length" if config.max_new_tokens else "context"
        self._new = [token]
        logprob = float(logits[token]) - log_sum_exp(logits) if config.logprobs else None
        return [Made(token, logprob, finish)]
