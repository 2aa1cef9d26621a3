"""What an ExecuTorch program runs outside its delegate, and what share of a step that takes.

    python -m pocketslm.profiling.delegate out/smollm2/model.pte

ExecuTorch's wheels are built without its event tracer, so there is no ETDump to ask. Instead the
program is written again with the calls of one operator only, at the shapes of a decoding step,
and timed; the whole program's step is the whole.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from pocketslm.errors import UsageError
from pocketslm.runtime.backends.executorch import ExecuTorchSession, quiet

# They compute single integers for the others.
_NUMBERS = ("executorch_prim::", "aten::sym_size", "aten::_local_scalar_dense")


def operators_outside(path: Path) -> Counter[str]:
    """Calls of each operator in one step that no delegate makes."""
    return _calls(_read(path).program)


def step_shares(
    path: Path, *, start: int = 128, threads: int = 1, steps: int = 32
) -> dict[str, float]:
    """Each operator's share of the time of decoding one token at position ``start``.

    Raises BackendError where ExecuTorch cannot load the file, UsageError for a short context.
    """
    if steps < 1 or start < 1:
        raise UsageError(f"start {start} and steps {steps}, expected at least 1")
    file = _read(path)
    whole = _step_seconds(path, start, threads, steps)
    with tempfile.TemporaryDirectory() as folder:

        def seconds(wanted: str | None) -> float:
            part = Path(folder) / "part.pte"
            part.write_bytes(_only(file, wanted))
            return _step_seconds(part, start, threads, steps)

        numbers = seconds(None)
        return {
            name: max(0.0, seconds(name) - numbers) / whole
            for name in _calls(file.program)
            if not name.startswith(_NUMBERS)
        }


def _read(path: Path) -> Any:
    with quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        return deserialize_pte_binary(path.read_bytes())


def _forward(program: Any) -> Any:
    return next(plan for plan in program.execution_plan if plan.name == "forward")


def _name(plan: Any, instruction: Any) -> str | None:
    """The operator that an instruction calls; None for a delegate."""
    index = getattr(instruction.instr_args, "op_index", None)
    if index is None:
        return None
    operator = plan.operators[index]
    return f"{operator.name}.{operator.overload}".removesuffix(".")


def _calls(program: Any) -> Counter[str]:
    plan = _forward(program)
    names = (_name(plan, one) for chain in plan.chains for one in chain.instructions)
    return Counter(name for name in names if name)


def _only(file: Any, wanted: str | None) -> bytes:
    """The file with one operator and the numbers it needs, for one token at a time."""
    from executorch.exir import schema
    from executorch.exir._serialize._program import serialize_pte_binary

    file = deepcopy(file)
    plan = _forward(file.program)
    longest = plan.values[plan.inputs[0]].val.sizes[-1]
    for value in plan.values:
        # What a delegate would have made small stays at its bound otherwise. The sequence is the
        # first axis that has its length.
        tensor = value.val
        dynamic = isinstance(tensor, schema.Tensor) and bool(tensor.shape_dynamism)
        if dynamic and longest in tensor.sizes:
            tensor.sizes[tensor.sizes.index(longest)] = 1
    for chain in plan.chains:
        chain.instructions = [
            one
            for one in chain.instructions
            if (name := _name(plan, one)) and (name.startswith(_NUMBERS) or name == wanted)
        ]
    plan.delegates = []
    with quiet():
        return bytes(serialize_pte_binary(file))


def _step_seconds(path: Path, start: int, threads: int, steps: int) -> float:
    """The quickest of ``steps`` decoding steps: what else runs on the machine only adds."""
    session = ExecuTorchSession(path, threads, None)
    if start + 1 > session.context:
        raise UsageError(f"start {start} does not fit the context of {session.context}")
    taken = []
    for _ in range(steps + 1):
        session.length = start
        begin = time.perf_counter()
        session.forward(np.zeros(1, np.int64))
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m pocketslm.profiling.delegate FILE.pte")
        return 2
    path = Path(arguments[0])
    calls, shares = operators_outside(path), step_shares(path)
    print(f"outside the delegate: {sum(shares.values()):.1%} of a decoding step, one thread")
    for name in sorted(shares, key=lambda name: -shares[name]):
        print(f"{shares[name]:7.2%}  {calls[name]:4d} x {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
