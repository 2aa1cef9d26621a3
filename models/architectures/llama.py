"""Llama and what shares its block: SmolLM2, TinyLlama, Llama 2 and 3, MobileLLM, Fox-1, Qwen2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketslm.models import ops
from pocketslm.models.config import LayerSize, ModelConfig, rope_frequencies
from pocketslm.models.tensors import QuantTensor, Weight

Cache = list[tuple[Tensor, Tensor]]


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


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, size: LayerSize) -> None:
        super().__init__()
        self.heads, self.kv_heads = size.num_attention_heads, size.num_key_value_heads
        self.scale = c.head_dim**-0.5
        q_size, kv_size = self.heads * c.head_dim, self.kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_size, c.attention_bias)
        self.k_proj = Linear(c.hidden_size, kv_size, c.attention_bias)
        self.v_proj = Linear(c.hidden_size, kv_size, c.attention_bias)
        self.o_proj = Linear(q_size, c.hidden_size, c.output_bias)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        out, k, v = ops.attention(q, k, v, *past, cos, sin, self.heads, self.kv_heads, self.scale)
        return self.o_proj(out), (k, v)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig, size: LayerSize) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, size.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, size.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(size.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, size: LayerSize) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, size)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c, size)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, present = self.self_attn(self.input_layernorm(x), past, cos, sin)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, size) for size in c.stored_layers)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Model(nn.Module):
    """A Llama-family decoder whose parameter names are Hugging Face's.

    ``context``: positions that the rotary tables cover (and so the longest cache).
    """

    def __init__(self, config: ModelConfig, context: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos, sin = rope_tables(config, context or config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def empty_cache(self, batch: int = 1) -> Cache:
        c, weight = self.config, self.model.norm.weight
        shapes = [(batch, size.num_key_value_heads, 0, c.head_dim) for size in c.layers]
        return [(weight.new_empty(shape), weight.new_empty(shape)) for shape in shapes]

    def forward(
        self, input_ids: Tensor, past: Cache, logits_to_keep: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Logits [B, logits_to_keep or S, V] of input_ids [B, S] after ``past``; the new cache."""
        x = self.model.embed_tokens(input_ids)
        present = []
        layers = [layer for layer in self.model.layers for _ in range(self.config.repeats)]
        for layer, layer_past in zip(layers, past, strict=True):
            x, layer_present = layer(x, layer_past, self.cos, self.sin)
            present.append(layer_present)
        if logits_to_keep is not None:
            x = ops.last_tokens(x, logits_to_keep)
        return self.lm_head(self.model.norm(x)), present

    def run_layer(self, index: int, x: Tensor) -> Tensor:
        """x [B, S, H] through stored layer ``index``, twice where it is shared; empty caches."""
        repeats = self.config.repeats
        for past in self.empty_cache(len(x))[index * repeats : (index + 1) * repeats]:
            x, _ = self.model.layers[index](x, past, self.cos, self.sin)
        return x


def rope_tables(c: ModelConfig, context: int) -> tuple[Tensor, Tensor]:
    """cos and sin [context, head_dim / 2] as fp32, from fp64 angles: far positions stay exact."""
    frequencies = torch.tensor(rope_frequencies(c.rope_theta, c.head_dim), dtype=torch.float64)
    if c.rope_divisors is not None:
        frequencies = frequencies / torch.tensor(c.rope_divisors, dtype=torch.float64)
    angles = torch.arange(context, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def sanitize_gguf(name: str, weight: Weight, c: ModelConfig) -> Weight:
    """Undo llama.cpp's row order of Q and K: it stores rotary pairs, Hugging Face halves."""
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    part = name.split(".")[-2]
    if c.architecture != "llama" or part not in heads:
        return weight
    rows = torch.arange(weight.shape[0]).view(heads[part], -1, 2).transpose(1, 2).flatten().numpy()
    return weight.rows(rows) if isinstance(weight, QuantTensor) else weight[rows]
