"""Hooks of the site: pages that are generated, and checks of every page.

The reference of the command line is made from the parser, the list of changes from CHANGELOG.md. A
page that loads something from another host, or whose Markdown was not understood, is a warning,
which `mkdocs build --strict` turns into an error.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = ("__init__.py", "errors.py", "models", "profiling", "runtime")
# A list, a table or a heading that Markdown took for a part of the paragraph before it.
_SWALLOWED = re.compile(r"<p>(?:(?!</p>|<code>).)*?^(?:- |\d+\. |\| |#)", re.DOTALL | re.MULTILINE)
_TITLES: dict[str | None, str] = {"positional arguments": "argument", "options": "option"}
OURS_ONLY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'self' 'unsafe-inline' data: blob:\">"
)
log = logging.getLogger("mkdocs.hooks.pocketslm")


class PlainReferences(Extension):
    """Shows the references of docstrings, such as ``:class:`Model```, as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":\w+:`", "`", obj.docstring.value)


def on_startup(**_: Any) -> None:
    """Link the documented parts under the name that programs import.

    This comes before mkdocstrings looks for its paths, or it would search the whole environment.
    """
    home = ROOT / "build" / "docs" / "pocketslm"
    home.mkdir(parents=True, exist_ok=True)
    for name in DOCUMENTED:
        if not (home / name).is_symlink():
            (home / name).symlink_to(ROOT / name)


def on_files(files: Files, config: MkDocsConfig) -> None:
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    files.append(File.generated(config, "changes.md", content=changes()))


def on_page_content(html: str, page: Page, **_: Any) -> None:
    for found in _SWALLOWED.finditer(html):
        log.warning("%s: not understood: %s", page.file.src_uri, found[0][-60:])


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Check what the page loads, and forbid its scripts to load anything from another host."""
    loads = Loads()
    loads.feed(output)
    for address in loads.outside:
        log.warning("%s loads %s from another host", page.file.src_uri, address)
    return output.replace("<head>", f"<head>\n{OURS_ONLY}", 1)


class Loads(HTMLParser):
    """Collects the addresses on other hosts that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        address = found.get("src") or (found.get("href") if tag == "link" else None) or ""
        if found.get("rel") != "canonical" and re.match(r"(?:\w+:)?//", address):
            self.outside.append(address)


def changes() -> str:
    """CHANGELOG.md with its links as the site has them."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")


def command_line() -> str:
    """The reference of every command, from the parser itself."""
    from pocketslm.cli import make_parser

    os.environ["COLUMNS"] = "88"  # the width of the usage lines
    parts = [
        "# Command line\n\nMade from the parser: `pocketslm COMMAND --help` prints the same. Every "
        "command exits with 0 when it is done, with 2 and one line on standard error where "
        "something was wrong, and with 130 when Ctrl-C interrupted it.\n"
    ]
    parts += [_command(parser, summary) for parser, summary in _commands(make_parser())]
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Every command under this one with its summary; a group is replaced by its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                if any(_commands(command)):
                    yield from _commands(command)
                else:
                    yield command, summaries[name]


def _command(parser: argparse.ArgumentParser, summary: str) -> str:
    usage = parser.format_usage().removeprefix("usage: ")
    parts = [
        f"## {parser.prog}\n",
        f"{summary[:1].upper()}{summary[1:]}.\n",
        f"```text\n{usage}```\n",
    ]
    for group in parser._action_groups:
        actions = [
            a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"
        ]
        if actions:
            parts += [f"| {_TITLES.get(group.title, group.title)} | meaning |", "|---|---|"]
            parts += [*(_option(parser, action) for action in actions), ""]
    if parser.epilog:
        word, _, example = parser.epilog.partition(": ")
        parts.append(f"{word.capitalize()}:\n\n```text\n{example}\n```\n")
    return "\n".join(parts)


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    names = formatter._format_action_invocation(action)
    text = formatter._expand_help(action) if action.help else ""
    return "| " + " | ".join(_cell(part) for part in (f"`{names}`", text)) + " |"


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if text.startswith("`") else text.replace("<", "&lt;").replace("*", "\\*")
