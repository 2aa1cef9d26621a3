"""Logits processors and samplers: plain callables, composed from a GenerationConfig.

A processor takes (token ids so far, logits [V]) and returns logits [V]; it may change its argument.
Names and meanings are those of Hugging Face's GenerationConfig, and so is their order.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pocketslm.runtime.config import GenerationConfig

Array = npt.NDArray[np.float32]
Processor = Callable[[Sequence[int], Array], Array]
Sampler = Callable[[Array], int]
Choose = Callable[[Sequence[int], Array], int]
"""Picks a token from logits [V], which it may change, behind a text."""


def repetition_penalty(penalty: float, start: int = 0) -> Processor:
    """Divide positive and multiply negative logits of tokens seen from position ``start`` on.

    The native engine does the same for greedy tokens (``penalized`` in runtime/ops/head.cpp).

    CTRL, https://arxiv.org/abs/1909.05858.
    """

    def process(ids: Sequence[int], logits: Array) -> Array:
        seen = np.unique(np.asarray(ids[start:], np.int64))
        values = logits[seen]
        logits[seen] = np.where(values < 0, values * penalty, values / penalty)
        return logits

    return process


def temperature(value: float) -> Processor:
    """Divide logits by ``value``."""
    return lambda _, logits: logits / np.float32(value)


def top_k(k: int) -> Processor:
    """Keep the k highest logits, and whatever equals the k-th."""

    def process(_: Sequence[int], logits: Array) -> Array:
        if k >= len(logits):
            return logits
        threshold = np.partition(logits, -k)[-k]
        logits[logits < threshold] = -np.inf
        return logits

    return process


def top_p(p: float) -> Processor:
    """Keep the smallest set of most probable tokens whose mass reaches p (nucleus sampling)."""

    def process(_: Sequence[int], logits: Array) -> Array:
        weights = exp_weights(logits)
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order], dtype=np.float64)
        wanted = float(np.float32(p)) * np.cumsum(weights, dtype=np.float64)[-1]
        # Mass before a token decides, so that the first one is always kept.
        logits[order[1:][mass[:-1] >= wanted]] = -np.inf
        return logits

    return process


def min_p(p: float) -> Processor:
    """Drop tokens less probable than p times the most probable one."""

    def process(_: Sequence[int], logits: Array) -> Array:
        logits[exp_weights(logits) < np.float32(p)] = -np.inf
        return logits

    return process


def typical_p(p: float) -> Processor:
    """Keep the tokens nearest to the expected logit whose mass reaches p, and their equals.

    Such a token says about as much as a token says on average: the distance between its surprise,
    ``-log(probability)``, and the entropy is that between its logit and the expected logit.

    https://arxiv.org/abs/2202.00666.
    """

    def process(_: Sequence[int], logits: Array) -> Array:
        weights = exp_weights(logits)
        kept = np.flatnonzero(weights)
        mass, values = weights[kept].astype(np.float64), logits[kept].astype(np.float64)
        total = np.cumsum(mass)[-1]
        distance = np.abs(values - np.cumsum(mass * values)[-1] / total)
        order = np.argsort(distance, kind="stable")
        reached = np.cumsum(mass[order]) >= float(np.float32(p)) * total
        last = int(reached.argmax()) if reached[-1] else -1
        logits[kept[distance > distance[order[last]]]] = -np.inf
        return logits

    return process


def greedy(logits: Array) -> int:
    """The most probable token. Among equals, the lowest id."""
    return int(logits.argmax())


def multinomial(seed: int | None) -> Sampler:
    """Draw from the softmax of the logits.

    The same seed draws the same tokens from the same logits on every machine, and by
    the native operators (runtime/ops/sampler.cpp): random numbers come from SplitMix64, and the
    weights of :func:`exp_weights` are added in the order of the vocabulary.
    """
    state = secrets.randbits(64) if seed is None else seed

    def uniform() -> float:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return ((z ^ z >> 31) >> 11) * 2.0**-53

    def sample(logits: Array) -> int:
        mass = np.cumsum(exp_weights(logits), dtype=np.float64)
        # Tokens of no mass are never drawn: the first index whose mass exceeds the draw has some.
        index = np.searchsorted(mass, uniform() * mass[-1], side="right")
        return int(min(index, np.flatnonzero(np.isfinite(logits))[-1]))

    return sample


def processors_for(config: GenerationConfig, prompt_length: int) -> list[Processor]:
    """The processors that a config asks for, in transformers' order."""
    chain = []
    if config.repetition_penalty != 1.0:
        start = 0 if config.penalize_prompt else prompt_length
        chain.append(repetition_penalty(config.repetition_penalty, start))
    if config.samples:
        if config.temperature != 1.0:
            chain.append(temperature(config.temperature))
        if config.top_k > 0:
            chain.append(top_k(config.top_k))
        if config.top_p < 1.0:
            chain.append(top_p(config.top_p))
        if config.min_p > 0.0:
            chain.append(min_p(config.min_p))
        if config.typical_p < 1.0:
            chain.append(typical_p(config.typical_p))
    return chain


def sampler_for(config: GenerationConfig) -> Sampler:
    return multinomial(config.seed) if config.samples else greedy


def chooser_for(config: GenerationConfig, prompt_length: int) -> Choose:
    """What picks tokens of a text of which ``prompt_length`` tokens are there."""
    processors, sample = processors_for(config, prompt_length), sampler_for(config)

    def choose(ids: Sequence[int], logits: Array) -> int:
        for process in processors:
            logits = process(ids, logits)
        return sample(logits)

    return choose


_TAYLOR = [np.float32(1) / np.float32(n) for n in (720, 120, 24, 6, 2, 1, 1)]


def exp_weights(logits: Array) -> Array:
    """The softmax before its division: exp(logit - highest logit), exact to about 10^-6.

    Computed in fp32, with each operation rounded by itself, so that every machine, and the native
    ``exp_of``, gets the same bits. Logits of minus infinity weigh 0.
    """
    x = np.maximum(logits - logits.max(), np.float32(-87))
    shifted = x * np.float32(1.44269504) + np.float32(12582912)  # rounds to a whole number
    n = shifted - np.float32(12582912)
    r = x - n * np.float32(0.693359375)
    r += n * np.float32(2.12194440e-4)
    p: Array = np.full_like(x, _TAYLOR[0])
    for term in _TAYLOR[1:]:
        p *= r
        p += term
    p *= ((shifted.view(np.uint32) + np.uint32(127)) << np.uint32(23)).view(np.float32)
    p[np.isneginf(logits)] = 0
    return p


def log_sum_exp(logits: Array) -> float:
    """The log of the sum of exp: a token's log-probability is its logit minus this."""
    top = logits.max()
    total = np.exp(logits - top, dtype=np.float32).sum(dtype=np.float64)
    return float(top + np.log(total))
