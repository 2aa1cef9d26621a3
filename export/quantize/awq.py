"""AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978): scale what matters up before rounding.

A linear layer computes the same if a weight column is multiplied by s and its input divided by s;
the division is folded into whatever makes the input: the norm before it, or the rows of the linear
before it. Columns with large inputs get large s and so lose less in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketslm.export.quantize import rtn
from pocketslm.export.quantize.grid import Spec

Share = Callable[[Tensor], Tensor]
_EXPONENTS = tuple(step / 10 for step in range(11))  # 0 changes nothing


def rescale(layer: Any, hessians: dict[str, Tensor], spec: Spec, head_dim: int) -> None:
    """Move factors between the parameters of a Llama layer, in place; its output stays the same.

    ``hessians``: ``X^T X`` of the inputs of self_attn.q_proj and o_proj, mlp.gate_proj and
    down_proj.
    """
    attention, mlp = layer.self_attn, layer.mlp

    def over_query_heads(factors: Tensor) -> Tensor:
        """Query heads of one value head must share its factors: their mean, in each one's place."""
        heads = factors.reshape(attention.kv_heads, -1, head_dim)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    def search(site: str, readers: Sequence[Any], share: Share = lambda factors: factors) -> Tensor:
        factors = _factors([r.weight for r in readers], hessians[site], spec, share)
        for reader in readers:
            reader.weight *= factors
        return factors

    queries = (attention.q_proj, attention.k_proj, attention.v_proj)
    layer.input_layernorm.weight /= search("self_attn.q_proj", queries)
    factors = search("self_attn.o_proj", [attention.o_proj], over_query_heads)
    values = factors.reshape(attention.kv_heads, -1, head_dim)[:, 0].reshape(-1)
    _divide_rows(attention.v_proj, values)
    layer.post_attention_layernorm.weight /= search("mlp.gate_proj", (mlp.gate_proj, mlp.up_proj))
    _divide_rows(mlp.up_proj, search("mlp.down_proj", [mlp.down_proj]))


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
