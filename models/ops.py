"""The operators that every architecture is written in, and that every target lowers.

Each is a custom PyTorch operator whose reference implementation is plain PyTorch: eager code runs
and differentiates through it, and ``torch.export`` keeps it whole, so that a lowering sees
``pocketslm.attention`` and not thirty nodes. Activations are [B, S, ...]: batch, sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("pocketslm", "DEF")


Function = TypeVar("Function", bound=Callable[..., Any])


def _define(schema: str) -> Callable[[Function], Function]:
    """Register the decorated function under ``schema`` and return the operator itself."""

    def register(reference: Function) -> Function:
        name = schema.split("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, reference, "CompositeImplicitAutograd")
        operator = getattr(torch.ops.pocketslm, name).default
        operator.__doc__ = reference.__doc__
        return cast(Function, operator)

    return register


@_define("embedding(Tensor ids, Tensor weight) -> Tensor")
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` [V, H] for int64 ``ids`` [B, S]: [B, S, H]."""
    return F.embedding(ids, weight)


@_define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` with x [B, S, K] and weight [N, K]: [B, S, N]."""
    return F.linear(x, weight, bias)


@_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalization over the last axis, statistics in fp32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


@_define("swiglu(Tensor gate, Tensor up) -> Tensor")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, the activation of a gated MLP (https://arxiv.org/abs/2002.05202)."""
    return F.silu(gate) * up


@_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor cos, Tensor sin,"
    " int num_heads, int num_kv_heads, float scale) -> (Tensor, Tensor, Tensor)"
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate, append to the cache, attend causally with grouped queries.

    q [B, S, heads * D]; k, v [B, S, kv_heads * D]; past_k, past_v [B, kv_heads, P, D];
    cos, sin [context, D / 2], half-rotation RoPE. Returns the output [B, S, heads * D] and the
    longer cache [B, kv_heads, P + S, D] twice.
    """
    batch, length, _ = q.shape
    past = past_k.shape[2]
    q = rotate(q.view(batch, length, num_heads, -1).transpose(1, 2), cos, sin, past)
    k = rotate(k.view(batch, length, num_kv_heads, -1).transpose(1, 2), cos, sin, past)
    v = v.view(batch, length, num_kv_heads, -1).transpose(1, 2)
    k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    mask = torch.ones(length, past + length, dtype=torch.bool, device=q.device).tril(past)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, length, -1), k, v


@_define("last_tokens(Tensor x, int count) -> Tensor")
def last_tokens(x: Tensor, count: int) -> Tensor:
    """The last ``count`` positions of x [B, S, H]; graphs make ``count`` an input."""
    return x[:, -count:]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
    """RoPE on x [B, heads, S, D] at positions start, start + 1, ...; halves, not pairs."""
    stop = start + x.shape[2]
    c, s = cos[start:stop], sin[start:stop]
    a, b = x.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1)
