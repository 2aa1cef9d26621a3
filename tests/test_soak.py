"""A moment of ``python -m tests.soak``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_moment(tiny_bundle: Path) -> None:
    """In a process of its own, whose only child is the server."""
    command = [sys.executable, "-m", "tests.soak", str(tiny_bundle), "--minutes", "0.02"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
