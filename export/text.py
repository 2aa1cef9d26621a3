"""Texts that models are measured, calibrated and healed on."""

from __future__ import annotations

from pathlib import Path

from pocketslm.errors import UsageError


def read_text(path: Path) -> str:
    """A UTF-8 file; UsageError where it cannot be read as one, as a pipe or device."""
    if not path.is_file():
        raise UsageError(f"cannot read {path} as UTF-8 text: expected a file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as UTF-8 text: {error}") from None
