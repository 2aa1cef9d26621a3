"""Round to nearest on the grid that the extremes of a group span: the baseline without data."""

from __future__ import annotations

from torch import Tensor

from pocketslm.export.quantize.grid import (
    Grid,
    Spec,
    minimum_grid,
    symmetric_grid,
    zero_point_grid,
)


def fit(groups: Tensor, spec: Spec, importance: Tensor | None = None) -> Grid:
    """The grid of ``groups`` [N, G, size]; ``importance`` plays no part.

    Symmetric 4-bit is llama.cpp's Q4_0: the value of largest magnitude becomes code 0, so that
    all 16 codes are used; other widths below 8 do the same. Symmetric 8-bit scales by the largest
    magnitude over 127. With a zero point the codes span [min, max] widened to hold 0, with a
    minimum just [min, max] (Q4_1).
    """
    if spec.kind == "sym":
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        zero = 2 ** (spec.bits - 1)
        return symmetric_grid(
            spec, extreme / -zero if spec.bits < 8 else extreme.abs() / (zero - 1)
        )
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    if spec.has_minimums:
        return minimum_grid(spec, (high - low) / spec.top, low)
    low, high = low.clamp(max=0), high.clamp(min=0)
    return zero_point_grid(spec, (high - low) / spec.top, low)
