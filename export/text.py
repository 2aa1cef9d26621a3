"""Texts that models are measured, calibrated and healed on."""

from __future__ import annotations

from pathlib import Path

from pocketslm.errors import UsageError


def read_text(path: Path) -> str:
    """A UTF-8 file, or the prose of a Wikipedia dump in bz2, such as the catalog's ``wiki``.

    Raises UsageError where it cannot be read as one, as a pipe or device.
    """
    if not path.is_file():
        raise UsageError(f"cannot read {path} as UTF-8 text: expected a file")
    try:
        if path.suffix == ".bz2":
            from pocketslm.runtime.assistant.readers.wikipedia import prose

            return prose(path)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} as UTF-8 text: {error}") from None
