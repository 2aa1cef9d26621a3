"""Threads that share one Model: each answer must be the one that is given alone.

    python -m tests.callers --threads 8 --rounds 1000

Eight threads ask the same Model at once, so many times each: greedy, with log-probabilities, with a
penalty, drawn with a seed, of the base and of two adapters. The status is 1 where an answer
differs. The tests run a few rounds of every backend.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from adapter_support import factors, write_adapter

import support
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model

GREEDY = GenerationConfig(max_new_tokens=12, ignore_eos=True)
CONFIGS = [
    GREEDY,
    GREEDY.but(logprobs=True),
    GREEDY.but(repetition_penalty=1.2),
    GREEDY.but(do_sample=True, seed=3, top_k=5),
]
ADAPTERS = ("", "polite", "terse")
# Of log-probabilities: threads add the vocabulary's sum up in the order in which they finish, and
# the runner writes six decimals.
TOLERANCE = 1.5e-6
Answer = tuple[list[int], list[float]]


def bundle(folder: Path) -> Path:
    """A tiny bundle with two adapters."""
    other = factors(seed=4, targets=("gate_proj", "down_proj"))
    adapters = [write_adapter(folder / "polite"), write_adapter(folder / "terse", other)]
    source = open_checkpoint(support.write_hf(folder / "hf"))
    export_bundle(source, folder / "bundle", Recipe(targets=("native", "onnx")), adapters=adapters)
    return folder / "bundle"


def answer(model: Model, caller: int, adapters: bool) -> Answer:
    config = CONFIGS[caller % len(CONFIGS)]
    if adapters:
        config = config.but(adapter=ADAPTERS[caller % len(ADAPTERS)])
    prompt = [1, 2, 3, *range(10 + 20 * caller % 200, 20 + 20 * caller % 200)]
    records = list(model.generate(prompt, config))
    return [record.token for record in records], [record.logprob or 0.0 for record in records]


def same(one: Answer, other: Answer) -> bool:
    """The same tokens, with the same log-probabilities; NaN is like nothing."""
    return one[0] == other[0] and all(
        abs(a - b) <= TOLERANCE for a, b in zip(one[1], other[1], strict=True)
    )


def differing(model: Model, threads: int, rounds: int, adapters: bool) -> Counter[int]:
    """How many answers of each thread differ from what it gets alone."""
    alone = [answer(model, caller, adapters) for caller in range(threads)]

    def again(caller: int) -> int:
        return sum(not same(answer(model, caller, adapters), alone[caller]) for _ in range(rounds))

    with ThreadPoolExecutor(threads) as pool:
        found = Counter(dict(enumerate(pool.map(again, range(threads)))))
    return +found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.callers", description=__doc__)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1000, help="of each thread")
    parser.add_argument("--backend", default="native", help="native, onnx or runner")
    parser.add_argument("--parallel", type=int, default=1, help="answers made at once (native)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="callers") as folder:
        made = bundle(Path(folder))
        start = time.monotonic()
        slots = {"parallel": args.parallel} if args.backend == "native" else {}
        with Model.load(made, args.backend, threads=2, **slots) as model:
            wrong = differing(model, args.threads, args.rounds, args.backend == "native")
    print(
        f"{args.threads} threads x {args.rounds} generations on one Model ({args.backend}, "
        f"{args.parallel} at once): {wrong.total()} differ, {time.monotonic() - start:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
