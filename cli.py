"""The command line: each folder registers its commands, this runs the one chosen.

A ``cli`` module parses, calls its folder, prints; heavy imports wait for their command.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import pocketslm.android.cli
import pocketslm.export.cli
import pocketslm.models.cli
import pocketslm.profiling.cli
import pocketslm.profiling.devices.cli
import pocketslm.runtime.assistant.cli
import pocketslm.runtime.cli
import pocketslm.runtime.server.cli
from pocketslm import __version__
from pocketslm.errors import PocketSlmError
from pocketslm.terminal import Commands, Run, say

USER_ERROR, INTERRUPTED = 2, 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
FOLDERS = (
    pocketslm.models.cli,
    pocketslm.export.cli,
    pocketslm.runtime.cli,
    pocketslm.runtime.assistant.cli,
    pocketslm.runtime.server.cli,
    pocketslm.profiling.cli,
    pocketslm.profiling.devices.cli,
    pocketslm.android.cli,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status (0, 2 for a user's error, 130 for Ctrl-C)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or locale may lack characters
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = make_parser().parse_args(argv)
    return guarded(arguments.run, arguments)


def guarded(run: Run, arguments: argparse.Namespace) -> int:
    """Run a command; a user's error becomes one line and a status, never a traceback."""
    try:
        run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except PocketSlmError as error:
        return _failed(str(error))
    except ImportError as error:
        if (error.name or "").startswith("pocketslm"):
            raise
        return _failed(f"{error.name} is not installed; `pip install pocketslm[all]`")
    except KeyboardInterrupt:
        print("\npocketslm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno in FULL:
            _drop_output()
            return _failed(f"cannot write {error.filename or 'the output'}: {error.strerror}")
        if error.filename is None:
            raise
        # A name that is too long, a folder that may not be entered: looking for it already fails.
        return _failed(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}")
    return 0


def _failed(message: str) -> int:
    say(f"pocketslm: error: {message}")
    return USER_ERROR


def _drop_output() -> None:
    """Forget what could not be written, or the interpreter tries again as it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_parser() -> argparse.ArgumentParser:
    """The parser with every command; the reference of the site is made from it."""
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
