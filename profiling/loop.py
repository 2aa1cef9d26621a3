"""The cost of the loop in ``Model.generate``, compared with the bare steps of its session.

    python -m pocketslm.profiling.loop out/smollm2 -n 128 -r 40

Both decode the same number of tokens after the same prompt, in turns, on one session. A ratio of 1
means that the loop costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from pocketslm.profiling.engine import greedy_step
from pocketslm.runtime.config import GenerationConfig
from pocketslm.runtime.model import Model


def bare(model: Model, ids: list[int], count: int) -> float:
    """Seconds of ``count`` greedy steps after the first token."""
    session = model.engine.session
    with model.engine.exclusive():
        session.truncate(0)
        step = greedy_step(session)
        token = step(ids)
        start = time.perf_counter()
        for _ in range(count):
            token = step([token])
        return time.perf_counter() - start


def generated(model: Model, ids: list[int], count: int) -> float:
    """Seconds of the same steps through :meth:`Model.generate`."""
    with model.engine.exclusive():
        model.engine.session.truncate(0)
    config = GenerationConfig(max_new_tokens=count + 1, ignore_eos=True, prompt_lookup_num_tokens=0)
    records = model.generate(ids, config)
    next(records)
    start = time.perf_counter()
    for _ in records:
        pass
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-n", "--n-gen", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("-r", "--repetitions", type=int, default=40, help="pairs (default: 40)")
    parser.add_argument("-t", "--threads", type=int)
    arguments = parser.parse_args()
    model = Model.load(arguments.bundle, "native", arguments.threads)
    ids = model.tokenizer.encode("The history of Rome begins with")
    pairs = []
    for number in range(arguments.repetitions + 1):
        ways = (bare, generated) if number % 2 else (generated, bare)
        seconds = {way: way(model, ids, arguments.n_gen) for way in ways}
        pairs.append((seconds[bare], seconds[generated]))
    pairs = pairs[1:]  # the first one warms up
    bare_ms, generated_ms = (
        statistics.median(pair[at] for pair in pairs) * 1e3 / arguments.n_gen for at in (0, 1)
    )
    ratios = sorted(steps / loop for steps, loop in pairs)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"bare steps {bare_ms:.3f} ms a token, Model.generate {generated_ms:.3f} ms")
    print(
        f"ratio of medians {bare_ms / generated_ms:.3f}, median of {len(ratios)} ratios "
        f"{statistics.median(ratios):.3f} (middle half {low:.3f} .. {high:.3f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
