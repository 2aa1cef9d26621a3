"""Tiny random models for the native engine, and the same forward pass in float64 numpy."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from native_runner import Runner, running

from pocketslm.export.lower.native import NativeReport, lower
from pocketslm.export.lower.native_layout import WHOLE_KINDS, pack_matrix
from pocketslm.export.lower.native_tokenizer import pack_tokenizer
from pocketslm.export.lower.trace import trace
from pocketslm.models.config import ModelConfig, uniform
from pocketslm.models.tensors import TABLES, QuantTensor, Weight, WholeScales, pack_codes
from pocketslm.runtime.backends import Penalty
from pocketslm.runtime.backends.native import NativeModel, NativeSession
from pocketslm.runtime.ops import build
from pocketslm.runtime.sampling import repetition_penalty

SEED = 7

# Every way in which the native operators hold a matrix.
FLOATS = ["f32", "f16"]
PLAIN = [
    *("q4 sym", "q4 min", "q4 zp", "q8 sym", "q8 min", "q8 zp", "q8 split", "q8 apart"),
    *("q2 sym", "q3 sym", "q5 sym", "q6 sym", "q2 min", "q3 min", "q5 min", "q6 min"),
    *("iq4", "fp4"),
]
WHOLE = [name.replace("_", " ") for name in WHOLE_KINDS]  # scales are whole numbers
SCHEMES = [*FLOATS, *PLAIN, *WHOLE]


def packed(weight: Weight, *, head: bool = False) -> tuple[int, np.ndarray]:
    """Kind and bytes of a matrix in the packed layout, as a whole."""
    kind, pieces, _ = pack_matrix(weight, head=head)
    return kind, np.concatenate(list(pieces))


def need_sanitizers(names: str, folder: Path) -> None:
    """Skip the test where the compiler has none of these."""
    import pytest  # the campaigns, which use this file, run without it

    (folder / "empty.cpp").write_text("int main() {}\n")
    flags = [f"-fsanitize={names}", "-o", str(folder / "empty")]
    command = [*build.find_toolchain().command, str(folder / "empty.cpp"), *flags]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"the compiler has no {names} sanitizer")


def assert_penalized(model: NativeModel) -> None:
    """What the head picks under a penalty is what the sampler picks from all logits."""
    whole, greedy = model.session(threads=2), model.session(threads=2)
    text = np.random.default_rng(6).integers(0, model.info.vocab_size, 40)
    changed = 0
    for factor in (1.0, 1.3, 100.0):
        process = repetition_penalty(factor)
        whole.truncate(0)
        greedy.truncate(0)
        for begin, end, following in ((0, 20, 1), (20, 31, 11), (31, 32, 1), (32, 40, 3)):
            rows = whole.forward(text[begin:end], all_logits=True)[-following:]
            # Some of the highest are seen, at their row or only later.
            seen = np.concatenate([text[:begin], rows.argmax(axis=1)[::-1]])
            found = greedy.forward_greedy(text[begin:end], following, Penalty(factor, seen))
            for back, row, token in zip(range(following)[::-1], rows, found, strict=True):
                highest = int(row.argmax())
                logits = process(seen[: len(seen) - back].tolist(), row)
                assert logits[token] == logits.max()  # a cap may have made several equal
                changed += int(token != highest)
    assert changed  # else nothing was tried


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


def make_weight(scheme: str, rows: int, cols: int, rng: np.random.Generator) -> Weight:
    """Random codes and scales over all that the scheme holds."""
    if scheme in ("f32", "f16"):
        dtype = np.float32 if scheme == "f32" else np.float16
        return rng.normal(size=(rows, cols)).astype(dtype)
    bits, kind, table = _form(scheme)
    codes = pack_codes(rng.integers(0, 2**bits, (rows, cols), dtype=np.uint8), bits)
    if scheme in WHOLE:
        return _whole_weight(scheme, codes, rng)
    shape = (rows, cols // 32)
    scales = rng.uniform(0.001, 0.1, shape).astype(np.float16)
    scales[rng.random(shape) < 0.05] = 0  # an all-zero group
    return QuantTensor(
        codes=codes,
        scales=scales,
        bits=bits,
        group_size=32,
        table=table,
        zero_points=rng.integers(0, 2**bits, shape, dtype=np.uint8) if kind == "zp" else None,
        minimums=rng.normal(size=shape).astype(np.float16) if kind == "min" else None,
    )


def _form(scheme: str) -> tuple[int, str, str | None]:
    """Bits, the offset's kind and the table of a quantized scheme."""
    first, _, kind = scheme.partition(" ")
    return (4, kind, first) if first in TABLES else (int(first[1]), kind, None)


def _whole_weight(scheme: str, codes: np.ndarray, rng: np.random.Generator) -> QuantTensor:
    """Scales over all that a byte or a nibble holds."""
    bits, _, table = _form(scheme)
    minimums, scale_bits = WHOLE_KINDS[scheme.replace(" ", "_")]
    group = 16 if scheme.endswith("16") else 32
    rows, cols = codes.shape[0], codes.shape[1] * (2 if bits == 4 else 1)

    def factors(top: float) -> np.ndarray:
        count = 1 if scheme.endswith("r") else cols // 256
        return rng.uniform(top / 9, top, (rows, count)).astype(np.float16)

    def numbers(low: int, high: int, dtype: type) -> np.ndarray:
        return rng.integers(low, high, (rows, cols // group), dtype=dtype)

    if not minimums:
        whole = WholeScales(factors(1e-3), numbers(-128, 128, np.int8))
    else:
        top = 2**scale_bits
        parts = [factors(0.1 / top), numbers(0, top, np.uint8)]
        parts += [factors(3 / top), numbers(0, top, np.uint8)]
        whole = WholeScales(*parts, bits=scale_bits)
    return QuantTensor.with_whole_scales(codes, bits, group, whole, table)


def rounded_to(scheme: str, values: np.ndarray) -> QuantTensor:
    """``values`` in any quantized scheme, by the extremes of their groups."""
    bits, kind, table = _form(scheme)
    if scheme in PLAIN and table is None:
        return quantize(values, bits, kind)
    minimums, scale_bits = WHOLE_KINDS.get(scheme.replace(" ", "_"), (False, 8))
    group = 16 if scheme.endswith("16") else 32
    groups = values.reshape(len(values), -1, group)
    low = groups.min(2).clip(max=0) if minimums else np.zeros(groups.shape[:2])
    levels = (
        np.array(TABLES[table]) if table else np.arange(2**bits) - (not minimums) * 2 ** (bits - 1)
    )
    top = levels.max() if minimums else np.abs(levels).max()
    scales = ((groups - low[..., None]).max(2) if minimums else np.abs(groups).max(2)) / top

    def codes(scales: np.ndarray, low: np.ndarray) -> np.ndarray:
        steps = (groups - low[..., None]) / np.where(scales == 0, 1, scales)[..., None]
        order = np.argsort(levels, kind="stable")
        middles = (levels[order][1:] + levels[order][:-1]) / 2
        found = order[np.searchsorted(middles, steps)].astype(np.uint8)
        return pack_codes(found.reshape(values.shape), bits)

    if scheme in PLAIN:
        scales = scales.astype(np.float16)
        return QuantTensor(codes(scales.astype(np.float64), low), scales, bits, group, table=table)
    per_factor = values.shape[1] // group if scheme.endswith("r") else 256 // group
    most = 2**scale_bits - 1 if minimums else 127

    def whole(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = numbers.reshape(len(numbers), -1, per_factor)
        factors = (parts.max(2) / most).astype(np.float16)
        steps = np.rint(parts / np.where(factors == 0, 1, factors)[..., None]).clip(0, most)
        return factors, steps.reshape(numbers.shape).astype(np.uint8 if minimums else np.int8)

    lowest = whole(-low) if minimums else (None, None)
    scaled = WholeScales(*whole(scales), *lowest, bits=scale_bits)
    found, found_low = scaled.values()
    packed = codes(found, low if found_low is None else found_low)
    return QuantTensor.with_whole_scales(packed, bits, group, scaled, table)


def every_kind(name: str, values: np.ndarray) -> Weight:
    """Every kind of quantized weight in one model of 5 layers and rows of a multiple of 256."""
    kinds = [scheme for scheme in (*PLAIN, *WHOLE) if scheme not in ("q8 split", "q8 apart")]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    if not layer.isdigit():
        return quantize(values, 8, "sym")
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    index = int(layer) * 7 + next(i for i, known in enumerate(parts) if known in part)
    return rounded_to(kinds[index % len(kinds)], values)


def every_kind_config(**changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 5}
    return tiny_config(**{**sizes, "head_dim": 128, **changes})


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


def model_with_tokenizer(folder: Path, tokenizer: bytes | None, size: int = 3002) -> NativeModel:
    """A tiny random model with a packed tokenizer, or none, in its file."""
    config = tiny_config(vocab_size=size)
    weights = tiny_weights(config, lambda _, w: w)
    lower(
        trace(config, config.max_position_embeddings),
        weights,
        folder / "model.slm",
        tokenizer=tokenizer,
    )
    return NativeModel(folder / "model.slm")


@contextmanager
def running_with(runner_path: Path, text: str, folder: Path) -> Iterator[Runner]:
    """The runner with a tiny model that has the tokenizer of `text`, a tokenizer.json."""
    packed, reason = pack_tokenizer(text)
    assert packed is not None, reason
    tokenizer = json.loads(text)
    ids = [*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])]
    config = tiny_config(vocab_size=1 + max(ids))
    path = folder / "model.slm"
    weights = tiny_weights(config, lambda _, w: w)
    lower(trace(config, 640), weights, path, tokenizer=packed)
    with running([str(runner_path)]) as runner:
        assert runner.ask(op="load", path=str(path), threads=1, context=300)["tokenizer"]
        yield runner


class Plain:
    """A native session that makes no texts by itself, so that Python's own loop does."""

    def __init__(self, session: NativeSession) -> None:
        self._session = session
        self.backend, self.vocab_size = session.backend, session.vocab_size
        self.context, self.threads = session.context, session.threads

    @property
    def length(self) -> int:
        return self._session.length

    def forward(self, tokens: np.ndarray, *, all_logits: bool = False) -> np.ndarray:
        return self._session.forward(tokens, all_logits=all_logits)

    def truncate(self, length: int) -> None:
        self._session.truncate(length)
