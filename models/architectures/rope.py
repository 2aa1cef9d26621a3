"""Rotary tables from the parameters that Hugging Face and GGUF describe them by.

The formulas are those of transformers' ``modeling_rope_utils``; their sources:
linear (https://arxiv.org/abs/2306.15595), YaRN (https://arxiv.org/abs/2309.00071),
LongRoPE (https://arxiv.org/abs/2402.13753), Llama 3.1's bands (https://arxiv.org/abs/2407.21783).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pocketslm.errors import CheckpointError
from pocketslm.models.architectures.fields import Fields
from pocketslm.models.config import Rotary

# Our own field of config.json: how many dimensions of a head are rotated, whatever the family.
ROTATED = "rotated_dimensions"
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def from_hf(
    f: Fields,
    head_dim: int,
    *,
    theta: float,
    share: float = 1.0,
    group: str = "full_attention",
) -> Rotary:
    """The rotary table that a config.json describes.

    theta, share: the base, and the share of a head that is rotated, where the config names none.
    group: the kind of layers that is asked for, where ``rope_parameters`` has one entry for each.
    """
    given = f.table("rope_parameters")
    nested = is_nested(given)
    rope = f.table("rope_scaling") | (dict(given.get(group) or {}) if nested else given)
    base = rope.pop("rope_theta", None)
    base = f.number("rope_theta", theta) if base is None else base
    part = rope.pop("partial_rotary_factor", None) or f("partial_rotary_factor") or share
    if not isinstance(part, int | float) or not 0 < part <= 1:
        raise CheckpointError(f"{f.where}: partial_rotary_factor is {part!r}, expected 0 to 1")
    dim = int(head_dim * part) if f(ROTATED) is None else f.integer(ROTATED)
    original = f("original_max_position_embeddings")
    if original is not None and not nested:
        rope["original_max_position_embeddings"] = original
    return scaled(f, rope, dim, float(_number(f, "rope_theta", base)))


def of_kind(f: Fields, kind: str) -> Fields:
    """The fields with the rope parameters of one kind of layers alone, none that are for all."""
    own = f.table("rope_parameters").get(kind)
    own = dict(own) if isinstance(own, Mapping) else {}
    return f.but(rope_parameters=own, rope_scaling=None, rope_theta=None)


def is_nested(given: Mapping[str, Any]) -> bool:
    """Whether ``rope_parameters`` has an entry for each kind of layers."""
    return bool(given) and all(isinstance(part, Mapping) for part in given.values())


def scaled(f: Fields, rope: Mapping[str, Any], dim: int, theta: float) -> Rotary:
    """The table of ``dim`` dimensions, stretched as ``rope`` (Hugging Face's form) says."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):  # LongRoPE's first names
        kind = "longrope"
    if kind not in KINDS:
        raise CheckpointError(
            f"{f.where}: RoPE scaling {kind!r} is not supported, expected one of {', '.join(KINDS)}"
        )
    positions = f.integer("max_position_embeddings")

    def number(name: str, default: float | None = None) -> float:
        value = rope.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"{f.where}: RoPE scaling {kind!r} has no {name!r}")
            value = default
        return _number(f, name, value)

    declared = None if kind == "default" else json.dumps(dict(rope), sort_keys=True)
    plain = Rotary(dim, theta, declared=declared)
    if kind == "default":
        return plain
    if kind == "dynamic":
        # Up to max_position_embeddings nothing is stretched; longer contexts are refused.
        divisors = None
        if (alpha := rope.get("alpha")) is not None:  # multiplies the base by alpha^(d / (d - 2))
            alpha = _number(f, "alpha", alpha)
            divisors = tuple(alpha ** (2 * i / (dim - 2)) for i in range(dim // 2))
        return Rotary(dim, theta, divisors, declared=declared)
    if kind == "linear":
        factor = number("factor")
        return Rotary(dim, theta, (factor,) * (dim // 2), declared=declared)
    frequencies = plain.frequencies(0)
    if kind == "llama3":
        divisors = _llama3(
            f,
            frequencies,
            number("factor"),
            number("low_freq_factor"),
            number("high_freq_factor"),
            number("original_max_position_embeddings"),
        )
        return Rotary(dim, theta, divisors, declared=declared)
    original = number("original_max_position_embeddings", positions)
    if kind == "yarn":
        factor = number("factor", max(positions / original, 1.0))
        divisors = _yarn(
            frequencies,
            theta,
            factor,
            original,
            number("beta_fast", 32.0),
            number("beta_slow", 1.0),
            truncate=bool(rope.get("truncate", True)),
        )
        attention = rope.get("attention_factor")
        if attention is None:
            mscale, over = rope.get("mscale"), rope.get("mscale_all_dim")
            attention = _mscale(factor, 1.0)
            if mscale and over:  # one alone does nothing
                attention = _mscale(factor, mscale) / _mscale(factor, over)
        return Rotary(
            dim, theta, divisors, factor=_number(f, "factor", attention), declared=declared
        )
    factor = number("factor", positions / original)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short = f.numbers(rope.get("short_factor"), dim // 2, "short_factor")
    long = f.numbers(rope.get("long_factor"), dim // 2, "long_factor")
    attention = _number(f, "attention_factor", attention)
    return Rotary(dim, theta, short, long, int(original), attention, declared)


def declared(rotary: Rotary, positions: int) -> dict[str, Any] | None:
    """Hugging Face's rope parameters of a table; None where it is not stretched.

    A table that came without them (a GGUF's ``rope_freqs.weight``) is written as LongRoPE, which
    can say any divisors.
    """
    if rotary.declared is not None:
        return dict(json.loads(rotary.declared))
    if rotary.divisors is None:
        return None
    return {
        "rope_type": "longrope",
        "short_factor": list(rotary.divisors),
        "long_factor": list(rotary.long_divisors or rotary.divisors),
        "factor": 1.0,
        "original_max_position_embeddings": rotary.original or positions,
        "attention_factor": rotary.factor,
    }


def _number(f: Fields, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(
            f"{f.where}: {name} of RoPE is {str(value)[:40]!r}, expected a positive number"
        )
    return float(value)


def _llama3(
    f: Fields, frequencies: Sequence[float], factor: float, low: float, high: float, original: float
) -> tuple[float, ...]:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    if not low < high:
        raise CheckpointError(
            f"{f.where}: low_freq_factor {low} is not below high_freq_factor {high}"
        )
    divisors = []
    for frequency in frequencies:
        turns = original * frequency / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(divisors)


def _yarn(
    frequencies: Sequence[float],
    theta: float,
    factor: float,
    original: float,
    beta_fast: float,
    beta_slow: float,
    *,
    truncate: bool,
) -> tuple[float, ...]:
    """Dimensions that turn often are kept, those that turn seldom are stretched by ``factor``."""
    dim = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        """The dimension that turns so often over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    divisors = []
    for i in range(dim // 2):
        stretched = min(1.0, max(0.0, (i - low) / (high - low)))
        divisors.append(1.0 / (stretched / factor + 1.0 - stretched))
    return tuple(divisors)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
