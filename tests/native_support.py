"""Tiny random models for the native engine, and the same forward pass in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.export.lower.native import NativeReport, lower
from pocketslm.export.lower.trace import trace
from pocketslm.models.config import ModelConfig, uniform
from pocketslm.models.tensors import QuantTensor, Weight, pack_codes

SEED = 7


def tiny_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "architecture": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 640,
        "rope_theta": 1000.0,
        "tie_word_embeddings": True,
    }
    return uniform(**fields | changes)


def quantize(values: np.ndarray, bits: int, kind: str) -> QuantTensor:
    groups = values.reshape(values.shape[0], -1, 32).astype(np.float64)
    top = 2**bits - 1
    if kind == "sym":
        scale = np.abs(groups).max(2) / (2 ** (bits - 1) - 1)
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        low = groups.min(2)
        scale = (groups.max(2) - low) / top
        zero = np.zeros_like(scale) if kind == "min" else np.rint(-low / scale)
    scale = scale.astype(np.float16)
    shifted = groups - (low if kind == "min" else 0)[..., None] if kind == "min" else groups
    codes = np.clip(
        np.rint(shifted / scale[..., None].astype(np.float64) + zero[..., None]), 0, top
    )
    return QuantTensor(
        codes=pack_codes(codes.astype(np.uint8).reshape(values.shape), bits),
        scales=scale,
        bits=bits,
        group_size=32,
        zero_points=np.clip(zero, 0, top).astype(np.uint8) if kind == "zp" else None,
        minimums=low.astype(np.float16) if kind == "min" else None,
    )


def mixed_kinds(name: str, values: np.ndarray) -> Weight:
    """Every kind of weight in one model."""
    kinds = {
        "q_proj": (4, "sym"),
        "k_proj": (8, "zp"),
        "v_proj": (8, "min"),
        "o_proj": (4, "zp"),
        "gate_proj": (4, "min"),
        "up_proj": (8, "sym"),
    }
    for part, (bits, kind) in kinds.items():
        if part in name:
            return quantize(values, bits, kind)
    return values.astype(np.float16) if "down" in name else values


def tiny_weights(
    config: ModelConfig, scheme: Callable[[str, np.ndarray], Weight]
) -> Callable[[str, tuple[int, ...]], Weight]:
    """Random weights by Hugging Face name, each made once; ``scheme`` may quantize a matrix."""
    made: dict[str, Weight] = {}

    def weights(name: str, shape: tuple[int, ...]) -> Weight:
        if name not in made:
            rng = np.random.default_rng([SEED, *name.encode()])
            if len(shape) == 1:
                values = rng.uniform(0.5, 1.5, shape) - (1.0 if "bias" in name else 0.0)
                made[name] = values.astype(np.float32)
            else:
                # Large enough that attention and the head are far from uniform.
                spread = 1.5 / np.sqrt(shape[1]) if "embed" not in name else 1.0
                made[name] = scheme(name, rng.normal(0, spread, shape).astype(np.float32))
        return made[name]

    return weights


def write_tiny(
    path: Path,
    config: ModelConfig,
    scheme: Callable[[str, np.ndarray], Weight] = lambda name, values: values,
) -> tuple[NativeReport, Callable[[str, tuple[int, ...]], Weight]]:
    weights = tiny_weights(config, scheme)
    return lower(trace(config, config.max_position_embeddings), weights, path), weights


def reference_logits(
    config: ModelConfig, weights: Callable[[str, tuple[int, ...]], Weight], tokens: np.ndarray
) -> np.ndarray:
    """Logits [n, vocab], plainly."""
    c = config
    (first, *_), (rotary,) = c.attentions, c.rotaries
    dim = first.head_dim

    def get(name: str, *shape: int) -> np.ndarray:
        w = weights(name, shape)
        return (w.dequantize() if isinstance(w, QuantTensor) else w).astype(np.float64)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * weight

    frequencies = rotary.theta ** (-np.arange(0, dim, 2) / dim)
    if rotary.divisors is not None:
        frequencies = frequencies / np.array(rotary.divisors)
    angles = np.arange(len(tokens))[:, None] * frequencies
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    embedding = get("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
    x = embedding[tokens]
    for layer, (heads, kv_heads, intermediate) in enumerate(entry.size for entry in c.layers):
        prefix = f"model.layers.{layer}."
        y = norm(x, get(prefix + "input_layernorm.weight", c.hidden_size))

        def project(name: str, count: int, prefix: str = prefix, y: np.ndarray = y) -> np.ndarray:
            w = get(f"{prefix}self_attn.{name}.weight", count * dim, c.hidden_size)
            out = y @ w.T
            if first.bias:
                out = out + get(f"{prefix}self_attn.{name}.bias", count * dim)
            return out.reshape(len(tokens), count, dim)

        q, k = rotate(project("q_proj", heads)), rotate(project("k_proj", kv_heads))
        v = project("v_proj", kv_heads)
        k, v = (part.repeat(heads // kv_heads, 1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(dim)
        scores[:, np.triu(np.ones((len(tokens), len(tokens)), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out = np.einsum("hts,shd->thd", scores, v).reshape(len(tokens), -1)
        x = x + out @ get(prefix + "self_attn.o_proj.weight", c.hidden_size, heads * dim).T
        y = norm(x, get(prefix + "post_attention_layernorm.weight", c.hidden_size))
        gate = y @ get(prefix + "mlp.gate_proj.weight", intermediate, c.hidden_size).T
        up = y @ get(prefix + "mlp.up_proj.weight", intermediate, c.hidden_size).T
        down = get(prefix + "mlp.down_proj.weight", c.hidden_size, intermediate)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ down.T
    x = norm(x, get("model.norm.weight", c.hidden_size))
    tied = c.tie_word_embeddings
    head = embedding if tied else get("lm_head.weight", c.vocab_size, c.hidden_size)
    return x @ head.T
