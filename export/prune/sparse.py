"""Zeros inside the matrices: Wanda, N:M patterns, and a recovery that keeps the zeros.

- Wanda (Sun et al. 2023, https://arxiv.org/abs/2306.11695): in each output row those weights go
  whose ``|w| * ||x||_2`` is least, x what the weight's input is on a text; magnitude is ``|w|``;
- N:M: N weights of every M in succession along a row stay, such as 2:4;
- SPP (Lu et al. 2024, https://arxiv.org/abs/2405.16057): ``W + s * W o (repeat(A) o b)`` learns,
  and a zero of W is a zero of that.

The matrices keep their shapes, and no target skips a zero: they are as large and as slow as before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocketslm.errors import ExportError, UsageError
from pocketslm.export.quantize.calibration import run_layer
from pocketslm.models.sites import Site, layer_matrices

NOTE = "no target skips the zeros: size and speed are those of the whole model"


class Pattern(NamedTuple):
    """``keep`` weights of every ``of`` in succession stay; of None: of a whole row, as a share."""

    keep: float
    of: int | None

    def __str__(self) -> str:
        return f"{1 - self.keep:g}" if self.of is None else f"{self.keep:g}:{self.of}"


def parse_pattern(text: str) -> Pattern:
    """``2:4`` (2 of every 4 stay) or ``0.5`` (half of each row goes); raises UsageError."""
    if match := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text):
        keep, of = int(match[1]), int(match[2])
        if 0 < keep < of:
            return Pattern(keep, of)
    elif re.fullmatch(r"0?\.\d+", text) and float(text) > 0:
        return Pattern(1 - float(text), None)
    raise UsageError(f"sparse is {text!r}, expected a share of zeros such as 0.5, or 2:4 or 4:8")


def kept_weights(weight: Tensor, norms: Tensor | None, pattern: Pattern) -> Tensor:
    """Which weights [N, K] stay (bool), by Wanda's score with input norms [K], or by magnitude.

    Raises ExportError where the pattern does not divide a row.
    """
    score = weight.abs() if norms is None else weight.abs() * norms
    rows, width = weight.shape
    of = pattern.of or width
    if width % of:
        raise ExportError(f"{pattern} does not divide rows of {width} weights; choose another")
    keep = round(pattern.keep * width) if pattern.of is None else int(pattern.keep)
    groups = score.view(rows, -1, of)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(rows, width)


@torch.no_grad()
def sparsify(
    model: Any,
    ids: Tensor,
    pattern: Pattern,
    *,
    wanda: bool = True,
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Set weights of a reference model's layers to zero in place, first layer to last.

    A matrix's scores are of what the sparse ones before it make of windows of tokens ``ids``
    [B, S]. Embedding, head, norms and biases stay as they are.
    """
    x = model.embed(ids)
    for index, layer in enumerate(model.model.layers):

        def prune_site(site: Site, hessian: Tensor, layer: Any = layer) -> None:
            norms = hessian.diagonal().sqrt() if wanda else None  # up to one common factor
            for name in site.matrices:
                weight = layer.get_submodule(name).weight
                weight.mul_(kept_weights(weight, norms, pattern))

        x = run_layer(model, index, x, prune_site)
        progress((index + 1) / len(model.model.layers))


def compressed_bytes(model: Any) -> int:
    """What fp32 weights would take with the zeros of the layers' matrices left out.

    The values that are left, and one bit for each weight of a matrix that says which they are.
    """
    size: int = sum(parameter.numel() * 4 for parameter in model.parameters())
    for names in layer_matrices(model.config):
        for name in names:
            weight = model.get_parameter(name)
            size += (weight.numel() + 7) // 8 - 4 * int((weight == 0).sum())
    return size


class Spp(nn.Module):
    """``W + W o (repeat(A) o b)``, A [rank, K] repeated to W's rows [N, K], b [N, 1] zero at first.

    s, a constant, is in A. Wherever W is zero, so is this: exactly.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, width = weight.shape
        self.a = nn.Parameter(torch.randn(min(rank, rows), width, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, 1, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        rank, rows = len(self.a), len(self.b)
        repeated = self.a[torch.arange(rows, device=weight.device) * rank // rows]
        return weight + weight * (repeated * self.b)
