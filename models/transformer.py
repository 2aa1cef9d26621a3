"""The decoder (or encoder) that a configuration describes, in PyTorch.

It is what every target is lowered from and held against. Parameter names are described in
:mod:`pocketslm.models.architectures.weights`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pocketslm.models import ops
from pocketslm.models.config import Attention, Layer, Mlp, ModelConfig, Rotary, ShortConv

State = tuple[Tensor, ...]  # of a layer: keys and values, or the columns of a convolution
Cache = list[State]


class Embedding(nn.Module):
    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size))

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(RMSNorm):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def _norm(c: ModelConfig) -> RMSNorm:
    return (RMSNorm if c.norm == "rms" else LayerNorm)(c.hidden_size, c.norm_eps)


class SelfAttention(nn.Module):
    def __init__(self, c: ModelConfig, a: Attention) -> None:
        super().__init__()
        self.options, self.causal = a, c.causal
        self.q_proj = Linear(c.hidden_size, a.query_width, a.bias)
        self.k_proj = Linear(c.hidden_size, a.kv_width, a.bias)
        self.v_proj = Linear(c.hidden_size, a.kv_width, a.bias)
        self.o_proj = Linear(a.query_width, c.hidden_size, a.output_bias)
        if a.qk_norm is not None:
            sizes = (a.head_dim,) * 2 if a.qk_norm == "head" else (a.query_width, a.kv_width)
            self.q_norm, self.k_norm = (RMSNorm(size, c.norm_eps) for size in sizes)

    def forward(self, x: Tensor, past: State, tables: list[tuple[Tensor, Tensor]]) -> Any:
        a = self.options
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if a.qk_norm is not None and not a.norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if a.temperature:  # a factor of a whole query: a rotation does not mind it
            q = ops.temperature(q, past[0], a.temperature, a.temperature_step)
        if a.rotary is not None:
            cos, sin = tables[a.rotary]
            q = ops.rotary(q, cos, sin, past[0], a.heads)
            k = ops.rotary(k, cos, sin, past[0], a.kv_heads)
        if a.qk_norm is not None and a.norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        out, keys, values = ops.attention(
            q,
            k,
            v,
            past[0],
            past[1],
            a.heads,
            a.kv_heads,
            a.scale,
            a.window,
            a.softcap,
            self.causal,
        )
        return self.o_proj(out), (keys, values)


class Conv(nn.Module):
    def __init__(self, c: ModelConfig, conv: ShortConv) -> None:
        super().__init__()
        size = c.hidden_size
        self.b_proj, self.c_proj, self.x_proj = (Linear(size, size, conv.bias) for _ in range(3))
        self.taps = Linear(conv.taps, size, conv.bias)  # one row a channel
        self.out_proj = Linear(size, size, conv.bias)

    def forward(self, x: Tensor, past: State, tables: list[tuple[Tensor, Tensor]]) -> Any:
        b, c, x = self.b_proj(x), self.c_proj(x), self.x_proj(x)
        out, state = ops.short_conv(b, c, x, self.taps.weight, self.taps.bias, past[0])
        return self.out_proj(out), (state,)


class GatedMlp(nn.Module):
    def __init__(self, c: ModelConfig, mlp: Mlp) -> None:
        super().__init__()
        self.kind = mlp.activation
        if mlp.gated:
            self.gate_proj = Linear(c.hidden_size, mlp.width, mlp.bias)
        self.up_proj = Linear(c.hidden_size, mlp.width, mlp.bias)
        self.down_proj = Linear(mlp.width, c.hidden_size, mlp.bias)
        self.gated = mlp.gated

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(ops.gated(self.gate_proj(x), self.up_proj(x), self.kind))
        return self.down_proj(ops.activate(self.up_proj(x), self.kind))


class Block(nn.Module):
    """One layer; its norms stand where ``layer.norms`` says."""

    def __init__(self, c: ModelConfig, layer: Layer) -> None:
        super().__init__()
        self.norms, self.residual_scale = layer.norms, c.residual_scale
        before = self.norms in ("pre", "both", "parallel", "parallel2")
        after = self.norms in ("post", "both", "last")
        if before:
            self.input_layernorm = _norm(c)
        if layer.attention is not None:
            self.self_attn = SelfAttention(c, layer.attention)
        else:
            assert isinstance(layer.mixer, ShortConv)
            self.conv = Conv(c, layer.mixer)
        if after:
            self.attention_post_norm = _norm(c)
        if before and self.norms != "parallel":
            self.post_attention_layernorm = _norm(c)
        self.mlp = GatedMlp(c, layer.mlp)
        if after:
            self.mlp_post_norm = _norm(c)
        self.is_attention = layer.attention is not None

    def _mix(self, x: Tensor, past: State, tables: list[tuple[Tensor, Tensor]]) -> Any:
        mixer = self.self_attn if self.is_attention else self.conv
        return mixer(x, past, tables)

    def _add(self, x: Tensor, out: Tensor) -> Tensor:
        return x + (out if self.residual_scale == 1 else ops.scale(out, self.residual_scale))

    def forward(
        self, x: Tensor, past: State, tables: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, State]:
        norms = self.norms
        if norms in ("parallel", "parallel2"):
            normed = self.input_layernorm(x)
            out, present = self._mix(normed, past, tables)
            inner = normed if norms == "parallel" else self.post_attention_layernorm(x)
            inner = self.mlp(inner)
            return self._add(self._add(x, out), inner), present
        if norms == "last":
            out, present = self._mix(x, past, tables)
            x = self.attention_post_norm(self._add(x, out))
            return self.mlp_post_norm(self._add(x, self.mlp(x))), present
        before, after = norms in ("pre", "both"), norms in ("post", "both")
        out, present = self._mix(self.input_layernorm(x) if before else x, past, tables)
        x = self._add(x, self.attention_post_norm(out) if after else out)
        out = self.mlp(self.post_attention_layernorm(x) if before else x)
        return self._add(x, self.mlp_post_norm(out) if after else out), present


class Decoder(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        if c.learned_positions:
            self.embed_positions = Embedding(c.learned_positions, c.hidden_size)
        if c.embedding_norm:
            self.embed_norm = _norm(c)
        self.layers = nn.ModuleList(Block(c, layer) for layer in c.stored_layers)
        if c.mlp_sharing:
            for block in self.layers:
                block.mlp = self.layers[0].mlp
        if c.final_norm:
            self.norm = _norm(c)


class Model(nn.Module):
    """A model as ``config`` describes it.

    context: positions that the rotary tables cover (and so the longest cache).
    """

    def __init__(self, config: ModelConfig, context: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if config.head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, config.head_bias)
        self.tie()
        self.set_tables(context or config.max_position_embeddings)

    def tie(self) -> None:
        """Let a tied head share the embedding's parameter."""
        if self.config.head and self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def set_tables(self, context: int) -> None:
        """Compute the rotary tables, for sequences of up to ``context`` tokens."""
        for index, rotary in enumerate(self.config.rotaries):
            cos, sin = rope_tables(rotary, context)
            self.register_buffer(f"cos_{index}", cos, persistent=False)
            self.register_buffer(f"sin_{index}", sin, persistent=False)

    @property
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """cos and sin of each rotary table."""
        names = range(len(self.config.rotaries))
        return [(getattr(self, f"cos_{i}"), getattr(self, f"sin_{i}")) for i in names]

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def empty_cache(self, batch: int = 1) -> Cache:
        c, weight = self.config, self.model.embed_tokens.weight
        cache: Cache = []
        for layer in c.layers:
            if (a := layer.attention) is not None:
                shape = (batch, a.kv_heads, 0, a.head_dim)
                cache.append((weight.new_empty(shape), weight.new_empty(shape)))
            else:
                assert isinstance(layer.mixer, ShortConv)
                cache.append((weight.new_zeros((batch, c.hidden_size, layer.mixer.taps - 1)),))
        return cache

    def embed(self, ids: Tensor, past: Cache | None = None) -> Tensor:
        """What the first layer reads of ids [B, S] after ``past``: [B, S, H]."""
        c = self.config
        x = self.model.embed_tokens(ids)
        if c.embedding_scale != 1:
            x = ops.scale(x, c.embedding_scale)
        if c.learned_positions:
            past = self.empty_cache(ids.shape[0]) if past is None else past
            x = x + ops.positions(ids, past[0][0], self.model.embed_positions.weight)
        return self.model.embed_norm(x) if c.embedding_norm else x

    def normalized(self, x: Tensor) -> Tensor:
        """What the head reads of the last layer's output x [B, S, H]."""
        return self.model.norm(x) if self.config.final_norm else x

    def finish(self, x: Tensor) -> Tensor:
        """Logits [B, S, V] of the last layer's output x [B, S, H]; without a head, x normalized."""
        c = self.config
        x = self.normalized(x)
        if not c.head:
            return x
        logits = self.lm_head(x)
        if c.logit_scale != 1:
            logits = ops.scale(logits, c.logit_scale)
        return logits if c.logit_softcap is None else ops.softcap(logits, c.logit_softcap)

    def forward(
        self, input_ids: Tensor, past: Cache, logits_to_keep: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Logits [B, logits_to_keep or S, V] of input_ids [B, S] after ``past``; the new cache."""
        x, present, tables = self.embed(input_ids, past), [], self.tables
        layers = [layer for layer in self.model.layers for _ in range(self.config.repeats)]
        for layer, layer_past in zip(layers, past, strict=True):
            x, layer_present = layer(x, layer_past, tables)
            present.append(layer_present)
        if logits_to_keep is not None:
            x = ops.last_tokens(x, logits_to_keep)
        return self.finish(x), present

    def last_logits(self, input_ids: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """:meth:`forward` for the last position alone: what graphs are lowered from."""
        return self.forward(input_ids, past, 1)

    def run_layer(self, index: int, x: Tensor) -> Tensor:
        """x [B, S, H] through stored layer ``index``, twice where it is shared; empty caches."""
        repeats, tables = self.config.repeats, self.tables
        for past in self.empty_cache(len(x))[index * repeats : (index + 1) * repeats]:
            x, _ = self.model.layers[index](x, past, tables)
        return x


def rope_tables(rotary: Rotary, context: int) -> tuple[Tensor, Tensor]:
    """cos and sin [context, dim / 2] as fp32, from fp64 angles: far positions stay exact."""
    # A list, not a tensor made on the current device: under "meta" the values would be lost.
    frequencies = torch.tensor(rotary.frequencies(context), dtype=torch.float64, device="cpu")
    positions = torch.arange(context, dtype=torch.float64, device="cpu")
    angles = positions[:, None] * frequencies
    return (angles.cos() * rotary.factor).float(), (angles.sin() * rotary.factor).float()
