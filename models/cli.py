"""``pocketslm fetch`` and ``inspect``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from pocketslm.errors import UsageError
from pocketslm.terminal import Commands, add_json, print_columns, print_json, say, show


def add_commands(commands: Commands) -> None:
    parser = commands.add(
        "fetch",
        _fetch,
        "download a checkpoint or text of the catalog, checked by SHA-256 and cached",
        "pocketslm fetch smollm2-135m-instruct",
    )
    parser.add_argument("name", nargs="?", help="a catalog name")
    parser.add_argument("--list", action="store_true", help="list the catalog")
    add_json(parser)

    parser = commands.add(
        "inspect",
        _inspect,
        "describe a checkpoint or bundle: dimensions, storage, memory, quality",
        "pocketslm inspect smollm2-135m-instruct",
    )
    parser.add_argument("model", help="a Hugging Face folder, .gguf file, bundle or catalog name")
    add_json(parser)


def _fetch(arguments: argparse.Namespace) -> None:
    from pocketslm.models.catalog import catalog, fetch

    if arguments.list:
        if arguments.name is not None:
            raise UsageError(f"--list lists all of the catalog; leave out {arguments.name!r}")
        entries = catalog().values()
        if arguments.json:
            print_json([asdict(entry) for entry in entries])
        else:
            print_columns([(e.name, e.licence, e.source, e.title) for e in entries])
        return
    if arguments.name is None:
        raise UsageError("give a catalog name, or --list for all of them")
    path = fetch(arguments.name, say)
    print_json({"name": arguments.name, "path": str(path)}) if arguments.json else show(str(path))


def _inspect(arguments: argparse.Namespace) -> None:
    from pocketslm.inspection import describe

    facts = describe(arguments.model, say)
    if arguments.json:
        print_json(facts)
    else:
        print_columns([(name, _shown(value)) for name, value in facts.items()])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
