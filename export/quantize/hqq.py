"""Half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/).

No data: the minimum (their zero point) of each group is moved to lessen the p-norm of the weight
error with p < 1, which forgives outliers. The problem ``min |W - Q(W)|_p`` is split in two that
alternate: a shrinkage for the error, and a mean for the minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketslm.errors import ExportError
from pocketslm.export.quantize import rtn
from pocketslm.export.quantize.grid import Grid, Spec, minimum_grid

# The authors' defaults.
_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


def fit(groups: Tensor, spec: Spec, importance: Tensor | None = None) -> Grid:
    """The grid of ``groups`` [N, G, size]; scales are round-to-nearest's, minimums are solved for.

    Raises ExportError where the kind has no float minimum to solve for.
    """
    if not spec.has_minimums:
        raise ExportError(f"hqq solves for minimums and cannot make a {spec.kind!r} grid; use min")
    best = grid = rtn.fit(groups, spec)
    beta, least = _BETA, _error(groups, grid)
    for _ in range(_STEPS):
        steps = grid.codes(groups)
        error = _shrunk(groups - grid.values(steps), beta)
        low = (groups - error - steps * grid.scales).mean(2, keepdim=True)
        grid = minimum_grid(spec, grid.scales, low)
        found = _error(groups, grid)
        better = found < least
        least = torch.where(better, found, least)
        lowest = torch.where(better, grid.minimums, best.minimums)
        best = Grid(spec, grid.scales, grid.zeros, lowest)
        beta *= _GROWTH
    return best


def _error(groups: Tensor, grid: Grid) -> Tensor:
    """The p-norm (to the power p) of each group's error."""
    deviation = groups - grid.values(grid.codes(groups))
    return deviation.abs().pow(_NORM).sum(2, keepdim=True)


def _shrunk(x: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold: the minimizer of |e|_p + beta / 2 * |e - x|^2."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-8).pow(_NORM - 1) / beta).clamp(min=0)
