"""The command line: each folder registers its commands, this runs the one chosen.

A ``cli`` module parses, calls its folder, prints; heavy imports wait for their command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pocketslm.android.cli
import pocketslm.export.cli
import pocketslm.models.cli
import pocketslm.profiling.cli
import pocketslm.profiling.devices.cli
import pocketslm.runtime.assistant.cli
import pocketslm.runtime.cli
from pocketslm import __version__
from pocketslm.errors import PocketSlmError
from pocketslm.terminal import Commands, Run

USER_ERROR, INTERRUPTED = 2, 130
FOLDERS = (
    pocketslm.models.cli,
    pocketslm.export.cli,
    pocketslm.runtime.cli,
    pocketslm.runtime.assistant.cli,
    pocketslm.profiling.cli,
    pocketslm.profiling.devices.cli,
    pocketslm.android.cli,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status (0, 2 for a user's error, 130 for Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    return guarded(arguments.run, arguments)


def guarded(run: Run, arguments: argparse.Namespace) -> int:
    """Run a command; a user's error becomes one line and a status, never a traceback."""
    try:
        run(arguments)
    except PocketSlmError as error:
        print(f"pocketslm: error: {error}", file=sys.stderr)
        return USER_ERROR
    except ImportError as error:
        if (error.name or "").startswith("pocketslm"):
            raise
        print(
            f"pocketslm: error: {error.name} is not installed; `pip install pocketslm[all]`",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print("\npocketslm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pocketslm",
        description="Put small language models on phones and edge boards.",
        epilog="`pocketslm COMMAND --help` shows the options of a command, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"pocketslm {__version__}")
    commands = Commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    for folder in FOLDERS:
        folder.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
