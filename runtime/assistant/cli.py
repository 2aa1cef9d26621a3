"""``pocketslm doc``: the document assistant."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketslm.errors import DocumentError, LockedError, PocketSlmError, UsageError
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
from pocketslm.terminal import Progress as ProgressLine

if TYPE_CHECKING:
    from pocketslm.runtime.assistant.answer import Answer, Event
    from pocketslm.runtime.assistant.assistant import Assistant
    from pocketslm.runtime.assistant.document import Document, Source
    from pocketslm.runtime.assistant.library import Library
    from pocketslm.runtime.assistant.meaning import Meanings
    from pocketslm.runtime.model import Model
    from pocketslm.runtime.prefixes import Prefixes

    # The last is the question before.
    Start = Callable[[Assistant, Sequence[Document], threading.Event, str], Iterator[Event]]

_EMBEDDINGS = "embeddings"  # the library's setting: the bundles of its models, a line each
LIBRARY_VARIABLE = "POCKETSLM_DOCUMENTS"
LIBRARY_DEFAULT = "~/.local/share/pocketslm/documents.db"


def add_commands(commands: Commands) -> None:
    documents = commands.group("doc", "a library of documents: summarise, ask, suggest, rewrite")
    parser = documents.add(
        "add",
        _add,
        "add documents to the library (txt md html pdf docx odt rtf pptx xlsx csv eml mbox epub, "
        "logs, code, and pictures of text where tesseract is installed)",
        "pocketslm doc add report.pdf notes.md",
    )
    parser.add_argument("file", nargs="+", help='a file, or "-" for text on standard input')
    parser.add_argument("--title", help="(default: the file's name)")
    _add_password(parser)
    _add_library(parser)
    parser = documents.add("list", _list, "list the library", "pocketslm doc list --json")
    _add_library(parser)
    parser = documents.add(
        "show", _show_text, "print the text of a document", "pocketslm doc show 3 --page 12"
    )
    parser.add_argument("document", help="its number or title in `doc list`")
    parser.add_argument("--page", type=int, help="this page only")
    _add_library(parser)
    parser = documents.add(
        "history",
        _history,
        "print what was asked about a document, or about all of them together",
        "pocketslm doc history 3",
    )
    parser.add_argument("document", nargs="?", help="its number or title (default: all together)")
    _add_library(parser)
    parser = documents.add(
        "remove", _remove, "remove documents with their history", "pocketslm doc remove 3"
    )
    parser.add_argument("document", nargs="+", help="its number or title in `doc list`")
    _add_library(parser)
    parser = documents.add(
        "meaning",
        _meaning,
        "find by meaning too: read the library with a model of embeddings or several, now and "
        "whenever a document is added",
        "pocketslm doc meaning out/minilm out/e5",
    )
    parser.add_argument("bundles", nargs="*", type=Path, help="bundles of such models")
    parser.add_argument("--off", action="store_true", help="find by words only")
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
        "answer questions from all documents of the library, or from one",
        'pocketslm doc ask out/smollm2 "Who wrote the report?" "When?" --document report.pdf',
    )
    _add_task(parser)
    parser.add_argument("question", nargs="+")
    parser.add_argument(
        "--prefix-mb",
        type=int,
        metavar="MB",
        help="how much may be kept beside the library of documents that were read, so that the "
        "next question does not read them again (default: 512; 0: nothing)",
    )
    parser = documents.add(
        "suggest",
        _suggest,
        "suggest questions that a document answers",
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


def _add_password(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="a file whose first line is the password of a locked PDF (default: on a terminal it "
        "is asked for)",
    )


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--document",
        help='a file, "-" for text on standard input, or a number or title of `doc list` '
        "(default: `ask` asks all of the library, others take the newest; of an empty one a "
        "sample)",
    )
    _add_password(parser)
    _add_library(parser)
    add_generation(parser)


def _add(arguments: argparse.Namespace) -> None:
    if len(arguments.file) > 1:
        refuse(arguments, "for several files", "title")
    failed = []
    with _library(arguments) as library:
        before = {entry.id for entry in library.entries()}
        for file in arguments.file:
            try:
                source = _read(file, arguments)
            except DocumentError as error:
                failed.append(str(error))
                continue
            document = library.add(source)
            if arguments.title:
                library.rename(document.id, arguments.title)
            title, size = arguments.title or document.title, len(document.text)
            there = ", was there already" if document.id in before else ""
            before.add(document.id)
            say(f"{document.id}: {title}, {size} characters{there}")
        if meanings := _meanings(library):
            _index(meanings)
    if failed:
        raise DocumentError("; ".join(failed))


def _meaning(arguments: argparse.Namespace) -> None:
    with _library(arguments) as library:
        if arguments.off:
            library.set(_EMBEDDINGS, "")
            library.forget_meanings()
            return
        if arguments.bundles:
            for bundle in arguments.bundles:
                _embedder(bundle)  # is it one?
            paths = (str(bundle.expanduser().resolve()) for bundle in arguments.bundles)
            library.set(_EMBEDDINGS, "\n".join(paths))
        meanings = _meanings(library)
        if meanings is None:
            raise UsageError("the library finds by words only; name a bundle such as out/minilm")
        _index(meanings)
        say(f"found by words and by meaning ({meanings.name})")


def _index(meanings: Meanings) -> None:
    """Compute the missing vectors. Ctrl-C ends it and keeps those that are done."""
    cancel = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: cancel.set())
    try:
        with ProgressLine() as progress:
            for step in meanings.index(cancel=cancel):
                progress("meaning", step.done / step.total)
    finally:
        signal.signal(signal.SIGINT, before)
    if cancel.is_set():
        say("stopped; what is missing is read the next time")


def _embedder(bundle: Path) -> Model:
    from pocketslm.runtime.model import Model

    model = Model.load(bundle, verify=False)
    config = model.bundle.config
    if config is None or config.pooling is None:
        raise UsageError(
            f"{model.name} generates text and has no embeddings; export all-minilm-l6-v2"
        )
    return model


def _meanings(library: Library) -> Meanings | None:
    """The vectors by the library's models of embeddings. If one cannot be used, prints why and
    returns None.
    """
    from pocketslm.runtime.assistant.meaning import Meanings

    bundles = [Path(path) for path in library.setting(_EMBEDDINGS).splitlines()]
    if not bundles:
        return None
    try:
        name = " + ".join(bundle.name for bundle in bundles)
        return Meanings(library, [_embedder(bundle) for bundle in bundles], name)
    except PocketSlmError as error:
        say(f"found by words only: {error}")
        return None


def _show_text(arguments: argparse.Namespace) -> None:
    with _library(arguments) as library:
        document = library.find(arguments.document)
    chunks = [c for c in document.chunks if arguments.page in (None, c.page)]
    if not chunks:
        raise UsageError(f"{document.title} has no page {arguments.page}")
    text = document.text[chunks[0].start : chunks[-1].end]
    if arguments.json:
        print_json({"document": document.id, "title": document.title, "text": text})
    else:
        show(text)


def _history(arguments: argparse.Namespace) -> None:
    with _library(arguments) as library:
        number = library.find(arguments.document).id if arguments.document else None
        asked = library.history(number)
    if arguments.json:
        print_json([asdict(one) for one in asked])
        return
    for one in asked:
        show(f"{one.time}  {one.answer.task}  {one.answer.request}\n{one.answer.text}\n")


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
        for name in arguments.document:
            document = library.find(name)
            library.remove(document.id)
            say(f"removed {document.id}: {document.title}")


def _summarize(arguments: argparse.Namespace) -> None:
    _work(arguments, lambda assistant, shelf, cancel, _: assistant.summarize(shelf[0], cancel))


def _suggest(arguments: argparse.Namespace) -> None:
    _work(arguments, lambda assistant, shelf, cancel, _: assistant.suggest(shelf[0], cancel))


def _ask(arguments: argparse.Namespace) -> None:
    def ask(question: str) -> Start:
        def start(
            assistant: Assistant,
            shelf: Sequence[Document],
            cancel: threading.Event,
            before: str,
        ) -> Iterator[Event]:
            say(f"> {question}")
            return assistant.ask(shelf, question, cancel, before)

        return start

    _work(arguments, *map(ask, arguments.question), whole=True)


def _rewrite(arguments: argparse.Namespace) -> None:
    passage = read_input("a passage") if arguments.passage == "-" else arguments.passage
    assistant, cancel = _assistant(arguments), threading.Event()
    events = assistant.rewrite(passage, arguments.instruction, cancel)
    answer = _show(arguments, assistant, events, cancel)
    if arguments.json:
        print_json(_as_dict(assistant, answer, []))


def _work(arguments: argparse.Namespace, *tasks: Start, whole: bool = False) -> None:
    """Run tasks on a document or, if ``whole``, on all documents of the library, which remembers
    them.
    """
    from pocketslm.runtime.assistant.assistant import sample_document
    from pocketslm.runtime.assistant.library import Library

    which = arguments.document
    apart = which is not None and (which == "-" or Path(which).exists())
    if apart:
        refuse(arguments, "with a document that is not in it", "library", "prefix_mb")
    else:
        refuse(arguments, "without a file to read", "password_file")
    answers = []
    # Without a document, do not make a library that does not exist.
    bare = which is None and not _place(arguments).exists()
    with Library(":memory:") if apart or bare else _library(arguments) as library:
        if apart:
            shelf = [library.add(_read(which, arguments))]
        elif which is not None:
            shelf = [library.find(which)]
        else:
            entries = library.entries()  # the newest first
            shelf = [library.open(entry.id) for entry in (entries if whole else entries[:1])]
        kept: int | None = shelf[0].id if shelf else None
        if which is None and whole and len(shelf) > 1:
            kept = None
            say(f"in: {len(shelf)} documents")
        elif which is None and shelf:
            say(f"in: {shelf[0].title}")
        with Library(":memory:") as aside:
            if not shelf:
                shelf, apart = [aside.add(sample_document())], True
                say("in: a sample document; `doc add FILE` adds yours")
            keep_in = None if apart or not whole else library
            assistant, cancel = _assistant(arguments, keep_in), threading.Event()
            assistant.meanings = None if apart else _meanings(library)
            before = library.last_question(kept) if whole and not apart else ""
            for task in tasks:
                events = task(assistant, shelf, cancel, before)
                answer = _show(arguments, assistant, events, cancel, shelf)
                answers.append(_as_dict(assistant, answer, shelf))
                before = answer.asked
                if not apart:
                    library.remember(kept, answer)
                if cancel.is_set():
                    break
    if arguments.json:
        print_json(answers if whole else answers[0])


def _show(
    arguments: argparse.Namespace,
    assistant: Assistant,
    events: Iterator[Event],
    cancel: threading.Event,
    shelf: Sequence[Document] = (),
) -> Answer:
    """Print an answer as it comes, unless JSON is wanted. Ctrl-C sets ``cancel`` and keeps the
    rest.
    """
    from pocketslm.runtime.assistant.answer import Answer
    from pocketslm.runtime.assistant.assistant import quoted

    def stop(*_: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        for event in events:
            if isinstance(event, Answer):
                answer = event
            elif not arguments.json:
                show(event, end="")
    finally:
        signal.signal(signal.SIGINT, before)
    if arguments.json:
        return answer
    show("")
    if answer.task in ("summarize", "suggest"):
        for citation in answer.citations:
            say(f"  {quoted(shelf[0], citation)}")
    if shelf and not answer.citations:
        say("  (nothing in the document is cited)")
    notes = []
    if answer.task == "ask":
        if answer.asked != answer.request:
            notes.append(f"asked as: {answer.asked}")
        notes.append("found by words and meaning" if answer.by_meaning else "found by words")
    if answer.new_tokens:
        speed = f", {answer.decode_tps:.1f} tok/s" if answer.decode_tps else ""
        notes.append(
            f"{assistant.model.backend}: {answer.new_tokens} tokens, TTFT "
            f"{answer.ttft_ms:.0f} ms{speed}, finish: {answer.finish}"
        )
    if notes:
        say(f"[{'; '.join(notes)}]")
    return answer


def _as_dict(assistant: Assistant, answer: Answer, shelf: Sequence[Document]) -> dict[str, object]:
    """An answer with the text, page, heading and title of each citation."""
    of = {document.id: document for document in shelf}
    data = asdict(answer) | {"backend": assistant.model.backend}
    for cited, citation in zip(data["citations"], answer.citations, strict=True):
        document = of[citation.document]
        chunk = document.chunks[citation.chunk]
        cited |= {
            "quote": document.text[citation.start : citation.end],
            "page": chunk.page,
            "heading": chunk.heading,
            "title": document.title,
        }
    return data


def _assistant(arguments: argparse.Namespace, keep_in: Library | None = None) -> Assistant:
    """keep_in: the library beside which documents that were read are kept."""
    from pocketslm.runtime.assistant.assistant import Assistant

    model = load(arguments)
    model.need_head("doc")
    prefixes = None if keep_in is None else _prefixes(arguments, model, keep_in)
    config = generation_config(arguments, model, Assistant.DEFAULTS)
    return Assistant(model, config, prefixes=prefixes)


def _prefixes(arguments: argparse.Namespace, model: Model, library: Library) -> Prefixes | None:
    """Where documents that were read are kept: by default, if the model can keep them."""
    asked = arguments.prefix_mb
    if asked == 0 or (asked is None and not model.keeps_prefixes):
        return None
    return library.prefixes() if asked is None else library.prefixes(asked << 20)


def _library(arguments: argparse.Namespace) -> Library:
    from pocketslm.runtime.assistant.library import Library

    return Library(_place(arguments))


def _place(arguments: argparse.Namespace) -> Path:
    """The path of the library."""
    path: Path = arguments.library or Path(os.environ.get(LIBRARY_VARIABLE) or LIBRARY_DEFAULT)
    return path.expanduser()


def _read(file: str, arguments: argparse.Namespace) -> Source:
    from pocketslm.runtime.assistant.readers import read_file, read_stream

    password = _first_line(arguments.password_file)
    if file == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed, expected a document")
        return read_stream(sys.stdin.buffer, "standard input", password)
    try:
        return read_file(Path(file), password)
    except LockedError as error:
        if password or sys.stdin is None or not sys.stdin.isatty():
            raise LockedError(f"{error}; name a file that holds it with --password-file") from None
    return read_file(Path(file), getpass(f"password of {file}: "))


def _first_line(path: Path | None) -> str:
    """The first line of a file, "" without one."""
    if path is None:
        return ""
    try:
        first = path.read_text("utf-8").splitlines()[:1]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the password in {path}: {error}") from None
    if not first:
        raise UsageError(f"{path} is empty, expected a password on its first line")
    return first[0]
