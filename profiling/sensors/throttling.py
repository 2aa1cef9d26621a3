"""Whether a device slowed down while it ran, judged from the run itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pocketslm.profiling.records import TracePoint

# The tenths are compared by their medians; a smaller loss is within what scheduling does.
SLOWDOWN = 0.10
FREQUENCY_DROP = 0.05
_LEAST_PIECES = 20  # with fewer a tenth is one sample, and one sample is no trend


def throttled(
    pieces_ns: Sequence[int], trace: Sequence[TracePoint], reasons: Sequence[str]
) -> bool | None:
    """From the time of equal pieces of work in order, the trace over them, and what the system
    itself says (see ``throttle_reasons``). None where there is too little to judge by.

    The last tenth must be slower than the first by 10 %, and, where frequencies are known, the
    clock lower by 5 %: else something other than heat was in the way.
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
