"""The checkpoint that a name stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pocketslm.errors import UsageError
from pocketslm.export.delta import DeltaCheckpoint
from pocketslm.models.catalog import resolve
from pocketslm.models.checkpoint import Checkpoint, open_checkpoint
from pocketslm.models.updated import WithAdapter


def open_source(name: str, say: Callable[[str], None] = lambda message: None) -> Checkpoint:
    """Open ``BASE``, a path or catalog name, or ``BASE+UPDATE``.

    An update is the folder of a LoRA adapter that PEFT saved, or a file of `pocketslm delta`; there
    may be several. Raises UsageError where there is no such update, and what opening raises.
    """
    if "+" not in name or Path(name).exists():
        return open_checkpoint(resolve(name, say))
    base, _, update = name.rpartition("+")
    path = Path(update)
    if not path.exists():
        raise UsageError(
            f"{update} does not exist, expected the folder of a LoRA adapter or a file that "
            "`pocketslm delta` wrote"
        )
    checkpoint = open_source(base, say)
    return WithAdapter(checkpoint, path) if path.is_dir() else DeltaCheckpoint(checkpoint, path)
