"""``pocketslm app``: the document assistant in a window."""

from __future__ import annotations

import argparse
from pathlib import Path

from pocketslm.errors import UsageError
from pocketslm.terminal import Commands


def add_commands(commands: Commands) -> None:
    parser = commands.add(
        "app",
        _app,
        "the document assistant in a window, as on a phone",
        "pocketslm app --model out/smollm2",
    )
    parser.add_argument("--data", type=Path, help="folder of library, models and settings")
    parser.add_argument("--model", type=Path, help="import this bundle first and use it")
    parser.add_argument(
        "--size", default="412x860", help="of the window; a tablet is 1200x800 (default: 412x860)"
    )


def _app(arguments: argparse.Namespace) -> None:
    width, _, height = arguments.size.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) >= 320 and int(height) >= 480):
        raise UsageError(f"size {arguments.size!r}, expected one such as 412x860, at least 320x480")
    from pocketslm.android.main import run

    run(arguments.data, arguments.model, (int(width), int(height)))
