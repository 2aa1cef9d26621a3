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
    """Root-mean-square normalization of each group of the last axis that the weight covers.

    x [B, S, G * N] with weight [N]; statistics in fp32. G is 1 for a hidden state, the number of
    heads where each head is normalized for itself.
    """
    groups = x.unflatten(-1, (-1, weight.shape[0])).float()
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return ((groups * scale).to(x.dtype) * weight).flatten(-2)


@_define("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalization over the last axis (https://arxiv.org/abs/1607.06450)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@_define("activate(Tensor x, str kind) -> Tensor")
def activate(x: Tensor, kind: str) -> Tensor:
    """An elementwise activation: silu, gelu_tanh, gelu, relu or relu2 (relu, squared)."""
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@_define("gated(Tensor gate, Tensor up, str kind) -> Tensor")
def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``activation(gate) * up``, the inside of a gated MLP (https://arxiv.org/abs/2002.05202)."""
    return activate(gate, kind) * up


@_define("scale(Tensor x, float factor) -> Tensor")
def scale(x: Tensor, factor: float) -> Tensor:
    """``x * factor``."""
    return x * factor


@_define("softcap(Tensor x, float cap) -> Tensor")
def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``: x, kept within the cap (https://arxiv.org/abs/2408.00118)."""
    return cap * torch.tanh(x / cap)


@_define("positions(Tensor ids, Tensor past, Tensor table) -> Tensor")
def positions(ids: Tensor, past: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table`` [context, H] at the positions of ids [B, S]: [1, S, H].

    past: a key cache [B, heads, P, D]; the first position is P.
    """
    start = past.shape[2]
    return table[None, start : start + ids.shape[1]]


@_define("rotary(Tensor x, Tensor cos, Tensor sin, Tensor past, int heads) -> Tensor")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, past: Tensor, heads: int) -> Tensor:
    """RoPE on x [B, S, heads * D] (https://arxiv.org/abs/2104.09864).

    cos, sin [context, R / 2]: the first R of each head are rotated, as halves, not pairs.
    past: a key cache [B, kv_heads, P, D]; the first position is P.
    """
    start, size = past.shape[2], 2 * cos.shape[1]
    c, s = (table[start : start + x.shape[1], None] for table in (cos, sin))
    split = x.unflatten(-1, (heads, -1))
    a, b = split[..., :size].chunk(2, -1)
    turned = torch.cat([a * c - b * s, b * c + a * s, split[..., size:]], -1)
    return turned.flatten(-2)


@_define("temperature(Tensor q, Tensor past, float factor, int step) -> Tensor")
def temperature(q: Tensor, past: Tensor, factor: float, step: int) -> Tensor:
    """``q * (1 + factor * log(1 + position // step))`` for queries q [B, S, N] (Ministral 3).

    past: a key cache [B, kv_heads, P, D]; the first position is P.
    """
    start = past.shape[2]
    positions = torch.arange(start, start + q.shape[1], device=q.device)
    return q * (1 + factor * torch.log1p((positions // step).to(q.dtype)))[:, None]


@_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, int num_heads,"
    " int num_kv_heads, float scale, int? window, float? softcap, bool causal)"
    " -> (Tensor, Tensor, Tensor)"
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append to the cache, attend with grouped queries.

    q [B, S, heads * D]; k, v [B, S, kv_heads * D]; past_k, past_v [B, kv_heads, P, D].
    window: how many positions a token sees, its own among them; None: all before it.
    softcap: scores become ``cap * tanh(score / cap)``. causal: no token sees a later one.
    Returns the output [B, S, heads * D] and the longer cache [B, kv_heads, P + S, D] twice.
    """
    length, past = q.shape[1], past_k.shape[2]
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = k.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2)
    v = v.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2)
    k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    seen = torch.ones(length, past + length, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(past)
        if window is not None:
            seen = seen.triu(past - window + 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    else:
        shared = num_heads // num_kv_heads
        keys, values = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        scores = softcap * torch.tanh(q @ keys.transpose(2, 3) * (scale / softcap))
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return out.transpose(1, 2).flatten(-2), k, v


@_define(
    "short_conv(Tensor b, Tensor c, Tensor x, Tensor taps, Tensor? bias, Tensor past)"
    " -> (Tensor, Tensor)"
)
def short_conv(
    b: Tensor, c: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, past: Tensor
) -> tuple[Tensor, Tensor]:
    """``c`` times a causal convolution of ``b * x``, channel by channel (LFM2).

    b, c, x [B, S, H]; taps [H, T], the newest last; bias [H]; past [B, H, T - 1]: the last columns
    of ``b * x``. Returns the output [B, S, H] and the new state [B, H, T - 1].
    """
    columns = torch.cat([past, (b * x).transpose(1, 2)], -1)
    out = F.conv1d(columns, taps[:, None], bias, groups=taps.shape[0])
    return c * out.transpose(1, 2), columns[..., 1 - taps.shape[1] :]


@_define("last_tokens(Tensor x, int count) -> Tensor")
def last_tokens(x: Tensor, count: int) -> Tensor:
    """The last ``count`` positions of x [B, S, H]; graphs make ``count`` an input."""
    return x[:, -count:]
