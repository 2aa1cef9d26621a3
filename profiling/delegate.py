"""The operators that an ExecuTorch program runs outside its delegate."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketslm.terminal import without_warnings


def operators_outside(path: Path) -> Counter[str]:
    """How often one step calls each operator outside a delegate."""
    program = _read(path)
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    names = (_name(plan, one) for chain in plan.chains for one in chain.instructions)
    return Counter(name for name in names if name)


def _read(path: Path) -> Any:
    with _quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        return deserialize_pte_binary(path.read_bytes()).program


def _name(plan: Any, instruction: Any) -> str | None:
    """The operator that an instruction calls, or None for a delegate."""
    index = getattr(instruction.instr_args, "op_index", None)
    if index is None:
        return None
    operator = plan.operators[index]
    return f"{operator.name}.{operator.overload}".removesuffix(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the logs and warnings that importing ExecuTorch's Python causes."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere, without_warnings():
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
