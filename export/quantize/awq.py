"""AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978): scale what matters up before rounding.

A linear layer computes the same if a weight column is multiplied by s and its input divided by s;
the division is folded into whatever makes the input: the norm before it, or the rows of the linear
before it. Columns with large inputs get large s and so lose less in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketslm.export.quantize import rtn
from pocketslm.export.quantize.grid import Spec
from pocketslm.models.config import Layer
from pocketslm.models.sites import Site, sites

Share = Callable[[Tensor], Tensor]
_EXPONENTS = tuple(step / 10 for step in range(11))  # 0 changes nothing


def rescale(layer: Any, described: Layer, hessians: Mapping[str, Tensor], spec: Spec) -> None:
    """Move factors between the parameters of a layer, in place; its output stays the same.

    hessians: ``X^T X`` of what each site reads, by the site's name. Sites whose input is made by
    nothing that can take a factor (a norm that others read too, an activation) stay as they are.
    """
    for site in sites(described):
        readers = [layer.get_submodule(name) for name in site.matrices]
        share: Share = _same
        if site.norm is None and not _has_linear_maker(site, described):
            continue
        if site.columns == "queries":
            share = _over_query_heads(described)
        factors = _factors([r.weight for r in readers], hessians[site.name], spec, share)
        for reader in readers:
            reader.weight *= factors
        if site.norm is not None:
            norm = layer.get_submodule(site.norm)
            norm.weight /= factors
            if getattr(norm, "bias", None) is not None:
                norm.bias /= factors
        elif site.columns == "queries":
            a = described.attention
            assert a is not None
            values = factors.reshape(a.kv_heads, -1, a.head_dim)[:, 0].reshape(-1)
            _divide_rows(layer.self_attn.v_proj, values)
        else:
            _divide_rows(layer.mlp.up_proj, factors)


def _same(factors: Tensor) -> Tensor:
    return factors


def _has_linear_maker(site: Site, described: Layer) -> bool:
    """Whether the site's input is linear in the rows of a matrix: V, or the up of a gated MLP."""
    return site.columns == "queries" or (site.columns == "neurons" and described.mlp.gated)


def _over_query_heads(described: Layer) -> Share:
    """Query heads that share a value head must use the same factors, so use their mean."""
    a = described.attention
    assert a is not None

    def share(factors: Tensor) -> Tensor:
        heads = factors.reshape(a.kv_heads, -1, a.head_dim)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    return share


def _divide_rows(linear: Any, factors: Tensor) -> None:
    linear.weight /= factors[:, None]
    if linear.bias is not None:
        linear.bias /= factors


def _factors(weights: Sequence[Tensor], hessian: Tensor, spec: Spec, share: Share) -> Tensor:
    """Column factors [K] for matrices [N, K] that read one input with ``hessian`` [K, K].

    (root mean square of the input)^a, with the a of least output error after rounding to nearest.
    """
    magnitude = hessian.diagonal().clamp(min=1e-12).sqrt()
    best, least = torch.ones_like(magnitude), float("inf")
    for exponent in _EXPONENTS:
        factors = share(magnitude.pow(exponent))
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = sum(_output_error(weight, factors, hessian, spec) for weight in weights)
        if error < least:
            best, least = factors, error
    return best


def _output_error(weight: Tensor, factors: Tensor, hessian: Tensor, spec: Spec) -> float:
    """``|X (Q(W s) / s - W)^T|^2`` from the Hessian of X."""
    groups = spec.split(weight * factors)
    grid = rtn.fit(groups, spec)
    rounded = grid.values(grid.codes(groups)).reshape(weight.shape)
    difference = rounded / factors - weight
    return float(((difference @ hessian) * difference).sum())
