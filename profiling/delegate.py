"""What an ExecuTorch program runs outside its delegate, and what share of a step that takes.

    python -m pocketslm.profiling.delegate out/smollm2/model.pte

ExecuTorch's wheels are built without its event tracer, so there is no ETDump to ask. Instead the
program is loaded with kernels that time the ones they stand for; the rest of a step is the
delegate's.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.errors import UsageError
from pocketslm.runtime.backends.executorch import ExecuTorchSession, operator_times


@dataclass(frozen=True)
class OperatorShare:
    """An operator outside the delegate: calls in one step, and its share of the step's time."""

    name: str
    calls: int
    share: float


def operators_outside(path: Path) -> Counter[str]:
    """Calls of each operator in one step that no delegate makes."""
    program = _read(path)
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    names = (_name(plan, one) for chain in plan.chains for one in chain.instructions)
    return Counter(name for name in names if name)


def step_shares(
    path: Path, *, tokens: int = 1, start: int = 128, threads: int = 1, steps: int = 64
) -> list[OperatorShare]:
    """What each operator takes of a step of ``tokens`` at position ``start``, largest first.

    Medians over ``steps``. Raises BackendError where ExecuTorch cannot load the file, UsageError
    for a short context.
    """
    if min(steps, start, tokens) < 1:
        raise UsageError(f"tokens {tokens}, start {start}, steps {steps}: expected at least 1 each")
    session = ExecuTorchSession(path, threads, None, timed=True)
    if start + tokens > session.context:
        raise UsageError(f"{start} + {tokens} tokens exceed the context of {session.context}")
    ids, shares = np.zeros(tokens, np.int64), []
    before: dict[str, tuple[int, int]] = {}
    for _ in range(steps + 1):
        session.length = start
        begin = time.perf_counter_ns()
        session.forward(ids)
        taken = time.perf_counter_ns() - begin
        after = operator_times()
        shares.append({k: (ns - before.get(k, (0, 0))[1]) / taken for k, (_, ns) in after.items()})
        before = after
    found = [
        OperatorShare(name, calls // (steps + 1), float(np.median([s[name] for s in shares[1:]])))
        for name, (calls, _) in before.items()
    ]
    return sorted(found, key=lambda one: -one.share)


def _read(path: Path) -> Any:
    with _quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        return deserialize_pte_binary(path.read_bytes()).program


def _name(plan: Any, instruction: Any) -> str | None:
    """The operator that an instruction calls; None for a delegate."""
    index = getattr(instruction.instr_args, "op_index", None)
    if index is None:
        return None
    operator = plan.operators[index]
    return f"{operator.name}.{operator.overload}".removesuffix(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what importing ExecuTorch's Python logs to stderr and warns of."""
    sys.stderr.flush()
    kept = os.dup(2)
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("wb") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.dup2(kept, 2)
        os.close(kept)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pocketslm.profiling.delegate")
    parser.add_argument("file", type=Path, help="a .pte with a KV cache")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-n", "--tokens", type=int, default=1, help="in one step; 1 is decoding")
    options = parser.parse_args(arguments)
    shares = step_shares(options.file, tokens=options.tokens, threads=options.threads)
    outside = sum(one.share for one in shares)
    lines = [
        f"outside the delegate: {outside:.1%} of a step of {options.tokens} at position 128, "
        f"{options.threads} thread{'s' * (options.threads > 1)}"
    ]
    lines += [f"{one.share:7.2%}  {one.calls:4d} x {one.name}" for one in shares]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
