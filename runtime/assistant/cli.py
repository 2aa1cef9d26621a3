"""``pocketslm doc``: the document assistant."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pocketslm.errors import UsageError
from pocketslm.runtime.cli import add_generation, generation_config, load
from pocketslm.terminal import (
    Commands,
    add_json,
    print_columns,
    print_json,
    read_input,
    refuse,
    say,
    show,
)

if TYPE_CHECKING:
    from pocketslm.runtime.assistant.answer import Answer, Citation, Event
    from pocketslm.runtime.assistant.assistant import Assistant
    from pocketslm.runtime.assistant.document import Document, Source
    from pocketslm.runtime.assistant.library import Library

    Start = Callable[[Assistant, Document, threading.Event], Iterator[Event]]

LIBRARY_VARIABLE = "POCKETSLM_DOCUMENTS"
LIBRARY_DEFAULT = "~/.local/share/pocketslm/documents.db"


def add_commands(commands: Commands) -> None:
    documents = commands.group("doc", "a library of documents: summarise, ask, suggest, rewrite")
    parser = documents.add(
        "add",
        _add,
        "add documents to the library (txt, md, html, pdf, docx, epub)",
        "pocketslm doc add report.pdf notes.md",
    )
    parser.add_argument("file", nargs="+", help='a file, or "-" for text on standard input')
    parser.add_argument("--title", help="(default: the file's name)")
    _add_library(parser)
    parser = documents.add("list", _list, "list the library", "pocketslm doc list --json")
    _add_library(parser)
    parser = documents.add(
        "remove", _remove, "remove documents with their history", "pocketslm doc remove 3"
    )
    parser.add_argument("document", nargs="+", type=int, help="its number in `doc list`")
    _add_library(parser)

    parser = documents.add(
        "summarize",
        _summarize,
        "summarise a document",
        "pocketslm doc summarize out/smollm2 --document report.pdf",
    )
    _add_task(parser)
    parser = documents.add(
        "ask",
        _ask,
        "answer questions about a document, the second without reading it again",
        'pocketslm doc ask out/smollm2 "Who wrote it?" "When?" --document report.pdf',
    )
    _add_task(parser)
    parser.add_argument("question", nargs="+")
    parser = documents.add(
        "suggest",
        _suggest,
        "suggest three questions that a document answers",
        "pocketslm doc suggest out/smollm2 --document report.pdf",
    )
    _add_task(parser)
    parser = documents.add(
        "rewrite",
        _rewrite,
        "rewrite a passage",
        'pocketslm doc rewrite out/smollm2 "The passage." --instruction "in one sentence"',
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("passage", help='the text; "-" reads it from standard input')
    parser.add_argument("--instruction", default="in simple words", help="how (%(default)s)")
    add_generation(parser)
    add_json(parser)


def _add_library(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--library",
        type=Path,
        help=f"a file (default: ${LIBRARY_VARIABLE} or {LIBRARY_DEFAULT})",
    )
    add_json(parser)


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--document",
        help='a file, "-" for text on standard input, or a number of `doc list` (default: a '
        "sample)",
    )
    _add_library(parser)
    add_generation(parser)


def _add(arguments: argparse.Namespace) -> None:
    if len(arguments.file) > 1:
        refuse(arguments, "for several files", "title")
    with _library(arguments) as library:
        for file in arguments.file:
            document = library.add(_read(file))
            if arguments.title:
                library.rename(document.id, arguments.title)
            title, size = arguments.title or document.title, len(document.text)
            say(f"{document.id}: {title}, {size} characters")


def _list(arguments: argparse.Namespace) -> None:
    with _library(arguments) as library:
        entries = library.entries()
    if arguments.json:
        print_json([asdict(entry) for entry in entries])
    elif entries:
        head = ("id", "kind", "pages", "characters", "added", "title")
        rows = [
            (str(e.id), e.kind, str(e.pages or ""), str(e.characters), e.added, e.title)
            for e in entries
        ]
        print_columns([head, *rows])


def _remove(arguments: argparse.Namespace) -> None:
    with _library(arguments) as library:
        for document in arguments.document:
            library.remove(document)


def _summarize(arguments: argparse.Namespace) -> None:
    _work(arguments, lambda assistant, document, cancel: assistant.summarize(document, cancel))


def _suggest(arguments: argparse.Namespace) -> None:
    _work(arguments, lambda assistant, document, cancel: assistant.suggest(document, cancel))


def _ask(arguments: argparse.Namespace) -> None:
    def ask(question: str) -> Start:
        def start(
            assistant: Assistant, document: Document, cancel: threading.Event
        ) -> Iterator[Event]:
            say(f"> {question}")
            return assistant.ask(document, question, cancel)

        return start

    _work(arguments, *map(ask, arguments.question))


def _rewrite(arguments: argparse.Namespace) -> None:
    passage = read_input("a passage") if arguments.passage == "-" else arguments.passage
    assistant, cancel = _assistant(arguments), threading.Event()
    events = assistant.rewrite(passage, arguments.instruction, cancel)
    _show(arguments, assistant, events, cancel)


def _work(arguments: argparse.Namespace, *tasks: Start) -> None:
    """Run tasks on a document; what is asked of one in the library is remembered there."""
    from pocketslm.runtime.assistant.assistant import sample_document
    from pocketslm.runtime.assistant.library import Library

    which = arguments.document or str(sample_document())
    kept = which.isdecimal() and not Path(which).exists()
    if not kept:
        refuse(arguments, "with a document that is not in it", "library")
    with _library(arguments) if kept else Library(":memory:") as library:
        document = library.open(int(which)) if kept else library.add(_read(which))
        assistant, cancel = _assistant(arguments), threading.Event()
        for task in tasks:
            answer = _show(
                arguments, assistant, task(assistant, document, cancel), cancel, document
            )
            if kept:
                library.remember(document.id, answer)
            if cancel.is_set():
                return


def _show(
    arguments: argparse.Namespace,
    assistant: Assistant,
    events: Iterator[Event],
    cancel: threading.Event,
    document: Document | None = None,
) -> Answer:
    """Print an answer as it comes, or as JSON; Ctrl-C sets ``cancel`` and keeps what there is."""
    from pocketslm.runtime.assistant.answer import Answer, Progress

    def stop(*_: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        for event in events:
            if isinstance(event, Answer):
                answer = event
            elif isinstance(event, Progress):
                say(f"part {event.done + 1} of {event.total}")
            elif not arguments.json:
                show(event, end="")
    finally:
        signal.signal(signal.SIGINT, before)
    if arguments.json:
        print_json(asdict(answer) | {"backend": assistant.model.backend})
        return answer
    show("")
    if document:
        for citation in answer.citations:
            say(f"  {_quoted(document, citation)}")
    speed = f", {answer.decode_tps:.1f} tok/s" if answer.decode_tps else ""
    say(
        f"[{assistant.model.backend}: {answer.new_tokens} tokens, TTFT {answer.ttft_ms:.0f} ms"
        f"{speed}, finish: {answer.finish}]"
    )
    return answer


def _quoted(document: Document, citation: Citation) -> str:
    """A cited passage on one line, with its page and heading."""
    chunk = document.chunks[citation.chunk]
    quote = " ".join(document.text[citation.start : citation.end].split())
    return ", ".join(
        filter(None, (f'"{quote}"', f"page {chunk.page}" if chunk.page else "", chunk.heading))
    )


def _assistant(arguments: argparse.Namespace) -> Assistant:
    from pocketslm.runtime.assistant.assistant import Assistant

    model = load(arguments)
    model.need_head("doc")
    return Assistant(model, generation_config(arguments, model, Assistant.DEFAULTS))


def _library(arguments: argparse.Namespace) -> Library:
    from pocketslm.runtime.assistant.library import Library

    path = arguments.library or Path(os.environ.get(LIBRARY_VARIABLE) or LIBRARY_DEFAULT)
    return Library(path.expanduser())


def _read(file: str) -> Source:
    from pocketslm.runtime.assistant.readers import read_file, read_stream

    if file == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed, expected a document")
        return read_stream(sys.stdin.buffer, "standard input")
    return read_file(Path(file))
