"""Grids of least squared error: ranges are shrunk step by step, scale and minimum solved for.

The search of llama.cpp's k-quants (``make_qkx2_quants``) in closed form over whole matrices: each
candidate range gives codes, the codes give the best scale and minimum by weighted least squares,
and a group keeps the best it has seen. It starts from round-to-nearest, so it is never worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketslm.export.quantize import rtn
from pocketslm.export.quantize.grid import (
    Grid,
    Spec,
    minimum_grid,
    symmetric_grid,
    zero_point_grid,
)

# Shares of the range that candidates span; clipping the extremes pays off down to about 0.7.
_SHARES = tuple(1.05 - 0.04 * step for step in range(10))


def fit(groups: Tensor, spec: Spec, importance: Tensor | None = None) -> Grid:
    """The grid of ``groups`` [N, G, size] with the least error, weighed by ``importance``."""
    weights = torch.ones_like(groups[:1]) if importance is None else importance[None].float()
    best = rtn.fit(groups, spec)
    error = _error(best, groups, weights)
    for share in _SHARES:
        for start in _candidates(groups, spec, share):
            candidate = _solved(start, groups, weights)
            found = _error(candidate, groups, weights)
            better = found < error
            error = torch.where(better, found, error)
            best = Grid(
                spec,
                torch.where(better, candidate.scales, best.scales),
                torch.where(better, candidate.zeros, best.zeros),
                torch.where(better, candidate.minimums, best.minimums),
            )
    return best


def _error(grid: Grid, groups: Tensor, weights: Tensor) -> Tensor:
    deviation = grid.values(grid.codes(groups)) - groups
    return (deviation.square() * weights).sum(2, keepdim=True)


def _candidates(groups: Tensor, spec: Spec, share: float) -> list[Grid]:
    if spec.kind == "sym":
        scales = rtn.fit(groups, spec).scales * share
        # There is one more code on one side, which few bits feel: either may be the longer.
        return [
            symmetric_grid(spec, s) for s in ((scales, -scales) if spec.bits < 8 else (scales,))
        ]
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    if spec.kind == "zp":
        low, high = low.clamp(max=0) * share, high.clamp(min=0) * share
        return [zero_point_grid(spec, (high - low) / spec.top, low)]
    middle, reach = (low + high) / 2, (high - low) / 2 * share
    return [minimum_grid(spec, 2 * reach / spec.top, middle - reach)]


def _solved(grid: Grid, groups: Tensor, weights: Tensor) -> Grid:
    """The same codes with the best scale, and minimum if there is one, by least squares."""
    steps = grid.codes(groups) - grid.zeros
    if not grid.spec.has_minimums:
        square = (weights * steps * steps).sum(2, keepdim=True)
        scales = _divided((weights * steps * groups).sum(2, keepdim=True), square)
        if grid.spec.kind == "sym":
            return symmetric_grid(grid.spec, scales)
        return zero_point_grid(grid.spec, scales, -grid.zeros * scales)
    total = weights.sum(2, keepdim=True)
    mean_step = (weights * steps).sum(2, keepdim=True) / total
    mean = (weights * groups).sum(2, keepdim=True) / total
    centred = steps - mean_step
    square = (weights * centred * centred).sum(2, keepdim=True)
    scales = _divided((weights * centred * (groups - mean)).sum(2, keepdim=True), square)
    return minimum_grid(grid.spec, scales, mean - scales * mean_step)


def _divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0)
