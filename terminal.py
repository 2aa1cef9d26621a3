"""What the commands share: registration, options in common, progress, reading and printing."""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from pocketslm.errors import UsageError

# Characters that move a cursor, colour, hide or turn text round, and half surrogate pairs.
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
MOST_THREADS = 1024
Run = Callable[[argparse.Namespace], None]


class Commands:
    """Where a folder's ``cli`` module registers its commands."""

    def __init__(self, subparsers: Any) -> None:
        self._subparsers = subparsers

    def add(self, name: str, run: Run, summary: str, example: str) -> argparse.ArgumentParser:
        """A command; ``run`` gets its parsed arguments. Returns the parser to add options to."""
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=run)
        record_given(parser)
        return parser

    def group(self, name: str, summary: str) -> Commands:
        """A command with commands of its own, as ``doc``."""
        parser = self._subparsers.add_parser(name, help=summary)
        return Commands(parser.add_subparsers(required=True, metavar="TASK"))


def record_given(parser: argparse.ArgumentParser) -> None:
    """Make the options that are added later tell which of them a command line gives."""
    for name, action in _RECORDED.items():
        parser.register("action", name, action)


def _recorded(action: type[argparse.Action]) -> type[argparse.Action]:
    class Recorded(action):  # type: ignore[valid-type, misc]
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option: str | None = None,
        ) -> None:
            super().__call__(parser, namespace, values, option)
            if option is not None:
                namespace.given = given(namespace) | {self.dest: option}

    return Recorded


_RECORDED = {
    None: _recorded(argparse._StoreAction),
    "append": _recorded(argparse._AppendAction),
    "store_true": _recorded(argparse._StoreTrueAction),
}


def given(arguments: argparse.Namespace) -> dict[str, str]:
    """The options on the command line by name, each as it was spelled."""
    found: dict[str, str] = getattr(arguments, "given", {})
    return found


def chosen(arguments: argparse.Namespace, config: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass that the command line gives; the others keep their defaults."""
    names = [field.name for field in fields(config) if field.name in given(arguments)]
    return {name: getattr(arguments, name) for name in names}


def refuse(arguments: argparse.Namespace, where: str, *names: str) -> None:
    """UsageError for an option that was given and does nothing, as ``where`` says."""
    for name, option in given(arguments).items():
        if name in names:
            raise UsageError(f"{option} does nothing {where}; leave it out")


def refuse_others(arguments: argparse.Namespace, where: str, *names: str) -> None:
    """As :func:`refuse`, for every option but these."""
    refuse(arguments, where, *(given(arguments).keys() - set(names)))


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="auto",
        help="native, onnx, executorch, runner, or onnx-pocketslm and executorch-pocketslm: our "
        "operators inside those (default: the bundle's first)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-t", "--threads", type=threads, help="threads (default: every core)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def threads(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= MOST_THREADS):
        raise argparse.ArgumentTypeError(f"{text!r}, expected from 1 to {MOST_THREADS}")
    return int(text)


def numbers(text: str) -> list[int]:
    """``128,512`` as llama-bench takes it; 0 alone means none."""
    try:
        values = [int(part) for part in text.split(",")]
        if max(map(abs, values)) > 2**31 - 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 128,512") from None
    return [] if values == [0] else values


def depths(text: str) -> list[int]:
    """As :func:`numbers`, but 0 is a depth like any other."""
    return numbers(text) or [0]


def pair(text: str) -> tuple[int, int]:
    """``512,128`` as llama-bench's -pg takes it."""
    first, *rest = numbers(text) or [0]
    if len(rest) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a pair such as 512,128")
    return first, rest[0]


class Progress:
    """One line on stderr that is rewritten on a terminal, or one line a step elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._step = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._step:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def __call__(self, step: str, fraction: float) -> None:
        step = printable(step)
        if self._terminal:
            bar = "#" * round(fraction * 24)
            print(f"\r\033[K{step} [{bar:24}] {fraction:4.0%}", end="", file=sys.stderr, flush=True)
        elif step != self._step:
            print(f"{step} ...", file=sys.stderr)
        self._step = step


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep to ourselves what libraries warn of while they work, and leave logging as it was."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def printable(text: str, keep: str = "") -> str:
    """Text of a file or a device, its control characters but those of ``keep`` escaped: a name must
    not be able to rewrite a screen, nor one line look like two."""
    return _CONTROLS.sub(
        lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text
    )


def say(message: str) -> None:
    """A line to the person, not into a pipe."""
    print(printable(message), file=sys.stderr, flush=True)


def show(text: str, end: str = "\n") -> None:
    """Lines or pieces of a result."""
    print(printable(text, keep="\n\t"), end=end, flush=True)


def read_input(what: str) -> str:
    """All of standard input as text; UsageError where it is closed or no UTF-8."""
    if sys.stdin is None:
        raise UsageError(f"standard input is closed, expected {what}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} on standard input is not UTF-8: {error}") from None


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))
