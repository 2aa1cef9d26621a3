"""Where downloads and compiled operators are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$POCKETSLM_CACHE``, else ``pocketslm`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    if own := os.environ.get("POCKETSLM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketslm"
