"""GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

Columns are rounded one after the other, and what a column lost is made good by the columns that
are still to come: the optimal update of the squared error of the layer's output, whose Hessian is
``X^T X`` of the layer's inputs. All rows share it, so one Cholesky factor serves the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketslm.errors import ExportError
from pocketslm.export.quantize import rtn
from pocketslm.export.quantize.grid import PIECE, Fit, Grid, Spec
from pocketslm.models.tensors import QuantTensor, concat_rows

DAMPING = 0.05


def quantize(
    weight: Tensor,
    hessian: Tensor,
    spec: Spec,
    fit: Fit = rtn.fit,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
) -> QuantTensor:
    """Round ``weight`` [N, K] for inputs with ``hessian`` [K, K].

    With ``act_order`` columns come by falling diagonal of the Hessian, and ``fit`` chooses all
    grids beforehand. Else columns come as they are, and a group's grid is chosen when its first
    one comes up, from the weights as they then are; the later ones often outgrow it.

    ``damping``: share of the diagonal that is added to it. The authors add a share of its mean; in
    small models a few inputs are so large that their share would drown the others' correlations.
    """
    assert act_order or spec.kind != "min8", "a row's grids must be known before its factors"
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    at_a_time = max(1, PIECE // weight.shape[1])
    pieces = (
        _quantize_rows(weight[at : at + at_a_time], order, factor, spec, fit, act_order)
        for at in range(0, len(weight), at_a_time)
    )
    return concat_rows(pieces, len(weight))


def _quantize_rows(
    weight: Tensor, order: Tensor, factor: Tensor, spec: Spec, fit: Fit, act_order: bool
) -> QuantTensor:
    """Rows of the matrix, which know nothing of the others; columns come in ``order``."""
    groups = spec.split(weight)
    n, _, size = groups.shape
    group_of = (order // size).tolist()
    # The error of a column counts this much once later columns have adapted as well as they can.
    importance = factor.diagonal().square().reciprocal()
    grids: list[Grid] = []
    if act_order:
        by_column = torch.empty_like(importance)
        by_column[order] = importance
        chosen = fit(groups, spec, by_column.reshape(-1, size)).settled()
        grids = [_group_of(chosen, g) for g in range(groups.shape[1])]
    columns = weight.float().T[order].contiguous()  # [K, N]: a column is contiguous
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), size):
        stop = start + size
        if not act_order:
            block = columns[start:stop].T.reshape(n, 1, size)
            grids.append(fit(block, spec, importance[start:stop][None]))
        lost = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            grid = grids[group_of[i]]
            column = columns[i][:, None, None]
            code = grid.codes(column)
            codes[i] = code[:, 0, 0]
            lost[i - start] = (column - grid.values(code))[:, 0, 0] / factor[i, i]
            columns[i + 1 : stop] -= factor[i, i + 1 : stop, None] * lost[i - start]
        columns[stop:] -= factor[start:stop, stop:].T @ lost
    restored = torch.empty_like(codes)
    restored[order] = codes
    parts = [torch.cat([getattr(g, p) for g in grids], 1) for p in ("scales", "zeros", "minimums")]
    return Grid(spec, *parts).pack(restored.T.reshape(n, -1, size))


def _group_of(grid: Grid, g: int) -> Grid:
    cut = slice(g, g + 1)
    return Grid(grid.spec, grid.scales[:, cut], grid.zeros[:, cut], grid.minimums[:, cut])


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, as float32.

    Raises ExportError for a Hessian of inputs that are not finite, or whose squares are not.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1  # an input that was never active
    diagonal *= 1 + damping
    diagonal += 1e-6 * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(h)
    factor: Tensor = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True).L.float()
    if failed or not torch.isfinite(factor).all():
        raise ExportError(
            "gptq: what a layer computes of the calibration text is NaN, infinite or far too "
            "large; the model is damaged: fetch it again, or use a method without gptq"
        )
    return factor
