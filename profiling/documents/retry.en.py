"""Retry a call that may fail for a while, with growing pauses.

Written for the parcel tracker; licence: BSD-2-Clause.
"""

import random
import time

MAX_ATTEMPTS = 6
FIRST_PAUSE = 0.25  # seconds
FACTOR = 2.0
LONGEST_PAUSE = 8.0  # seconds; the tracker's server bans clients that wait longer
JITTER = 0.1


class GaveUp(Exception):
    """All attempts failed; ``__cause__`` is the error of the last one."""


def pauses():
    """Yield the pause before each further attempt, in seconds."""
    pause = FIRST_PAUSE
    for _ in range(MAX_ATTEMPTS - 1):
        yield min(pause, LONGEST_PAUSE) * (1 + random.uniform(-JITTER, JITTER))
        pause *= FACTOR


def retry(call, errors=(OSError,), sleep=time.sleep):
    """Return what ``call()`` returns; try again after an error of the kinds in ``errors``.

    A KeyboardInterrupt is never caught. Raises GaveUp after MAX_ATTEMPTS.
    """
    last = None
    for pause in [0, *pauses()]:
        sleep(pause)
        try:
            return call()
        except errors as error:
            last = error
    raise GaveUp(f"failed {MAX_ATTEMPTS} times") from last
