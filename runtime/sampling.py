"""Logits processors and samplers: plain callables, composed from a GenerationConfig.

A processor takes (token ids so far, logits [V]) and returns logits [V]; it may change its argument.
Names and meanings are those of Hugging Face's GenerationConfig, and so is their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from pocketslm.runtime.config import GenerationConfig

Array = npt.NDArray[np.float32]
Processor = Callable[[Sequence[int], Array], Array]
Sampler = Callable[[Array], int]


def repetition_penalty(penalty: float, start: int = 0) -> Processor:
    """Divide positive and multiply negative logits of tokens seen from position ``start`` on.

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
        order = np.argsort(-logits, kind="stable")
        mass = np.cumsum(softmax(logits[order]))
        # Mass before a token decides, so that the first one is always kept.
        logits[order[1:][mass[:-1] >= p]] = -np.inf
        return logits

    return process


def min_p(p: float) -> Processor:
    """Drop tokens less probable than p times the most probable one."""

    def process(_: Sequence[int], logits: Array) -> Array:
        logits[logits < logits.max() + np.log(np.float32(p))] = -np.inf
        return logits

    return process


def greedy(logits: Array) -> int:
    """The most probable token; the lowest id where several are."""
    return int(logits.argmax())


def multinomial(seed: int | None) -> Sampler:
    """Draw from the softmax of the logits; the same seed draws the same tokens."""
    rng = np.random.default_rng(seed)

    def sample(logits: Array) -> int:
        mass = np.cumsum(softmax(logits))
        # Tokens of no mass are never drawn: the first index whose mass exceeds the draw has some.
        index = np.searchsorted(mass, rng.random() * mass[-1], side="right")
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
    return chain


def sampler_for(config: GenerationConfig) -> Sampler:
    return multinomial(config.seed) if config.samples else greedy


def highest_needed(config: GenerationConfig) -> int | None:
    """How many of the highest logits decide the next token; None where all of them may."""
    if config.repetition_penalty != 1.0:
        return None
    return (config.top_k or None) if config.samples else 1


def softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Probabilities in fp64, so that a cumulative sum over a vocabulary is exact enough."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    np.exp(wide, out=wide)
    wide /= wide.sum()
    return wide


def log_sum_exp(logits: Array) -> float:
    """A token's logit less this is the natural log of its probability."""
    top = logits.max()
    total = np.exp(logits - top, dtype=np.float32).sum(dtype=np.float64)
    return float(top + np.log(total))
