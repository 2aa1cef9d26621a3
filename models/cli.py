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
        print_columns([(name, _shown(value)) for name, value in _by_kind(facts).items()])


def _by_kind(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with equal layers told once, with where they stand."""
    told: dict[str, Any] = {}
    for name, fact in facts.items():
        if name != "architecture" or "stored_layers" not in fact:
            told[name] = fact
            continue
        told[name] = {key: part for key, part in fact.items() if key != "stored_layers"}
        kinds: list[tuple[Any, list[int]]] = []
        for index, layer in enumerate(fact["stored_layers"]):
            same = next((places for kind, places in kinds if kind == layer), None)
            if same is None:
                kinds.append((layer, [index]))
            else:
                same.append(index)
        told |= {f"layers {_ranges(places)}": kind for kind, places in kinds}
    return told


def _ranges(numbers: list[int]) -> str:
    """``0-4, 6`` for 0, 1, 2, 3, 4, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
