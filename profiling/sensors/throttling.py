"""Whether a device slowed down while it ran, judged from the run itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pocketslm.profiling.records import TracePoint

# The tenths are compared by their medians; a smaller loss is within what scheduling does.
SLOWDOWN = 0.10
FREQUENCY_DROP = 0.05
_LEAST_PIECES = 20  # with fewer pieces a tenth is one sample, and one sample is no trend


def throttled(
    pieces_ns: Sequence[int], trace: Sequence[TracePoint], reasons: Sequence[str]
) -> bool | None:
    """Judge by the times of equal pieces of work in order, the trace over them, and the system's
    own word (see ``throttle_reasons``). None if there is too little to judge by.

    The last tenth must be 10 % slower than the first and, if frequencies are known, the clock 5 %
    lower. Otherwise the cause was not heat.
    """
    if reasons:
        return True
    if len(pieces_ns) < _LEAST_PIECES:
        return None
    tenth = len(pieces_ns) // 10
    first, last = statistics.median(pieces_ns[:tenth]), statistics.median(pieces_ns[-tenth:])
    if last < first * (1 + SLOWDOWN):
        return False
    clocks = [point.khz for point in trace if point.khz]
    if len(clocks) < 2:
        return True
    tenth = max(1, len(clocks) // 10)
    return any(
        statistics.fmean(late) < statistics.fmean(early) * (1 - FREQUENCY_DROP)
        for early, late in zip(
            zip(*clocks[:tenth], strict=True), zip(*clocks[-tenth:], strict=True), strict=True
        )
    )
