"""``pocketslm doc``: the document assistant."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pocketslm.runtime.cli import add_generation, finish, generation_config, load, stream
from pocketslm.terminal import Commands, add_json, say

if TYPE_CHECKING:
    from pocketslm.runtime.assistant.document_assistant import DocumentAssistant
    from pocketslm.runtime.config import GenerationConfig


def add_commands(commands: Commands) -> None:
    documents = commands.group("doc", "summarise a document, or answer questions about it")
    parser = documents.add(
        "summarize",
        _summarize,
        "summarise a document",
        "pocketslm doc summarize out/smollm2 --document report.txt",
    )
    _add_document(parser)
    parser = documents.add(
        "ask",
        _ask,
        "answer questions about a document, the second without reading it again",
        'pocketslm doc ask out/smollm2 "Who wrote it?" "When?" --document report.txt',
    )
    _add_document(parser)
    parser.add_argument("question", nargs="+")


def _add_document(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--document", type=Path, help='UTF-8 text, "-" for standard input (default: a sample)'
    )
    add_generation(parser)
    add_json(parser)


def _summarize(arguments: argparse.Namespace) -> None:
    assistant, config = _assistant(arguments)
    answer = stream(assistant.summarize(config), quiet=arguments.json)
    finish(assistant.model, answer, arguments.json)


def _ask(arguments: argparse.Namespace) -> None:
    assistant, config = _assistant(arguments)
    for question in arguments.question:
        say(f"> {question}")
        answer = stream(assistant.ask(question, config), quiet=arguments.json)
        finish(assistant.model, answer, arguments.json)


def _assistant(arguments: argparse.Namespace) -> tuple[DocumentAssistant, GenerationConfig]:
    from pocketslm.runtime.assistant.document_assistant import (
        DocumentAssistant,
        read_document,
        sample_document,
    )

    path = arguments.document
    document = sys.stdin.read() if path == Path("-") else read_document(path or sample_document())
    assistant = DocumentAssistant(load(arguments), document)
    return assistant, generation_config(arguments, assistant.model, assistant.DEFAULTS)
