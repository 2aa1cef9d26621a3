"""The tests of one benchmark, with their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pocketslm.errors import UsageError

SEED = 0
# Prompts of the SlimLM table (https://arxiv.org/abs/2411.09944): a short question, then documents
# up to the longest that a phone can take. Answers are as long as in that paper's app.
SLIMLM = tuple((prompt, 64) for prompt in (1, 64, 200, 400, 600, 800))


@dataclass(frozen=True)
class Test:
    """Fields are as in Measurement, ``ids`` as in Job."""

    n_prompt: int
    n_gen: int
    n_depth: int
    context: int
    ids: list[int]
    workload: str = "random"
    parallel: int = 1

    @property
    def name(self) -> str:
        parts = (("pp", self.n_prompt), ("tg", self.n_gen))
        name = "+".join(f"{kind}{count}" for kind, count in parts if count)
        return f"{name} x{self.parallel}" if self.parallel > 1 else name


def plan(
    vocab_size: int,
    *,
    n_prompt: Sequence[int] = (),
    n_gen: Sequence[int] = (),
    n_depth: Sequence[int] | None = None,
    n_both: Sequence[tuple[int, int]] = (),
    context: int | None = None,
    parallel: Sequence[int] = (),
) -> list[Test]:
    """Tests of random token ids, each with just the context that it needs unless one is given.

    n_depth None takes the longest prompt. n_both: pairs of a prompt and new tokens after it.
    parallel: so many texts at once, for each test of generation after that of one. Raises
    UsageError.
    """
    at_least("parallel", 2, parallel)
    if parallel and not n_gen:
        raise UsageError("several texts at once are generated, and no length of that is given")
    at_least("n_prompt", 1, n_prompt)
    at_least("n_gen", 1, n_gen)
    at_least("n_depth", 0, n_depth or ())
    at_least("a length of a prompt with generation", 1, (n for pair in n_both for n in pair))
    if not n_prompt and not n_gen and not n_both:
        raise UsageError("no length of a prompt or a generation, expected at least one test")
    depths = (max(n_prompt, default=0),) if n_depth is None else tuple(n_depth) or (0,)
    counts = [(n, 0, 0) for n in n_prompt]
    counts += [(0, n, depth) for depth in depths for n in n_gen]
    counts += [(prompt, new, 0) for prompt, new in n_both]
    rng = np.random.default_rng(SEED)
    ids = rng.integers(0, vocab_size, max(prompt or depth or 1 for prompt, _, depth in counts))
    tests = _tests(counts, ids.tolist(), context)
    return [
        replace(test, parallel=count)
        for test in tests
        for count in (1, *(() if test.n_prompt else parallel))
    ]


def _tests(
    counts: Iterable[tuple[int, int, int]], ids: list[int], context: int | None
) -> Iterator[Test]:
    for prompt, new, depth in counts:
        needed = prompt + new + depth
        test = Test(prompt, new, depth, context or needed, ids[: prompt or depth or 1])
        if needed > test.context:
            raise UsageError(
                f"context is {context} and {test.name} needs {needed} tokens; give a larger "
                "context or shorter lengths"
            )
        yield test


def at_least(name: str, least: int, values: Iterable[int]) -> None:
    for value in values:
        if value < least:
            raise UsageError(f"{name} is {value}, expected at least {least}")
